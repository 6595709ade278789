"""What `verify diff --brief` sees of known faults in the rows of its lengths.

    python benchmarks/brief_faults.py [--n-kv 2048] [--placed-n-kv 8192] [--only NAME ...]
        [--out benchmarks/results/brief-faults.json]

Every fault of the corpus that a call of one sequence can show and every clean variant at --n-kv, and faults
at single places of long rows (`PLACED`) at --placed-n-kv, as candidates beside `eager:kv=3` at 12/2x64,
asked briefly. Faults that are not `broken` then are asked with all inputs in full. Of each the verdicts, the
inputs that show what is wrong, and what is said of the first two. Exit code 0 where no fault is `broken` in
full alone, and no clean variant is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from commit import commit, write_result

from verify.diff.inputs import DiffSettings, all_inputs, families_of
from verify.diff.run import run_diff
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import Capabilities
from verify.kernels.faults import FAULTS, VARIANTS
from verify.kernels.judging.families import FORMS
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel
from verify.machine.environment import prepare_torch
from verify.machine.stages import StageClock

SHAPE = "12/2x64"
# The candidate that a fault at a single place is planted in: another plan than the baseline's.
INNER = "eager:kv=4"
BASELINE = "eager:kv=3"


def _at(call: Call) -> int:
    """The first of the keys that they are about: 5,123 of 8,192."""
    return int(call.kv_len.max()) * 5 // 8 + 3


def _changed(call: Call, head: int, k: torch.Tensor | None, v: torch.Tensor | None) -> Call:
    """The call with other numbers in one KV head."""
    keys, values = call.k.clone(), call.v.clone()
    if k is not None:
        keys[:, :, head] = k
    if v is not None:
        values[:, :, head] = v
    return replace(call, k=keys, v=values)


def key_lost(call: Call) -> Call:
    """In the place of one key stands the one before it, in the second KV head."""
    k, v, at = call.k[:, :, 1].clone(), call.v[:, :, 1].clone(), _at(call)
    k[:, at], v[:, at] = k[:, at - 1], v[:, at - 1]
    return _changed(call, 1, k, v)


def values_exchanged(call: Call) -> Call:
    """Values of two neighbours are each other's, in the first KV head."""
    v = call.v[:, :, 0].clone()
    at = _at(call)
    v[:, [at, at + 1]] = v[:, [at + 1, at]]
    return _changed(call, 0, None, v)


def lane_lost(call: Call) -> Call:
    """Values of the last key of each 64 are those of the key before, in the second KV head."""
    v = call.v[:, :, 1].clone()
    v[:, 63::64] = v[:, 62::64][:, : v[:, 63::64].shape[1]]
    return _changed(call, 1, None, v)


def strided_only(call: Call) -> Call:
    """The same, where K lies head by head alone."""
    return lane_lost(call) if call.k.stride(1) == call.shape.k_size else call


def window_too_wide(call: Call) -> Call:
    """Windows of an eighth of the keys and more hold one key too many."""
    window = call.sliding_window
    return (
        call if window is None or window < call.shape.keys // 8 else replace(call, sliding_window=window + 1)
    )


def window_from_tile(call: Call) -> Call:
    """Windows begin where a tile of 64 keys does."""
    if call.sliding_window is None:
        return call
    first = call.shape.keys - call.sliding_window
    return replace(call, sliding_window=max(call.sliding_window - (-first % 64), 1))


def cap_lost(call: Call) -> Call:
    """No softcap where there are sinks too."""
    return replace(call, softcap=None) if call.sinks is not None else call


def slopes_halved(call: Call) -> Call:
    """ALiBi counts every second key."""
    return call if call.alibi_slopes is None else replace(call, alibi_slopes=call.alibi_slopes / 2)


def sink_of_neighbour(call: Call) -> Call:
    """Each head has the sink of the next."""
    return call if call.sinks is None else replace(call, sinks=call.sinks.roll(1))


PLACED: tuple[Callable[[Call], Call], ...] = (
    key_lost,
    values_exchanged,
    lane_lost,
    strided_only,
    window_too_wide,
    window_from_tile,
    cap_lost,
    slopes_halved,
    sink_of_neighbour,
)


PLACED_NAME = "placed: "


