"""`ggml:`: the operator of two real builds, against the oracle and against each other."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from support.ggml_builds import ggml_library
from support.problems import problem
from verify.kernels.bits import same_bits
from verify.kernels.budget.bound import error_budget
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.catalogue import GGML_CACHES
from verify.kernels.errors import KernelFailure, SpecError
from verify.kernels.exact import exact_attention
from verify.kernels.foreign import process, worker
from verify.kernels.foreign.ggml_kernel import GgmlKernel
from verify.kernels.heads import Heads
from verify.kernels.judging.detectors import measure
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.plans.plan import Plan
from verify.kernels.registry import build_kernel
from verify.laws import subject_of

# The shape of GLM on one GPU of eight: 12 query heads over one KV head.
GLM = InputSizes(n_kv=(300, 256, 1), heads=Heads.grouped(kv=1, ratio=12, k_size=128, v_size=128))


@pytest.fixture(scope="module")
def kernels() -> Iterator[dict[str, GgmlKernel]]:
    """Kernels of both builds that were asked for, by options; closed at the end."""
    kept: dict[str, GgmlKernel] = {}
    yield kept
    for kernel in kept.values():
        kernel.close()


def kernel_of(kept: dict[str, GgmlKernel], build: str, options: str = "") -> GgmlKernel:
    key = build + options
    if key not in kept:
        built = build_kernel(f"ggml:lib={ggml_library(build)}{options}")
        assert isinstance(built, GgmlKernel)
        kept[key] = built
    return kept[key]


def relative_error(kernel: GgmlKernel, call: Call) -> float:
    """Of the output to exact, on the keys and values that the kernel's cache holds."""
    due = exact_attention(kernel.held(call)).out
    return float((kernel.run(call).out - due).norm() / due.norm())


@pytest.mark.parametrize("build", ["A", "B"])
@pytest.mark.parametrize("family", ["gaussian", "needles", "window", "softcap", "sinks"])
def test_it_is_attention_within_its_budget(kernels: dict[str, GgmlKernel], build: str, family: str) -> None:
    kernel = kernel_of(kernels, build)
    for path in ("decode", "prefill"):
        call = draw(family, replace(GLM, heads=GLM.heads.with_kv(2), path=path), 0)
        budget = error_budget(call, kernel.arithmetic(call.shape, call.path))
        result = kernel.run(call)
        assert bool(result.lse.isnan().all())
        found = measure(
            call,
            AttentionOutput(result.out, budget.lse),
            kernel.arithmetic(call.shape, call.path),
            distinct=FAMILIES[family].distinct,
            budget=budget,
        )
        # Float16 sums have no bound that says much at these lengths; a dropped key or a wrong head is far
        # beyond what they lose.
        assert found.budget <= 1 and found.nonfinite == 0
        assert found.relative < 0.01
        assert found.rms < found.rms_limit


# A type of ik_llama.cpp is not in these builds of mainline.
HERE = [cache for cache in GGML_CACHES if cache != "q6_0"]


@pytest.mark.parametrize("cache", [*HERE, "q8_0/q4_0", "q4_0/f16", "q4_0+rotate=mainline", "f16+rotate=32"])
def test_quantised_caches_are_attention_over_what_they_hold(
    kernels: dict[str, GgmlKernel], cache: str
) -> None:
    call = draw("gaussian", GLM, 0)
    kernel = kernel_of(kernels, "A", f",cache={cache}")
    held = kernel.held(call)
    budget = error_budget(held, kernel.arithmetic(call.shape, call.path))
    error = (kernel.run(call).out.double() - budget.out).abs()
    assert float((error / budget.bound).max()) <= 1
    # q is quantised to q8_0 as well: that is most of this error, and far less than the cache's own.
    assert relative_error(kernel, call) < 0.02
    if not cache.startswith("f16"):
        assert relative_error(kernel, call) < float(
            (budget.out - exact_attention(call).out).norm() / budget.out.norm()
        )


def test_two_builds_and_head_groups_agree_to_the_bit_and_say_what_ran(kernels: dict[str, GgmlKernel]) -> None:
    """On one thread a head's arithmetic depends neither on the build nor on the heads beside it."""
    call = draw("gaussian", replace(GLM, n_kv=(700,)), 0)
    a, b = kernel_of(kernels, "A"), kernel_of(kernels, "B")
    split = kernel_of(kernels, "A", ",heads=8+4")
    due = a.run(call).out
    results = {kernel.spec: kernel.run(call) for kernel in (b, split)}
    for result in results.values():
        assert same_bits(result.out, due)
    assert same_bits(a.run(replace(call, plan=Plan(heads=(8, 4)))).out, due)
    seen = {spec: {s for _, _, s in result.launched.rows} for spec, result in results.items()}
    assert {(s.head_groups, s.launch) for s in seen[b.spec]} == {((12,), "one")}
    assert {(s.head_groups, s.launch) for s in seen[split.spec]} == {((8, 4), "each")}
    assert a.binary != b.binary and len(a.binary) == 12
    assert split.binary == a.binary
    assert a.label.startswith("ggml 0.") and "CPU" in a.label


