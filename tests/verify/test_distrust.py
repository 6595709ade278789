"""`verify judge`: every planted cheat is caught by its name, and right kernels pass."""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from support import right_kernels
from support.cheats import planted
from support.mypkg import ops
from support.named import named
from verify.distrust.judging import Judged, _checks, in_the_form_of, input_type, judge, kernel_of_file
from verify.distrust.told import print_judged
from verify.kernels.foreign.cheats import CHEATS, bench_of, snapshot
from verify.kernels.foreign.forms import Wanted, form_of, plain_softmax
from verify.kernels.heads import Heads
from verify.machine.errors import UsageError

CHEATS_DIR = Path(__file__).parents[1] / "support/cheats"
PLANTED = CHEATS_DIR / "planted.py"
ON_CUDA = {"cuda-graph", "two-streams"}


def caught(spec: str, reference: str | None = None, dtype: str = "f16") -> dict[str, str]:
    """In a process of its own, as the command has it."""
    results, _ = _checks(spec, reference, dtype, "cpu", None, lambda name: None, is_right=True)
    assert [r.name for r in results] == list(CHEATS)
    assert {r.name for r in results if r.state == "not run"} >= ON_CUDA
    return {r.name: r.said for r in results if r.state == "caught"}


def caught_here(function: Any, wanted: Wanted | None = None, dtype: str = "float16") -> dict[str, str]:
    """In this process, which is faster."""
    before = snapshot()
    form = form_of(function, "kernel", wanted or Wanted())
    bench = bench_of(form, plain_softmax, before, sizes=[2, 3, 65, 4, 2, 64], dtype=dtype, device="cpu")
    said = {name: cheat.check(bench) for name, cheat in CHEATS.items() if not cheat.cuda}
    return {name: each for name, each in said.items() if each is not None}


ALONE = [
    "output_aliases_input", "writes_inputs", "zeros", "remembered_by_pointer", "remembered_by_shape",
    "remembered_by_seed", "remembered_by_value", "replays", "result_overwritten", "late_writes",
    "unwritten_memory", "reads_the_stack", "globals_changed", "random_state",
]  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_a_planted_cheat_is_caught_by_its_name(name: str) -> None:
    threads = torch.get_num_threads()
    try:
        found = caught_here(getattr(planted, name))
    finally:
        torch.set_num_threads(threads)
    assert name.replace("_", "-") in found, found


@pytest.mark.parametrize(
    ("file", "name", "dtype", "check"),
    [
        ("patches_torch.py", "attend", "f16", "torch-patched"),
        ("planted.py", "downcast", "f32", "downcast"),
        ("planted.py", "looks_through_all_objects", "f16", "reads-the-stack"),
        ("planted.py", "dies_when_replayed", "f16", "zeros"),
    ],
)
def test_others_are_caught_too(file: str, name: str, dtype: str, check: str) -> None:
    assert check in caught(f"py:{CHEATS_DIR / file}::{name}", dtype=dtype)


def test_every_check_has_a_cheat_that_it_catches() -> None:
    """But those that need a GPU: tests/cuda/test_distrust_cuda.py."""
    elsewhere = {"torch-patched", "downcast", "reference-storage"}
    assert {name.replace("_", "-") for name in ALONE} | elsewhere | ON_CUDA == set(CHEATS)


@pytest.mark.parametrize(
    ("function", "wanted", "dtype"),
    [
        (planted.right, Wanted(), "float16"),
        (planted.right, Wanted(), "float32"),
        (ops.attend, Wanted(), "bfloat16"),
        (ops.layer, Wanted(), "float16"),
        (ops.square, Wanted(layout="bhsd", mask="causal"), "float16"),
        (ops.packed, Wanted(mask="causal"), "float16"),
        (ops.takes_a_mask, Wanted(), "float16"),
        (F.scaled_dot_product_attention, Wanted(), "float16"),
        (torch.compile(ops.attend, backend="eager"), Wanted(), "float16"),
    ],
    ids=named,
)
def test_right_kernels_pass_every_check(function: Any, wanted: Wanted, dtype: str) -> None:
    assert caught_here(function, wanted, dtype) == {}


