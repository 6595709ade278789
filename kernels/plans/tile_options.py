"""What a tiled kernel is asked for in its specification: its plan, and the types that it computes in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from verify.kernels.errors import SpecError
from verify.kernels.numbers import FLOAT_TYPES, FP8_TYPES, NUMBER_TYPES
from verify.kernels.plans.plan import Plan
from verify.kernels.plans.spec import Spec, choice, parse_plan

AS_GIVEN_Q = "as-given"
# As ggml's CPU kernels have queries beside a quantised cache: blocks of 32 with a scale.
BLOCKS_Q = "q8_0"


@dataclass(frozen=True)
class TileOptions:
    """plan: how a call is cut; p: type of P in the second product; acc: output accumulators; out: result;
    q: what q is rounded to before the first product: `as-given`, a type of 8 bits with a scale a row and
    head, or blocks of q8_0.
    """

    plan: Plan = field(default_factory=Plan)
    p: str = "f16"
    acc: str = "f32"
    out: str = "f32"
    q: str = AS_GIVEN_Q

    @property
    def label(self) -> str:
        q = "" if self.q == AS_GIVEN_Q else f",q={self.q}"
        return f"block={self.plan.block},p={self.p},acc={self.acc},out={self.out}{q}"

    def with_plan(self, plan: Plan | None) -> TileOptions:
        """These options, with the plan that a call brings itself where it brings one."""
        return self if plan is None else replace(self, plan=plan)


def parse_tile_options(spec: Spec) -> TileOptions:
    """Raises SpecError."""
    options = TileOptions(
        plan=parse_plan(spec),
        p=choice(spec, "p", "f16", tuple(NUMBER_TYPES)),
        acc=choice(spec, "acc", "f32", ("f32", "f16")),
        out=choice(spec, "out", "f32", tuple(FLOAT_TYPES)),
        q=choice(spec, "q", AS_GIVEN_Q, (AS_GIVEN_Q, *FP8_TYPES, BLOCKS_Q)),
    )
    if options.p in FP8_TYPES and options.acc != "f32":
        raise SpecError(
            f"kernel {spec.text!r}: p={options.p},acc={options.acc}: P of 8 bits is scaled up, and its sums"
            " overflow float16: expected acc=f32"
        )
    return options
