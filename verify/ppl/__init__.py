"""Perplexity, paired: settings, arms side by side, groups of windows, the run's folder."""