class Placed(Kernel):
    """A right kernel that is given another call than it says."""

    as_if_alone = True

    def __init__(self, spec: str, change: Callable[[Call], Call]) -> None:
        super().__init__(spec)
        self.inner, self.change = build_kernel(INNER), change

    def run(self, call: Call) -> Result:
        return self.inner.run(self.change(call))

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return self.inner.arithmetic(shape, path)

    def arithmetic_of(self, call: Call) -> Arithmetic:
        return self.inner.arithmetic_of(call)

    def capabilities(self) -> Capabilities:
        return self.inner.capabilities()


class Subject(NamedTuple):
    """A kernel that is asked. without: inputs that it is not made for."""

    kind: str  # fault or clean
    build: Callable[[], Kernel]
    without: tuple[str, ...] = ()


def subjects() -> dict[str, Subject]:
    """All of them, by name."""
    found: dict[str, Subject] = {}
    for fault in FAULTS:
        of_one_call = "decode" in fault.paths and not fault.needs and not fault.sizes
        if of_one_call and not set(fault.families) & FORMS.keys():
            found[fault.name] = Subject("fault", fault.build)
    for change in PLACED:
        name = PLACED_NAME + change.__name__.replace("_", " ")
        found[name] = Subject("fault", partial(Placed, name, change))
    for variant in VARIANTS:
        found[f"clean: {variant.name}"] = Subject("clean", variant.build, variant.without)
    return found


def asked(chosen: Mapping[str, Subject], n_kv: int, *, brief: bool) -> dict[str, dict[str, Any]]:
    """Of each the verdict of a diff at one length, and what is wrong by the inputs that show it."""
    # A specification that says nothing of cuts: inputs lie at the baseline's.
    specs = {f"py:{i}.py::attend": name for i, name in enumerate(chosen)}

    def build(spec: str) -> Kernel:
        if spec not in specs:
            return build_kernel(spec)
        kernel = chosen[specs[spec]].build()
        # A comma would begin an option.
        kernel.spec = specs[spec].replace(",", "")
        return kernel

    settings = DiffSettings(
        shapes=(SHAPE,),
        n_kvs=(n_kv,),
        families=families_of("all", "decode"),
        baseline=BASELINE,
        candidates=tuple(specs),
        device="cpu",
        brief_n_kvs=(n_kv,) if brief else (),
        most_rows=64,
    )
    device, clock = torch.device("cpu"), StageClock(torch.device("cpu"))
    inputs = all_inputs(settings, device, clock)
    outcome = run_diff(settings, device, inputs, clock, build=build, name_bugs=False)
    found: dict[str, dict[str, Any]] = {}
    for (name, one), candidate in zip(chosen.items(), outcome.candidates, strict=True):
        cells = [c for c in candidate.cells if c.inputs.family not in one.without]
        shown = {c.inputs.family: c.faults[0] for c in cells if c.faults}
        said = dict(list(shown.items())[:2])
        found[name] = {"n_kv": n_kv, "verdict": candidate.verdict, "shown": list(shown), "said": said}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n-kv", type=int, default=2048)
    parser.add_argument("--placed-n-kv", type=int, default=8192)
    parser.add_argument("--only", nargs="*", help="names of faults and variants, or their beginnings")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    prepare_torch()
    torch.set_num_threads(1)
    every = subjects()
    chosen = [name for name in every if not given.only or any(name.startswith(x) for x in given.only)]
    began = time.process_time()
    found: dict[str, dict[str, Any]] = {}
    wrong = []
    for n_kv, placed in ((given.n_kv, False), (given.placed_n_kv, True)):
        own = {name: every[name] for name in chosen if name.startswith(PLACED_NAME) == placed}
        briefly = asked(own, n_kv, brief=True) if own else {}
        open_ = {name: own[name] for name in own if own[name].kind == "fault" and not briefly[name]["shown"]}
        in_full = asked(open_, n_kv, brief=False) if open_ else {}
        for name, one in own.items():
            found[name] = {"kind": one.kind, "brief": briefly[name], "full": in_full.get(name)}
            alarm = one.kind == "clean" and briefly[name]["shown"]
            if alarm or (name in in_full and in_full[name]["shown"]):
                wrong.append(name)
    faults = {name: one for name, one in found.items() if one["kind"] == "fault"}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "shape": SHAPE,
        "cpu_s": time.process_time() - began,
        "faults": len(faults),
        "broken_briefly": sum(bool(one["brief"]["shown"]) for one in faults.values()),
        "clean": len(found) - len(faults),
        "wrong": wrong,
        "subjects": found,
    }
    write_result(result, given.out)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
