"""On a GPU the host goes ahead of the device: what nothing waits for; and a window whose steps are a call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from verify.arms.arm import Arm, kernel_call
from verify.arms.own_error import InPlace, Measured
from verify.arms.sample import Sample
from verify.kernels.bits import same_bits
from verify.kernels.exact import exact_attention
from verify.kernels.formed import CallForm, FormedKernel
from verify.kernels.lengths import keep_lengths
from verify.kernels.registry import build_kernel
from verify.kernels.trace import RowKind
from verify.kernels.transfers import Download, uploaded
from verify.model.architectures.architecture import AttentionSettings
from verify.model.layer_call import LayerCall

pytestmark = pytest.mark.cuda

WINDOWS, ROWS = 2, 700
SPECS = {"baseline": "flash", "candidate": "flash:heads=2+1,kv=4"}


@contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def layer_call(layer: int, device: str) -> LayerCall:
    draw = torch.Generator().manual_seed(layer)
    q, k, v = (torch.randn(WINDOWS, ROWS, heads, 64, generator=draw).half().to(device) for heads in (9, 3, 3))
    kv_len = torch.arange(1, ROWS + 1, dtype=torch.int32, device=device).expand(WINDOWS, -1).contiguous()
    return LayerCall(
        layer=layer, window=0, q=q, k=k, v=v, kv_len=keep_lengths(kv_len), settings=AttentionSettings(0.125)
    )


def measured(call: LayerCall, outs: dict[str, torch.Tensor]) -> list[Measured]:
    found = []
    for role, spec in SPECS.items():
        arm = Arm(role, role, spec, "decode", build_kernel(spec))
        whole = kernel_call(call, "decode")
        exact = exact_attention(whole).out
        error = outs[role].to(exact.device).double() - exact
        found.append(
            Measured(arm=arm, own=whole, alone=False, exact=exact, given=exact, errors={role: error})
        )
    return found


def test_numbers_travel_without_waiting() -> None:
    device = torch.device("cuda")
    with nothing_waits():
        there = uploaded([3, 1, 2], device, torch.int64)
        back = Download(there * 2)
    assert back.numbers() == [6, 2, 4]


def test_evidence_in_place_waits_for_nothing_and_is_the_cpus() -> None:
    tables = {}
    layers = range(3)
    on_gpu = {layer: layer_call(layer, "cuda") for layer in layers}
    outs = {
        layer: {role: build_kernel(spec).run(kernel_call(call, "decode")).out for role, spec in SPECS.items()}
        for layer, call in on_gpu.items()
    }
    for device in ("cuda", "cpu"):
        calls = on_gpu if device == "cuda" else {layer: layer_call(layer, "cpu") for layer in layers}
        of = {layer: measured(call, outs[layer]) for layer, call in calls.items()}
        in_place = InPlace(Sample(WINDOWS, at_once=WINDOWS), at_once=WINDOWS)
        # The first one makes what is kept from then on.
        in_place(calls[0], of[0])
        if device == "cuda":
            with nothing_waits():
                in_place(calls[1], of[1])
                in_place(calls[2], of[2])
        else:
            in_place(calls[1], of[1])
            in_place(calls[2], of[2])
        tables[device] = in_place.table()
    for name in tables["cpu"].column_names:
        mine, its = (tables[device][name].to_numpy() for device in ("cuda", "cpu"))
        if mine.dtype.kind == "f":
            np.testing.assert_allclose(mine, its, rtol=1e-6, atol=1e-12, err_msg=name)
        else:
            assert (mine == its).all(), name


@pytest.mark.parametrize("form", [CallForm(n_q=4), CallForm(n_q=3, page=16)], ids=str)
@pytest.mark.parametrize("spec", ["flash", "flash:heads=2+1,kv=4", "flash:kv=auto", "flash:cache=q8_0"])
def test_steps_side_by_side_are_the_steps_one_by_one(
    form: CallForm, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kernel_call(layer_call(0, "cuda"), "decode")
    kernel = FormedKernel(build_kernel(spec), form)
    together = kernel.run(whole)
    monkeypatch.setattr(kernel.inner, "as_if_alone", False)
    apart = kernel.run(whole)
    assert same_bits(together.out, apart.out) and same_bits(together.lse, apart.lse)
    plans = (_without_binaries(result.launched.rows) for result in (together, apart))
    assert next(plans) == next(plans)


def _without_binaries(rows: Mapping[RowKind, int]) -> Counter[RowKind]:
    """How parts are combined is compiled for how many the longest row of a call has."""
    found: Counter[RowKind] = Counter()
    for (path, n_kv, signature), count in rows.items():
        found[path, n_kv, signature._replace(binary="")] += count
    return found
