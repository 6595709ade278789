"""Checks of cheats that need a GPU, each with a kernel that it catches, and a right one."""

from __future__ import annotations

import pytest
import torch

from support.cheats import planted
from verify.kernels.foreign.cheats import CHEATS, bench_of, snapshot
from verify.kernels.foreign.forms import Wanted, form_of, plain_softmax

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def caught(function: object) -> dict[str, str]:
    form = form_of(function, "kernel", Wanted())  # type: ignore[arg-type]
    bench = bench_of(
        form, plain_softmax, snapshot(), sizes=[2, 3, 65, 4, 2, 64], dtype="float16", device="cuda"
    )
    said = {name: cheat.check(bench) for name, cheat in CHEATS.items()}
    return {name: each for name, each in said.items() if each is not None}


def test_a_right_kernel_passes_every_check() -> None:
    assert caught(planted.right) == {}


def test_a_result_that_is_computed_elsewhere_is_not_complete() -> None:
    side = torch.cuda.Stream()

    def on_another_stream(q, k, v, *, kv_len, scale):  # type: ignore[no-untyped-def]
        out = torch.zeros_like(q)
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            out.copy_(planted.right(q, k, v, kv_len=kv_len, scale=scale))
        return out

    found = caught(on_another_stream)
    assert {"two-streams", "late-writes"} & set(found), found


def test_a_graph_that_keeps_what_it_was_captured_with_is_seen() -> None:
    kept: list[torch.Tensor] = []

    def keeps_its_first(q, k, v, *, kv_len, scale):  # type: ignore[no-untyped-def]
        if torch.cuda.is_current_stream_capturing():
            return kept[0] + 0
        out = planted.right(q, k, v, kv_len=kv_len, scale=scale)
        kept[:] = [out.clone()]
        return out

    assert "cuda-graph" in caught(keeps_its_first)
