"""That `flash` is held to its plan by what the device wrote: on Triton's interpreter, and on a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from support.flash_laws import Case, inputs, kernel, same_bits
from support.subjects import flash_subject
from verify.diff import run as diff
from verify.diff.inputs import DiffSettings, all_inputs
from verify.kernels.call import AttentionOutput, checked_call
from verify.kernels.flash import kernel as flash_kernel
from verify.kernels.flash import launch as flash_launch
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.flash.launch import Prepared
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.spec import parse_spec
from verify.kernels.plans.tile_options import parse_tile_options
from verify.laws import LAWS
from verify.laws.run import run_law
from verify.machine.stages import StageClock


class Asked:
    """Which calls were counted by what the device wrote."""

    def __init__(self, monkeypatch: Any) -> None:
        self.calls: list[bool] = []
        plain = Prepared.launch

        def launch(prepared: Prepared, written: list[torch.Tensor] | None = None) -> AttentionOutput:
            self.calls.append(written is not None)
            return plain(prepared, written)

        monkeypatch.setattr(Prepared, "launch", launch)


def the_first_of_like_calls_is_counted_and_a_sample_after(device: torch.device, monkeypatch: Any) -> None:
    """Rows of other lengths, or of another type, are no like calls; every launch of a ready call is none."""
    monkeypatch.setattr(flash_kernel, "COUNTED_EVERY", 3)
    asked = Asked(monkeypatch)
    x, flash = inputs(Case("sample", lengths=[[65, 1]], kv_heads=1), device), kernel(Case("sample"))
    results = [flash.attend(x.q, x.k, x.v, **x.more) for _ in range(5)]
    assert asked.calls == [True, False, False, True, False]
    assert all(same_bits(results[0], other) for other in results)
    assert results[1].launched is results[0].launched
    other = {**x.more, "kv_len": x.more["kv_len"] - 1}
    flash.attend(x.q, x.k, x.v, **other)
    flash.attend(x.q.float(), x.k.float(), x.v.float(), **x.more)
    assert asked.calls[5:] == [True, True]
    ready = flash.ready(checked_call(x.q, x.k, x.v, **x.more))
    assert ready.launched is results[-1].launched
    del asked.calls[:]
    ready.launch()
    assert asked.calls == [False]


def _ignores_its_plan(spoil: str, monkeypatch: Any, tmp_path: Path) -> None:
    """Device code or host code that does less than was planned."""
    if spoil == "device":
        line = "    tiles = (n_kv + BLOCK - 1) // BLOCK\n"
        _spoil_device(line, f"    parts, tiles_a_part = 1, 0\n{line}", monkeypatch, tmp_path)
        return
    _ignore_plans(monkeypatch)


def _spoil_device(line: str, spoilt_line: str, monkeypatch: Any, tmp_path: Path) -> None:
    folder = Path(flash_launch.__file__).parent
    sources = {name: (folder / f"{name}.py").read_text() for name in ("tile_rows", "device")}
    assert sum(source.count(line) for source in sources.values()) == 1
    for name, source in sources.items():
        # The kernels take the spoilt functions of the other file.
        text = source.replace(line, spoilt_line).replace("verify.kernels.flash.tile_rows", "spoilt_tile_rows")
        spoilt = tmp_path / f"spoilt_{name}.py"
        spoilt.write_text(text)
        spec = importlib.util.spec_from_file_location(spoilt.stem, spoilt)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spoilt.stem, module)
        spec.loader.exec_module(module)
    monkeypatch.setattr(flash_launch, "device_code", lambda: module)


def _ignore_plans(monkeypatch: Any) -> None:
    """The host asks the device for one part of every row."""
    plain = flash_kernel.prepare

    def prepare(*given: Any, **more: Any) -> Prepared:
        prepared = plain(*given, **more)
        for item in prepared.launches:
            item.parts, item.tiles_a_part = 1, 0
        return prepared

    monkeypatch.setattr(flash_kernel, "prepare", prepare)


def a_plan_that_did_not_run_is_not_what_it_says(
    spoil: str, device: torch.device, monkeypatch: Any, tmp_path: Path
) -> None:
    """The law `plan-runs` fails, and a diff is inconclusive: nothing but the baseline's path ran."""
    _ignores_its_plan(spoil, monkeypatch, tmp_path)
    for path, window in (("decode", None), ("prefill", None), ("decode", 70)):
        case = Case("ignored", plan=Plan(kv=KVCuts("parts", 3)), lengths=[[0, 64, 200]], path=path)
        x, flash = inputs(case, device), kernel(case)
        result = flash.attend(x.q, x.k, x.v, sliding_window=window, **x.more)
        cuts = {n_kv: signature.cuts for _, n_kv, signature in result.launched.rows}
        assert (cuts[0], cuts[200]) == ((0,), (0, 200))
        # A row is all that is seen of it: on the prefill path it had the parts of the longest of its tile.
        assert cuts[64] == (0, 64)
        assert flash.notes == [flash_kernel.NOT_THE_PLAN]
    subject = flash_subject(device)
    subject.small = device.type == "cpu"
    law = run_law(LAWS["plan-runs"], subject, examples=30, shrink=False)
    assert law.state == "broken" and "the trace says" in law.reason

    def build(spec: str) -> FlashKernel:
        return FlashKernel(spec, parse_tile_options(parse_spec(spec)))

    settings = DiffSettings(
        shapes=("2/1x16",),
        n_kvs=(130,),
        families=("gaussian", "needles"),
        baseline="flash",
        candidates=("flash:kv=2",),
        device=str(device),
    )
    clock = StageClock(device)
    outcome = diff.run_diff(settings, device, all_inputs(settings, device, clock), clock, build=build)
    reasons = outcome.candidates[0].reasons
    assert (outcome.verdict, outcome.exit_code) == ("inconclusive", 3), (outcome.verdict, reasons)
    assert "the path under test did not run" in reasons[0]


