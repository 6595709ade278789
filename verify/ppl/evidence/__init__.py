"""From what the groups of a run left to evidence: about each pair of arms, and to `run.json`."""

from verify.ppl.evidence.by_n_kv import by_n_kv
from verify.ppl.evidence.changed_tokens import changed_token_records
from verify.ppl.evidence.noise import noise_notes, noise_records
from verify.ppl.evidence.pairs import arm_record, changed_plan, pair_record
from verify.ppl.evidence.power import detectable_record, power_record
from verify.ppl.evidence.scores import Scores

__all__ = [
    "Scores",
    "arm_record",
    "by_n_kv",
    "changed_plan",
    "changed_token_records",
    "detectable_record",
    "noise_notes",
    "noise_records",
    "pair_record",
    "power_record",
]
