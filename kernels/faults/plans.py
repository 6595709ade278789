"""Known faults of plans: a rule for cutting calls up with one line broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from verify.kernels.faults.record import PlanFault
from verify.kernels.plans.asked import N_KV_PADDING, RowAsked
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.policy import PolicyRule


class RemainderLost(Plan):
    """Only whole groups of a power of two are launched."""

    def groups(self, ratio: int) -> tuple[int, ...]:
        groups = super().groups(ratio)
        return groups[:1] if self.heads == "split" else groups


class TailLost(KVCuts):
    """Parts are tiles // parts long: what is left over is in none."""

    def cuts(self, n_kv: int, block: int, programs: int, sms: int) -> tuple[int, ...]:
        tiles = -(-n_kv // block)
        parts = max(min(self.parts_wanted(programs, sms), tiles), 1) if self.mode != "size" else 1
        return tuple(sorted({min(i * (tiles // parts) * block, n_kv) for i in range(parts + 1)}))


class CutsInsideTiles(KVCuts):
    """Parts are of equal length in keys, and end inside tiles."""

    def cuts(self, n_kv: int, block: int, programs: int, sms: int) -> tuple[int, ...]:
        parts = max(self.parts_wanted(programs, sms), 1) if self.mode != "size" else 1
        return tuple(sorted({i * n_kv // parts for i in range(parts + 1)}))


def _unpadded(rule: PolicyRule) -> PolicyRule:
    """The gate compares n_kv as it is, not padded as the engine has it."""

    def applies(call: RowAsked, threshold: int) -> bool:
        return rule.applies(call._replace(n_kv=call.n_kv // N_KV_PADDING * N_KV_PADDING), threshold)

    return rule._replace(applies=applies)


def _gate_too_narrow(plan: Plan) -> Plan:
    if plan.policy is None:
        return plan
    rules = tuple(_unpadded(rule) for rule in plan.policy.rules)
    return replace(plan, policy=replace(plan.policy, rules=rules))


def _with_cuts(kind: type[KVCuts]) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, kv=kind(plan.kv.mode, plan.kv.value))


PLAN_FAULTS: tuple[PlanFault, ...] = (
    PlanFault("remainder lost", "query heads beyond a power of two are in no group", ("llama.cpp #19115",),
              "heads=split", lambda plan: RemainderLost(**plan.__dict__)),
    PlanFault("tail lost", "keys beyond a multiple of the parts are in none", ("llama.cpp #18487",),
              "kv=3", _with_cuts(TailLost)),
    PlanFault("cuts inside tiles", "parts end inside tiles", ("emulated",), "kv=3",
              _with_cuts(CutsInsideTiles)),
    PlanFault("gate too narrow", "the gate of the new path opens too late", ("ik #1973",),
              "policy=ik-1183", _gate_too_narrow),
)  # fmt: skip
