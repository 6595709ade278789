"""What a tiled kernel is asked for in its specification: its plan, and the types that it computes in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.plans.plan import Plan
from verify.kernels.plans.spec import Spec, choice, parse_plan


@dataclass(frozen=True)
class TileOptions:
    """plan: how a call is cut; p: type of P in the second product; acc: output accumulators; out: result."""

    plan: Plan = field(default_factory=Plan)
    p: str = "f16"
    acc: str = "f32"
    out: str = "f32"

    @property
    def label(self) -> str:
        return f"block={self.plan.block},p={self.p},acc={self.acc},out={self.out}"

    def with_plan(self, plan: Plan | None) -> TileOptions:
        """These options, with the plan that a call brings itself where it brings one."""
        return self if plan is None else replace(self, plan=plan)


def parse_tile_options(spec: Spec) -> TileOptions:
    """Raises SpecError."""
    return TileOptions(
        plan=parse_plan(spec),
        p=choice(spec, "p", "f16", tuple(FLOAT_TYPES)),
        acc=choice(spec, "acc", "f32", ("f32", "f16")),
        out=choice(spec, "out", "f32", tuple(FLOAT_TYPES)),
    )
