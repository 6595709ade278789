"""The tool: commands, experiments, evidence, verdicts and reports. Computes no attention itself."""

__version__ = "0.1.0"