def test_threads_cut_the_keys_and_so_move_the_bits(kernels: dict[str, GgmlKernel]) -> None:
    call = draw("gaussian", replace(GLM, n_kv=(2000,)), 0)
    one, two = kernel_of(kernels, "A"), kernel_of(kernels, "A", ",threads=2")
    assert not same_bits(one.run(call).out, two.run(call).out)
    assert relative_error(two, call) < relative_error(one, call)


def test_float16_sums_lose_precision_as_the_row_grows(kernels: dict[str, GgmlKernel]) -> None:
    kernel = kernel_of(kernels, "A")
    short, long = (relative_error(kernel, draw("gaussian", replace(GLM, n_kv=(n,)), 0)) for n in (256, 4096))
    assert long > 2.5 * short
    quantised = kernel_of(kernels, "A", ",cache=q8_0")
    assert relative_error(quantised, draw("gaussian", replace(GLM, n_kv=(4096,)), 0)) < long


def summed(call: Call, head: int = 0, acc: type = np.float16) -> np.ndarray:
    """The first row as the CPU computes it: a key at a time, sums rounded to `acc`, divided at the end."""
    n, kv_head = int(call.kv_len[0, 0]), head // call.shape.ratio
    q = call.q[0, 0, head].float().numpy()
    k, v = (x[0, :n, kv_head].float().numpy() for x in (call.k, call.v))
    total, weight, top = np.zeros(v.shape[1], acc), np.float32(0), np.float32(-np.inf)
    for s, value in zip(k @ q * np.float32(call.scale), v, strict=True):
        rescale = p = np.float32(1)
        if s > top:
            rescale, top = np.exp(top - s), s
            total = (total * rescale).astype(acc)
        else:
            p = np.exp(s - top)
        total = (total + value * p).astype(acc)
        weight = weight * rescale + p
    return np.asarray(total / weight)


def test_the_cpu_adds_float16_values_in_float16_a_key_at_a_time(kernels: dict[str, GgmlKernel]) -> None:
    """The loop in NumPy gives its bits, far from exact: what stagnates is the library's sum, not our call."""
    call = draw("one-sign", replace(GLM, n_kv=(8192,)), 0)
    found = kernel_of(kernels, "A").run(call).out[0, 0, 0].numpy()
    due = exact_attention(call).out[0, 0, 0].numpy()
    # Other processors multiply and exponentiate in another order; the sum's own loss is 100 times that.
    assert np.linalg.norm(found - summed(call)) < 0.003 * np.linalg.norm(due)
    assert np.linalg.norm(found - due) > 0.3 * np.linalg.norm(due)


@pytest.mark.parametrize("build", ["A", "B"])
def test_large_values_overflow_in_its_float16_sums(kernels: dict[str, GgmlKernel], build: str) -> None:
    """Infinite where the loop in float16 is, and nowhere else; the same loop in float32 is attention."""
    kernel, infinite = kernel_of(kernels, build), 0
    for n in (1, 2, 64, 300):
        call = draw(
            "near-overflow",
            InputSizes(n_kv=(n,), heads=Heads.grouped(kv=1, ratio=2, k_size=64, v_size=64)),
            seed=n,
        )
        found, due = (x.out[0, 0].numpy() for x in (kernel.run(call), exact_attention(call)))
        for head in range(2):
            with np.errstate(over="ignore", invalid="ignore"):
                loop = summed(call, head)
            # Another processor's exp may round one sum in a hundred to the other side of 65504.
            assert (np.isinf(found[head]) != np.isinf(loop)).mean() < 0.02
            assert np.allclose(summed(call, head, np.float32), due[head], rtol=1e-3, atol=0)
            infinite += int(np.isinf(loop).sum())
        # What is due is a float16 number, and so are all values.
        assert np.abs(due).max() < 65504
        # A thousandth of the values, and nothing overflows.
        assert np.isfinite(kernel.run(replace(call, v=call.v / 1024)).out.numpy()).all()
    assert infinite


def test_a_row_that_sees_nothing_is_zero(kernels: dict[str, GgmlKernel]) -> None:
    call = problem(rows=3, size=64)
    empty = replace(call, kv_len=torch.tensor([[0, 2, 0]], dtype=torch.int32))
    found = kernel_of(kernels, "A").run(empty).out
    assert bool((found[0, [0, 2]] == 0).all()) and bool((found[0, 1] != 0).any())


