"""From what the groups of a run left to evidence: about each pair of arms, and to `run.json`."""

from verify.arms.kernel_errors import in_place_json
from verify.ppl.evidence.by_n_kv import by_n_kv
from verify.ppl.evidence.noise import noise_json, noise_notes
from verify.ppl.evidence.pairs import (
    ArmSummary,
    PairSummary,
    arm_json,
    coverage_lines,
    pair_json,
    summarize_arm,
    summarize_pair,
)
from verify.ppl.evidence.power import detectable_json, power_json
from verify.ppl.evidence.scores import Scores
from verify.ppl.evidence.top1 import top1_changes

__all__ = [
    "ArmSummary",
    "PairSummary",
    "Scores",
    "arm_json",
    "by_n_kv",
    "coverage_lines",
    "detectable_json",
    "in_place_json",
    "noise_json",
    "noise_notes",
    "pair_json",
    "power_json",
    "summarize_arm",
    "summarize_pair",
    "top1_changes",
]
