"""Errors held against budgets: detectors, other projects' gates, input families, probes."""
