"""Our CUDA kernel's arithmetic, read off it by q, k, v and out alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from verify.kernels.heads import Heads
from verify.kernels.identify.asking import Regime
from verify.kernels.identify.reading import read
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.kernel import Kernel
from verify.kernels.plans.spec import parse_spec
from verify.kernels.registry import build_kernel

pytestmark = pytest.mark.cuda

N_KV = 700
TYPES = ("f16", "bf16", "f32")
SPECS = [
    *(f"flash:p={p},acc={acc},out={out},kv=2"
      for p, acc, out in itertools.product(TYPES, ("f32", "f16"), TYPES)),
    *(f"flash:block={block},acc={acc}" for block, acc in itertools.product((16, 32, 128), ("f32", "f16"))),
    *(
        f"flash:p={p},out=f16,block=32,kv={kv}"
        for p, kv in itertools.product(TYPES, ("3", "size:128", "auto"))
    ),
    *(f"flash:kv=3,heads={heads}" for heads in ("3+1", "split", "2+2")),
]  # fmt: skip


def nameless(kernel: Kernel) -> Any:
    """The kernel as a callable that says nothing of itself."""

    def attend(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> torch.Tensor:
        return kernel.attend(q, k, v, kv_len=kv_len, scale=scale).out

    return attend


@pytest.mark.parametrize("spec", SPECS)
def test_what_it_computes_is_read(spec: str) -> None:
    kernel, regime = build_kernel(spec), Regime(N_KV, device="cuda")
    assert kernel.notes == []
    options = {"p": "f16", "acc": "f32", "out": "f32", "block": "64"} | dict(parse_spec(spec).options)
    call = draw("gaussian", InputSizes(n_kv=(N_KV,), heads=Heads(8, 2, 64, 64), edges=()), 0, device="cuda")
    cuts_at = kernel.arithmetic_of(call).cuts_at
    assert cuts_at is not None
    cuts = tuple(cuts_at(N_KV))
    block = int(options["block"])
    longest = max(b - a for a, b in itertools.pairwise(cuts))
    found = read(nameless(kernel), regime)
    seen = {"p": found.p, "acc": found.accumulator, "out": found.result, "cuts": found.cuts,
            "offset": found.offset}  # fmt: skip
    due = {"p": options["p"], "acc": options["acc"], "out": options["out"], "cuts": cuts,
           "offset": 0.0}  # fmt: skip
    assert seen == due
    tile = block if longest > block else None
    if (options["p"], options["acc"]) == ("f32", "f32"):
        # Nothing is rounded that could show over which keys a maximum is taken: ends of products show alone.
        assert found.tile is None and block % (found.mma_block or 1) == 0
    elif options["p"] == "f32":
        assert found.tile in (tile, None)
    else:
        assert (found.tile, found.tile_order) == (tile, None if tile is None else "forward")
