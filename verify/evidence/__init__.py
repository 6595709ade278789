"""From what the groups of a run left to evidence: about each pair of arms, and to `run.json`."""

from verify.evidence.pairs import (
    ArmSummary,
    PairSummary,
    Scores,
    arm_json,
    coverage_lines,
    layer_summary,
    pair_json,
    summarize_arm,
    summarize_pair,
)

__all__ = [
    "ArmSummary",
    "PairSummary",
    "Scores",
    "arm_json",
    "coverage_lines",
    "layer_summary",
    "pair_json",
    "summarize_arm",
    "summarize_pair",
]