def test_rows_and_sequences_are_told_apart(kernels: dict[str, GgmlKernel]) -> None:
    """More rows than one graph holds, and two sequences: each row has the bits it has alone."""
    kernel = kernel_of(kernels, "B")
    call = problem(batch=2, rows=40, size=64)
    together = kernel.run(call).out
    for b, t in ((0, 3), (1, 39)):
        alone = replace(
            call, q=call.q[b : b + 1, t : t + 1], k=call.k[b : b + 1], v=call.v[b : b + 1],
            kv_len=call.kv_len[b : b + 1, t : t + 1],
        )  # fmt: skip
        assert same_bits(kernel.run(alone).out[0, 0], together[b, t])


@pytest.mark.parametrize(
    ("options", "call", "said"),
    [
        ("", problem(rows=2, alibi_slopes=torch.ones(6)), "has no ALiBi slopes"),
        ("", problem(rows=2, dtype=torch.bfloat16), "has no dtype bfloat16"),
        (",cache=q8_0", problem(rows=2, size=80), "has no head size 80 .has multiples of 32"),
    ],
)
def test_what_it_lacks_is_refused(
    kernels: dict[str, GgmlKernel], options: str, call: Call, said: str
) -> None:
    with pytest.raises(KernelFailure, match=said) as caught:
        kernel_of(kernels, "A", options).run(call)
    assert caught.value.kind == "unsupported"


def test_head_groups_must_sum_to_the_ratio(kernels: dict[str, GgmlKernel]) -> None:
    call = problem(rows=2)
    with pytest.raises(ValueError, match="sums to 12, expected r = 3"):
        kernel_of(kernels, "A", ",heads=8+4").arithmetic(call.shape, "decode")


def other_machine(folder: Path) -> Path:
    """A library built for another processor: the machine in its header is changed."""
    found = folder / "other.so"
    shutil.copy(ggml_library("A"), found)
    with found.open("r+b") as file:
        file.seek(18)
        machine = int.from_bytes(file.read(2), "little")
        file.seek(18)
        file.write((62 if machine == 183 else 183).to_bytes(2, "little"))  # x86-64, AArch64
    return found


def test_libraries_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("not a library\n")
    other = importlib.util.find_spec("_ctypes")
    assert other is not None and other.origin is not None
    for spec, said in (
        ("ggml:", "expected ggml:lib=FILE"),
        ("ggml:lib=nowhere.so", "nowhere.so: no such file"),
        (f"ggml:lib={text}", "text.so does not load: (file too short|invalid ELF header)"),
        (f"ggml:lib={other_machine(tmp_path)}", r"built for another machine \(ELF machine \d+, this one is"),
        (f"ggml:lib={other.origin}", "lacks ggml_init and .* more: expected a shared library of llama.cpp"),
        (f"ggml:lib={ggml_library('A')},backend=cuda", "has no backend cuda, or finds no device for it"),
        (f"ggml:lib={ggml_library('A')},heads=8+x", "expected head groups such as 12, 8\\+4"),
        (f"ggml:lib={ggml_library('A')},cache=q4_1", "cache 'q4_1': unknown type 'q4_1', did you mean"),
    ):
        with pytest.raises(SpecError, match=said) as caught:
            build_kernel(spec)
        assert "\n" not in str(caught.value)


@pytest.fixture
def servant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that runs in the worker, here."""
    monkeypatch.setitem(sys.modules, "worker", worker)
    file = Path(process.__file__).with_name("ggml_servant.py")
    spec = importlib.util.spec_from_file_location("ggml_servant", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_library_of_the_same_names_and_another_meaning_is_refused(servant: Any) -> None:
    class Transposed:
        """As if the arguments had changed places: finite numbers, but not attention."""

        lib = SimpleNamespace(file="libggml.so")

        def __call__(self, x: Any, decode: bool) -> np.ndarray:
            return np.broadcast_to(x.v[:200].astype(np.float32).mean(0).repeat(2, 0), x.q.shape)

    with pytest.raises(worker.Refusal, match="something other than attention: another version"):
        servant.check_it_attends(Transposed())


def test_backends_that_are_loaded_at_run_time(servant: Any) -> None:
    """A build without ggml_backend_cpu_init is asked through its registry, threads included."""
    lib = servant.Library(str(ggml_library("A")))
    lib.ggml_backend_cpu_init = lib.ggml_backend_cpu_set_n_threads = None
    attention = servant.Attention(lib, lib.backend("cpu", 1), "f32")
    servant.check_it_attends(attention)
    assert math.isfinite(float(attention.precision))


def test_head_groups_of_their_own_are_a_subject_of_laws() -> None:
    """It is asked what it states at a ratio that its groups are for."""
    subject = subject_of(f"ggml:lib={ggml_library('A')},heads=2+1", identify=True)
    assert subject.capabilities.ratios == (3,)
    assert not isinstance(subject.first, Exception)