RIGHT = [
    name
    for name, x in vars(right_kernels).items()
    if inspect.isfunction(x) and list(inspect.signature(x).parameters)[:4] == ["q", "k", "v", "kv_len"]
    if name != "tiled" and not name.startswith("_")
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", RIGHT)
def test_no_right_kernel_of_the_table_is_called_a_cheat(name: str, dtype: str) -> None:
    """Those of docs/right-kernels.md, each rounding in its own way."""
    assert caught_here(getattr(right_kernels, name), None, dtype) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_of_the_table_are_at_most_degraded(name: str) -> None:
    found = whole(f"{CHEATS_DIR.parent / 'right_kernels.py'}::{name}")
    if found.outcome == "broken" and "float16_sums" in name:
        # Float16 sums without an offset do overflow near the largest number.
        assert all("NaN or Inf" in r or "only at inputs near-overflow" in r for r in found.reasons), (
            found.reasons
        )
        return
    assert found.outcome in ("passed", "degraded"), found.reasons


@pytest.mark.parametrize(
    ("kind", "check"),
    [("zeros", "zeros"), ("half", "downcast"), ("storage", "reference-storage"), ("right", "")],
)
def test_files_as_kernelbench_has_them(kind: str, check: str) -> None:
    spec, reference = kernel_of_file(str(CHEATS_DIR / f"benchmark_{kind}.py"))
    assert spec.endswith("::ModelNew") and reference == "Model"
    assert input_type(CHEATS_DIR / f"benchmark_{kind}.py") == "f32" if kind != "half" else True
    spec, shape = in_the_form_of(spec, "Model", None)
    assert "layout=bhsd,mask=none" in spec and shape == "4/4x64"
    heads = Heads(4, 4, 64, 64)
    results, _ = _checks(spec, reference, "f32", "cpu", None, lambda name: None, is_right=True, heads=heads)
    found = {r.name: r.said for r in results if r.state == "caught"}
    assert (check in found) if check else found == {}


def whole(target: str) -> Judged:
    return judge(target, n_kv=(40,), examples=3, device="cpu")


@pytest.mark.slow
def test_the_whole_of_it_on_a_right_kernel_and_a_wrong_one() -> None:
    """In the fast tests `verify judge` is run by test_ci.py, test_planned.py and test_schemas.py."""
    right = whole(f"{PLANTED}::right")
    assert (right.outcome, right.exit_code) == ("passed", 0), right.reasons
    assert right.seconds is not None and right.seconds > 0
    wrong = whole(f"{Path(ops.__file__).parent.parent / 'user_kernels.py'}::last_key_dropped")
    assert (wrong.outcome, wrong.exit_code, wrong.seconds) == ("broken", 1, None)
    assert any("key" in reason for reason in wrong.reasons)
    assert not [c for c in wrong.checks if c.state == "caught"]
    # Notes belong to the verdict, as everywhere.
    wrong.notes.append("one more thing")
    print_judged(wrong, out := io.StringIO())
    assert out.getvalue().index("verdict: broken") < out.getvalue().index("  note: one more thing")


@pytest.mark.slow
def test_a_cheat_is_named_before_what_else_is_wrong_and_is_not_timed() -> None:
    cheat = whole(f"{PLANTED}::zeros")
    assert (cheat.outcome, cheat.exit_code, cheat.seconds) == ("cheats", 1, None)
    assert cheat.reasons[0].startswith("zeros: its result is zero everywhere")


def test_a_reference_that_is_no_attention_is_refused(tmp_path: Path) -> None:
    text = (CHEATS_DIR / "benchmark_right.py").read_text()
    (tmp_path / "bench.py").write_text(text.replace("out = F.scaled", "out = 2 * F.scaled"))
    with pytest.raises(UsageError, match="Model is not attention of three tensors"):
        judge(str(tmp_path / "bench.py"))


def test_a_file_whose_kernel_is_not_known_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def mine(q, k, v):\n    return v\n")
    for target, said in (
        (tmp_path / "a.py", "which of mine is the kernel?"),
        (tmp_path / "b.py", "no such file"),
    ):
        with pytest.raises(UsageError, match=said):
            kernel_of_file(str(target))
    (tmp_path / "a.py").write_text("def attend(")
    with pytest.raises(UsageError, match="is no Python"):
        kernel_of_file(str(tmp_path / "a.py"))
