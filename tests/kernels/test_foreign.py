from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.problems import problem
from verify.kernels.budget.bound import error_budget
from verify.kernels.errors import KernelFailure, MachineFailure, SpecError
from verify.kernels.exact import exact_attention
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.figures import budget_ratio
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel

FILE = Path(__file__).parents[1] / "support/user_kernels.py"


@pytest.mark.parametrize("function", ["good", "finds_our_packages"])
def test_a_right_kernel_agrees_with_exact(function: str) -> None:
    call = problem(batch=2, rows=20)
    kernel = build_kernel(f"py:{FILE}::{function}")
    for _ in range(2):
        result, oracle = kernel.run(call), exact_attention(call)
        assert (result.out - oracle.out).abs().max() < 1e-5
        assert sum(result.launched.rows.values()) == 2 * 20
    kernel.close()


def test_it_is_told_the_path_only_if_it_asks() -> None:
    call = problem(rows=5, path="prefill")
    kernel = build_kernel(f"py:{FILE}::says_its_path")
    assert (kernel.run(call).out - exact_attention(call).out - 1).abs().max() < 1e-5
    kernel.close()


@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        ("hangs,timeout=1", "hung", "no answer within 1 s"),
        ("dies", "died", "killed by SIGABRT"),
        ("raises", "raised", "RuntimeError: no such luck"),
        ("wrong_shape", "shape", "expected [1, 5, 6, 32]"),
        ("wrong_dtype", "dtype", "torch.int32"),
        ("writes_inputs", "wrote-inputs", "its input q"),
    ],
)
def test_every_way_to_fail_is_a_finding(function: str, kind: str, said: str) -> None:
    kernel = build_kernel(f"py:{FILE}::{function}")
    with pytest.raises(KernelFailure) as caught:
        kernel.run(problem(rows=5))
    assert caught.value.kind == kind
    assert said in str(caught.value)
    kernel.close()


def test_an_option_that_it_does_not_take_is_refused_not_ignored() -> None:
    kernel = build_kernel(f"py:{FILE}::good")
    with pytest.raises(KernelFailure, match="does not take sinks"):
        kernel.run(problem(rows=5, sinks=torch.zeros(6)))
    kernel.close()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("py:nowhere.py::f", "no such file"),
        (f"py:{FILE}", "expected py:FILE.py::FUNCTION"),
        (f"py:{FILE}::nothing", "has no function nothing"),
        (f"py:{FILE}::wrong_signature", "expected (q, k, v, *, kv_len, scale)"),
        (f"py:{FILE}::good,timeout=soon", "timeout=soon, expected a whole number"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(spec: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        build_kernel(spec)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ("os.closerange(3, 65536); time.sleep(600)", "hung", "did not end"),
        ("os.kill(os.getpid(), 40)", "died", "killed by signal 40"),
    ],
)
def test_odd_ways_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, kind: str, said: str
) -> None:
    monkeypatch.setattr("verify.kernels.foreign.process.END_LIMIT_S", 0.5)
    (tmp_path / "odd.py").write_text(f"import os, time\ndef f(q, k, v, *, kv_len, scale):\n    {body}\n")
    kernel = build_kernel(f"py:{tmp_path / 'odd.py'}::f")
    with pytest.raises(KernelFailure, match=said) as failed:
        kernel.run(problem())
    assert failed.value.kind == kind