def parts_that_begin_elsewhere_are_not_the_plan(
    device: torch.device, monkeypatch: Any, tmp_path: Path
) -> None:
    """As many parts as were planned, the first of them a tile longer."""
    case = Case("elsewhere", plan=Plan(kv=KVCuts("parts", 3)), lengths=[[0, 200, 130]])
    x = inputs(case, device)
    right = kernel(case)
    result = right.attend(x.q, x.k, x.v, **x.more)
    assert {(n, s.cuts) for _, n, s in result.launched.rows} >= {(200, (0, 64, 128, 200)), (0, (0,))}
    assert right.notes == []
    _spoil_device(
        "first, end = part * tiles // count, (part + 1) * tiles // count",
        "first, end = (part * tiles + count - 1) // count, ((part + 1) * tiles + count - 1) // count",
        monkeypatch,
        tmp_path,
    )
    wrong = kernel(case)
    moved = wrong.attend(x.q, x.k, x.v, **x.more)
    assert float((moved.out - result.out).abs().max()) < 1e-3, "what is computed is as good"
    assert {s.cuts for _, n, s in moved.launched.rows if n == 200} == {(0, -1, -1, 200)}
    assert wrong.notes == [flash_kernel.NOT_THE_PLAN]


def of_the_largest_calls_the_first_sequences_are_counted(device: torch.device, monkeypatch: Any) -> None:
    """Rows that are like them are taken to be like them."""
    monkeypatch.setattr(flash_launch, "COUNTED_AT_ONCE", 1)
    case = Case("large", plan=Plan(kv=KVCuts("parts", 2)), lengths=[[65, 130], [130, 65], [65, 64]])
    x, flash = inputs(case, device), kernel(case)
    cuts = {n_kv: s.cuts for _, n_kv, s in flash.attend(x.q, x.k, x.v, **x.more).launched.rows}
    assert cuts == {64: (0, 64), 65: (0, 64, 65), 130: (0, 64, 130)}
    assert flash.notes == []
    _ignore_plans(monkeypatch)
    result = kernel(case).attend(x.q, x.k, x.v, **x.more)
    assert {(n_kv, s.cuts): rows for (_, n_kv, s), rows in result.launched.rows.items()} == {
        (64, (0, 64)): 1, (65, (0, 65)): 3, (130, (0, 130)): 2,
    }  # fmt: skip


def what_is_not_launched_is_not_counted(device: torch.device, monkeypatch: Any) -> None:
    """Only the first head group is launched: the heads of the other wrote no slot."""
    plain = flash_kernel.prepare

    def prepare(*given: Any, **more: Any) -> Prepared:
        prepared = plain(*given, **more)
        for item in prepared.launches:
            item.head_groups = item.head_groups[:1]
        return prepared

    monkeypatch.setattr(flash_kernel, "prepare", prepare)
    case = Case("half", lengths=[[65, 130]], plan=Plan(heads=(2, 1), kv=KVCuts("parts", 2)))
    x, flash = inputs(case, device), kernel(case)
    result = flash.attend(x.q, x.k, x.v, **x.more)
    assert {(s.head_groups, s.cuts) for _, n_kv, s in result.launched.rows if n_kv == 130} == {
        ((2,), (0, 64, 130))
    }
    assert bool(result.out[:, :, 2::3].isnan().all()), "what nothing wrote is no result"
    assert flash.notes == [flash_kernel.NOT_THE_PLAN]
