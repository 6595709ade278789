"""The ladder: how far known changes move a model, so that another's figure can be laid beside them.

A step is a change whose cause is known (a change of KV parts, float16 sums, a q8_0 cache, a key that is not
seen), measured on one model and text as engines' files would show it: both sides run freely, and the
divergence is that of the changed from the unchanged. `verify ladder` measures and writes one; nothing here
runs a model.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from verify.machine.errors import UsageError
from verify.machine.files import read_input

# rounding: another right arithmetic; cache: what a cache of that type loses; fault: a bug.
StepKind = Literal["rounding", "cache", "fault"]
# What is placed on a ladder: mean divergence, |ln PPL(Q)/PPL(base)|, share of changed top tokens.
Measure = Literal["kld", "dlnppl", "flips"]
MEASURES: dict[Measure, str] = {"kld": "mean KLD", "dlnppl": "change of ln PPL", "flips": "share of flips"}
# A figure within this factor of the largest rounding is rounding; beyond the second it is not.
WITHIN, BEYOND = 2.0, 4.0
# A figure within this factor of a step is about that of the step.
NEAR = 1.25
SCHEMA = 1


class LadderStep(NamedTuple):
    """One known change, measured."""

    name: str  # unique on the ladder
    # In words, as it stands in a sentence.
    what: str
    kind: StepKind  # rounding, cache or fault
    spec: str  # of the kernel that ran
    # Mean KL(unchanged, changed) in nats a token, with its interval at 99.9 %.
    kld: float
    kld_low: float  # 99.9 %
    kld_high: float  # 99.9 %
    # |ln PPL(changed) / PPL(unchanged)| and its standard error.
    dlnppl: float
    dlnppl_se: float  # standard error
    # Share of tokens whose most likely token changed.
    flips: float


class Placed(NamedTuple):
    """A figure on a ladder."""

    measure: Measure  # kld, dlnppl or flips
    value: float  # of the figure
    below: LadderStep | None  # its neighbour; None: there is none
    above: LadderStep | None  # likewise
    # Of the largest rounding and, where there is one, of the smallest fault.
    rounding: float
    fault: float | None  # None: the ladder has none
    sentence: str  # all this in words

    @property
    def answer(self) -> Literal["tie", "not explained", "inconclusive"]:
        """Whether rounding explains the figure."""
        if self.value <= WITHIN * self.rounding:
            return "tie"
        return "not explained" if self.value > BEYOND * self.rounding else "inconclusive"


class Ladder(NamedTuple):
    """Steps of one model and text."""

    model: str  # file name
    n_ctx: int  # tokens a window
    windows: int  # that were measured
    tokens: int  # scored ones
    text: str  # sha256 of the windows' ids
    cache_type: str  # that q, k and v were rounded to
    device: str  # that it ran on
    steps: tuple[LadderStep, ...]  # as they were measured
    # Steps that could not be run, and why.
    left_out: tuple[str, ...] = ()

    def place(self, measure: Measure, value: float) -> Placed:
        """Where a figure lies among the steps. Raises ValueError for one that is no number."""
        if not math.isfinite(value):
            raise ValueError(f"{MEASURES[measure]} is {value}")
        value = abs(value)
        order = sorted(self.steps, key=lambda s: getattr(s, measure))
        below = next((s for s in reversed(order) if getattr(s, measure) <= value), None)
        above = next((s for s in order if getattr(s, measure) > value), None)
        rounding = max((getattr(s, measure) for s in self.steps if s.kind == "rounding"), default=0.0)
        fault = min((getattr(s, measure) for s in self.steps if s.kind == "fault"), default=None)
        return Placed(
            measure=measure,
            value=value,
            below=below,
            above=above,
            rounding=rounding,
            fault=fault,
            sentence=self._sentence(measure, value, below, above),
        )

    def _sentence(
        self, measure: Measure, value: float, below: LadderStep | None, above: LadderStep | None
    ) -> str:
        def of(step: LadderStep) -> str:
            return f"{step.what} ({getattr(step, measure):.1e})"

        your = f"your {MEASURES[measure]} of {value:.2g}"
        named = [s for s in (below, above) if s is not None]
        near = [s for s in named if value / NEAR <= getattr(s, measure) <= value * NEAR and value]
        if near:
            named = [min(near, key=lambda s: abs(math.log(getattr(s, measure) / value)))]
            said = f"{your} is about that of {of(named[0])}"
        elif below is None and above is not None:
            said = f"{your} is less than that of {of(above)}"
        elif above is None and below is not None:
            said = f"{your} is more than that of {of(below)}"
        elif below is not None and above is not None:
            said = f"{your} lies between {of(below)} and {of(above)}"
        else:
            return f"{your}: the ladder has no steps"
        faults = [s for s in self.steps if s.kind == "fault" and s not in named]
        if faults:
            said += f"; {'; '.join(f'{s.what} would be {getattr(s, measure):.1e}' for s in faults)}"
        return said

    def to_json(self) -> dict[str, Any]:
        found = self._asdict()
        found["steps"] = [s._asdict() for s in self.steps]
        return {"schema": SCHEMA, "command": "ladder", "exit_code": 0, **found, "left_out": [*self.left_out]}


def read_ladder(path: str | Path) -> Ladder:
    """A ladder that `verify ladder --out` wrote. Raises UsageError naming the file and the field."""
    try:
        found = json.loads(read_input(Path(path)))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: is not JSON, expected what verify ladder --out writes") from None
    if not isinstance(found, dict) or found.get("command") != "ladder" or found.get("schema") != SCHEMA:
        raise UsageError(f"{path}: is not a ladder, expected what verify ladder --out writes")
    try:
        steps = tuple(map(_step_of, found["steps"]))
        rest = {f: found[f] for f in Ladder._fields if f not in ("steps", "left_out")}
        left_out = tuple(map(str, found.get("left_out", ())))
    except (KeyError, TypeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else "has fields of other kinds"
        raise UsageError(f"{path}: {what}, expected what verify ladder --out writes") from None
    for step in steps:
        for field in _NUMBERS:
            value = getattr(step, field)
            most = math.inf if field in _OPEN else sys.float_info.max
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise UsageError(f"{path}: step {step.name}: {field} is {value!r}, expected a number from 0")
        if step.kind not in get_args(StepKind) or not isinstance(step.what, str):
            raise UsageError(f"{path}: step {step.name}: kind is {step.kind!r}, what {step.what!r}")
    return Ladder(**rest, steps=steps, left_out=left_out)


# JSON has no infinity: null says that there was too little data for an interval.
_OPEN = ("kld_high", "dlnppl_se")
_NUMBERS = ("kld", "kld_low", "kld_high", "dlnppl", "dlnppl_se", "flips")


def _step_of(found: dict[str, Any]) -> LadderStep:
    fields = {f: found[f] for f in LadderStep._fields}
    return LadderStep(**fields | {f: math.inf for f in _OPEN if fields[f] is None})


def rows_of(steps: Sequence[LadderStep]) -> list[LadderStep]:
    """From the smallest divergence to the largest."""
    return sorted(steps, key=lambda s: s.kld)