def test_what_a_function_does_not_implement_is_no_failure_of_it(tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text(
        "import torch\ndef f(q, k, v, *, kv_len, scale):\n"
        "    raise NotImplementedError(f'head size {q.shape[-1]}')\n"
    )
    kernel = build_kernel(f"py:{tmp_path / 'some.py'}::f")
    with pytest.raises(KernelFailure, match="head size") as failed:
        kernel.run(problem())
    assert failed.value.kind == "unsupported"
    kernel.close()


def test_memory_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    kernel = build_kernel(f"py:{FILE}::good")
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(MachineFailure, match="bytes for its inputs cannot be had: No space left"):
        kernel.run(problem())
    kernel.close()


def test_a_file_that_does_not_import(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    with pytest.raises(SpecError, match="does not import: ModuleNotFoundError"):
        build_kernel(f"py:{broken}::f")


WORLD = FILE.with_name("world_kernels.py")


@pytest.mark.parametrize(
    ("form", "takes", "left_out"),
    [
        ("module", {"softcap"}, ""),
        ("behind_args", {"sliding_window"}, "softcap (TypeError)"),
        ("ignores_the_rest", {"sinks"}, "softcap (ignored)"),
        ("built_in", set(), "sinks (TypeError)"),
        ("operator", set(), "sinks (RuntimeError)"),
    ],
)
def test_what_a_callable_takes_is_found_by_asking_it(form: str, takes: set[str], left_out: str) -> None:
    """Every form of the same right kernel runs, and what it does not take is left out and said."""
    kernel = build_kernel(f"py:{WORLD}::{form}")
    has = kernel.capabilities()
    names = {"sliding_window": has.sliding_window, "softcap": has.softcap, "sinks": has.sinks}
    assert {name for name, taken in names.items() if taken} == takes and not has.alibi
    assert left_out in " ".join(kernel.notes) and bool(kernel.notes) == bool(left_out)
    call = problem(batch=2, rows=3)
    assert (kernel.run(call).out - exact_attention(call).out).abs().max() < 1e-3
    kernel.close()


def test_a_function_that_names_an_option_is_held_to_it() -> None:
    kernel = build_kernel(f"py:{WORLD}::ignores_sinks_by_name")
    assert kernel.capabilities().sinks and not kernel.notes
    kernel.close()


@pytest.mark.parametrize(("function", "out"), [("returns_f16", "f16"), ("returns_bf16", "bf16")])
def test_the_budget_is_that_of_the_type_that_came_back(function: str, out: str) -> None:
    call = problem(batch=1, rows=3)
    kernel = build_kernel(f"py:{WORLD}::{function},acc=f32")
    assert kernel.arithmetic_of(call).out == "f16"  # of float16 inputs, until it has run
    result = kernel.run(call)
    assert kernel.arithmetic_of(call).out == kernel.result_type(call) == out
    budget = error_budget(call, kernel.arithmetic_of(call))
    assert float(budget_ratio(result.out - budget.out, budget.bound).max()) <= 1
    kernel.close()


def test_that_no_budget_applies_is_said_once_with_what_to_add() -> None:
    short, long = (
        draw(
            "gaussian",
            InputSizes(n_kv=(n,), heads=Heads.grouped(kv=1, ratio=1, k_size=64, v_size=64), edges=()),
            0,
        )
        for n in (127, 128)
    )
    kernel = build_kernel(f"py:{WORLD}::plain")
    kernel.run(short)
    assert not kernel.notes
    for _ in range(2):
        kernel.run(long)
    (note,) = kernel.notes
    assert "from 128 keys on no rounding budget applies; add acc=f32" in note
    assert bool(error_budget(long, kernel.arithmetic_of(long)).vacuous.all())
    stated = build_kernel(f"py:{WORLD}::plain,acc=f32")
    stated.run(long)
    assert not stated.notes and not error_budget(long, stated.arithmetic_of(long)).vacuous.any()
    kernel.close()
    stated.close()


def test_a_p_of_another_type_than_the_inputs_is_stated() -> None:
    """P in bfloat16 over float16 inputs: right, and beyond what float16 may make of few keys."""
    right = FILE.parent / "right_kernels.py"
    call = problem(batch=2, rows=60)
    # Small logits, of which nothing but P is off by much.
    call = replace(call, q=call.q / 8)
    found = {}
    for stated in ("acc=f32", "acc=f32,p=bf16"):
        kernel = build_kernel(f"py:{right}::bf16_p,{stated}")
        result, arithmetic = kernel.run(call), kernel.arithmetic_of(call)
        budget = error_budget(call, arithmetic)
        found[stated] = float(budget_ratio(result.out.double() - budget.out, budget.bound).max())
        assert kernel.arithmetic(call.shape, "decode").p == arithmetic.p
        kernel.close()
    assert found["acc=f32"] > 1 > found["acc=f32,p=bf16"]
    with pytest.raises(SpecError, match="p=f8"):
        build_kernel(f"py:{right}::bf16_p,p=f8")
