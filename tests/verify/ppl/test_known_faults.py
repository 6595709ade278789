"""Every known fault, as the candidate of `verify ppl` on a model: none passes for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support import tiny_model
from support.ppl_runs import Tiny, run
from verify.arms import building
from verify.kernels.bits import same_bits
from verify.kernels.faults import FAULTS, Fault
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.kernel import Kernel

# Gives other bits each time: the run is void if it is the baseline, and luck if it is not.
NOT_REPEATABLE = "race"
# The ledger: faults that change no bit of this run, and why. One more or one less is a failure: either the
# run no longer reaches what it reached, or the fault is lost.
NO_EFFECT = {
    "base-2 lse": "a model reads no lse",
    "fix-up columns": "16 columns further on is the same column of 16",
    "part of other batch": "one sequence a call",
    "first call's lengths": "every call of a shape has the same lengths",
    "empty part NaN": "every part sees a key",
    "empty part finite": "every part sees a key",
    "empty row +inf": "every row sees a key",
    "empty row NaN": "every row sees a key",
    "offset wraps": "fewer than 2^15 numbers",
    "strides ignored": "K and V lie without gaps",
    "window dropped": "no sliding window",
    "window off by one": "no sliding window",
    "prefill key dropped": "the decode path",
    "second group's sinks": "no sinks",
    "softcap dropped": "no softcap",
    "ALiBi dropped": "no ALiBi",
    "sinks dropped": "no sinks",
    "sink in every part": "no sinks",
    "page number wraps": "no pages",
    "page offset wraps": "no pages",
    "neighbour's page": "no pages",
    "table's tail read": "no pages",
    "last page's rest seen": "no pages",
    "zero-length chunk": "no packed tokens",
    "first token's sink only": "no sinks",
    "tree mask one level short": "no mask",
    "hole of a list read": "no lists of keys",
    "other end of K": "V does not lie in K",
    "four query tokens": "the decode path",
    "heads packed as of one token": "the decode path",
    "window by cells": "no sliding window",
    "first sequence's lengths": "one sequence a call",
    "third sequence": "one sequence a call",
    "f16 overflow": "no sum near 65504, and the correct kernel has the same accumulators",
}
# Right here: one is a right kernel that runs another plan, which the trace shows; the other's weights
# overflow only where logits are large, so that it only rounds.
RIGHT_HERE = {"never ran": ("inconclusive",), "no common maximum": ("round-off", "inconclusive")}
# Calls of all rows have the same lengths; those of one query token, which a run asks beside, do not.
SHOWN_ALONE = {"first call's lengths"}
# Of each kind one in the fast tests: one row in a hundred, all rows a little, rows that come last.
FAST = {"lone key dropped", "wrong by 2 %", "late maximum"}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """12 query heads over 2 KV heads: r = 6, which faults of head groups need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "HEADS", 12)
        folder = tmp_path_factory.mktemp("six")
        numbers = {"attention__key_length": 16, "attention__value_length": 16}
        model = tiny_model.write_tiny_model(folder / "six.gguf", **numbers)
        return Tiny(model, tiny_model.write_text(folder / "text.txt"))


def made_clean(fault: Fault) -> Kernel:
    """The correct kernel that a fault was made from, under the same plan."""
    faulty = fault.build()
    assert isinstance(faulty, TileKernel)
    heads = faulty.plan.heads
    options: dict[str, Any] = {"heads": heads if isinstance(heads, tuple) else None, "acc": faulty.acc}
    options |= {"kv": faulty.plan.kv.value, "block": faulty.plan.block, "p": faulty.p}
    return TileKernel("clean", **options)


def judged(six: Tiny, out: Path, fault: Fault, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run with the fault as the candidate, and the correct kernel that it was made from as the baseline."""
    built = {"eager": lambda: made_clean(fault), "eager:block=16": fault.build}
    patch.setattr(building, "build_shared_kernel", lambda spec, gpus: built[spec]())
    # Three tiles, so that three parts are there to be merged.
    more = ("-c", "160", "--chunks", "2", "--baseline", "eager", "--candidate", "eager:block=16")
    _, report = run(six, out, *more)
    assert {line["kernel"][:5] for line in report["coverage"]} == {"tile["}
    return report


HERE = [fault for fault in FAULTS if not fault.needs and fault.name != NOT_REPEATABLE]


def test_the_ledger_is_of_known_faults() -> None:
    names = {fault.name for fault in HERE}
    right = set(RIGHT_HERE)
    assert NO_EFFECT.keys() | right | FAST <= names and not NO_EFFECT.keys() & (right | FAST)
    assert NO_EFFECT.keys() >= SHOWN_ALONE


@pytest.mark.parametrize("fault", HERE, ids=lambda fault: fault.name)
def test_the_ledger_holds_of_one_call_as_the_model_makes_it(fault: Fault) -> None:
    """Of this size, without options: the slow tests below ask the same of whole runs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 160, n, 16, generator=generator).half() for n in (12, 2, 2))
    kv_len = torch.arange(1, 161, dtype=torch.int32)[None]
    same = same_bits(*(kernel.attend(3 * q, k, v, kv_len=kv_len, scale=0.25).out
                       for kernel in (fault.build(), made_clean(fault))))  # fmt: skip
    assert same == (fault.name in NO_EFFECT)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, id=f.name, marks=() if f.name in FAST else pytest.mark.slow) for f in HERE],
)
def test_no_fault_that_changes_this_path_passes(
    six: Tiny, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = judged(six, tmp_path / "run", fault, monkeypatch)
    (pair,) = report["pairs"]
    hidden = fault.name in NO_EFFECT and fault.name not in SHOWN_ALONE
    assert pair["bitwise_equal"] == hidden, NO_EFFECT.get(fault.name, report["reasons"])
    if not hidden:
        assert report["verdict"] in RIGHT_HERE.get(fault.name, ("broken",)), report["reasons"]
