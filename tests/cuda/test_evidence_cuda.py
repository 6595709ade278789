"""Inputs, probes, budgets and the selftest on a GPU: what they are on the CPU, and what only fits there."""

from __future__ import annotations

import pytest
import torch

from verify.kernels.budget.bound import error_budget
from verify.kernels.faults import FAULTS
from verify.kernels.heads import Heads
from verify.kernels.judging.detectors import measure
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes import check, far_offsets, one_hot, standard_probes
from verify.kernels.registry import build_kernel
from verify.selftest import run_selftest

pytestmark = pytest.mark.cuda

# GLM-4.5-Air on one GPU.
GLM = Heads(96, 8, 128, 128)
SMALL = InputSizes(n_kv=(700, 663), edges=(64, 256, 640), heads=GLM)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_have_the_bits_that_they_have_on_the_cpu(family: str) -> None:
    here, there = (draw(family, SMALL, 3, device=device) for device in ("cpu", "cuda"))
    for name in ("q", "k", "v", "kv_len", "sinks", "alibi_slopes"):
        a, b = getattr(here, name), getattr(there, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b.cpu()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_are_what_they_are_on_the_cpu(family: str) -> None:
    arithmetic = build_kernel("eager:kv=3").arithmetic(draw(family, SMALL, 3).shape, "decode")
    here, there = (error_budget(draw(family, SMALL, 3, device=d), arithmetic) for d in ("cpu", "cuda"))
    for name, a, b in zip(here._fields, here, there, strict=True):
        if name == "vacuous":
            assert torch.equal(a, b.cpu())
            continue
        # Sums in another order: relative to the largest of each row, where terms cancel.
        size = a.abs().amax(-1, keepdim=True) if a.dim() == 4 else a.abs() + 1
        error = torch.where(a == b.cpu(), 0.0, (a - b.cpu()).abs() / size)
        assert float(error.max()) < 1e-9, name


@pytest.mark.parametrize("spec", ["flash", "flash:heads=8+4,kv=auto", "flash:acc=f16,kv=4", "eager:kv=2"])
@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_every_probe_of_the_large_shape(spec: str, path: str) -> None:
    kernel = build_kernel(spec)
    sizes = InputSizes(n_kv=(2500, 2463), edges=(64, 640, 1280), path=path, heads=GLM)
    for probe in standard_probes(sizes, device="cuda"):
        assert [str(failure) for failure in check(probe, kernel)] == []


@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_every_key_of_65536(path: str) -> None:
    """`benchmarks/evidence.py` says how long it takes."""
    sizes = InputSizes(n_kv=(65_536,), path=path, heads=GLM)
    probe = one_hot(sizes, device="cuda")
    assert probe.keys is not None
    assert len(probe.keys[..., 24:36].unique()) == 65_536
    assert [str(failure) for failure in check(probe, build_kernel("flash:kv=4"))] == []
    # One key that is not read, far from any cut: by name.
    probe.call.v[:, 40_000, 2] += 1
    failures = check(probe, build_kernel("flash:kv=4"))
    assert {(failure.key, failure.head // 12, failure.part) for failure in failures} == {(40_000, 2, 2)}


@pytest.mark.parametrize("family", ["gaussian", "one-sign", "needles", "near-overflow"])
@pytest.mark.parametrize("spec", ["flash", "flash:kv=auto"])
def test_a_long_row_errs_as_is_expected_of_truncating_accumulators(spec: str, family: str) -> None:
    call = draw(family, InputSizes(n_kv=(65_536, 65_500), heads=GLM), 0, device="cuda")
    kernel = build_kernel(spec)
    found = measure(call, kernel.run(call), kernel.arithmetic(call.shape, "decode"), distinct=True)
    assert found.rms <= found.rms_limit, found
    assert found.budget <= 1, found


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["flash", "flash:kv=16"])
def test_offsets_beyond_32_bits_are_followed(spec: str) -> None:
    need = 14 << 30
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB of device memory")
    assert check(far_offsets(InputSizes(heads=GLM), device="cuda"), build_kernel(spec)) == []


@pytest.mark.slow
def test_offsets_that_wrap_at_32_bits_are_seen() -> None:
    fault = next(f for f in FAULTS if f.name == "offset wraps at 2^31")
    assert check(
        far_offsets(InputSizes(heads=Heads.grouped(kv=8, ratio=2, k_size=64, v_size=64)), device="cuda"),
        fault.build(),
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_selftest() -> None:
    found = run_selftest(1, device="cuda")
    assert [s.name for s in found.missed] == []
    assert [s.name for s in found.false_alarms] == []
    assert all(not s.skipped for s in found.subjects)
