"""Budgets of some rows of several sequences at once: those of each sequence by itself."""

from __future__ import annotations

import pytest
import torch

from verify.arms.own_error import _as_one_sequence
from verify.kernels.budget.bound import error_budgets
from verify.kernels.call import Call
from verify.kernels.exact import exact_attention
from verify.kernels.registry import build_kernel

T, S, HQ, HKV, D = 24, 24, 4, 2, 16
ROWS = torch.tensor([0, 5, 11, 23])


def call_of(batch: int, form: str) -> Call:
    draw = torch.Generator().manual_seed(batch)

    def tensor(heads: int) -> torch.Tensor:
        return torch.randn((batch, T, heads, D), generator=draw)

    lengths = torch.arange(1, T + 1, dtype=torch.int32).expand(batch, T).contiguous()
    forms = {}
    if "keys" in form:
        # Each row's choice of up to six of the keys before it, another one in each sequence.
        order = torch.rand((batch, T, S), generator=draw).masked_fill(
            torch.arange(S) >= lengths[..., None], -1
        )
        chosen = order.topk(6, -1)
        forms["keys"] = torch.where(chosen.values < 0, -1, chosen.indices).int()
    if "mask" in form:
        seen = torch.rand((batch, 1, T, S), generator=draw) < 0.7
        forms["mask"] = seen | (torch.arange(S) == torch.arange(T)[:, None])
    return Call(
        q=tensor(HQ), k=tensor(HKV), v=tensor(HKV), kv_len=lengths, scale=D**-0.5, path="decode", **forms
    ).checked()


@pytest.mark.parametrize("form", ["plain", "keys", "mask", "keys and mask"])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_judged_by_their_own_keys(batch: int, form: str) -> None:
    call = call_of(batch, form)
    kernel = build_kernel("eager")
    one = _as_one_sequence(call, ROWS)
    (together,) = error_budgets(one, [kernel.arithmetic_of(call)])
    out = exact_attention(one).out.view(len(ROWS), batch, HQ, D).transpose(0, 1)
    assert torch.allclose(out, exact_attention(call).out[:, ROWS], atol=1e-12)
    (apart,) = error_budgets(call.of_rows(ROWS), [kernel.arithmetic_of(call)])
    bounds = together.bound.view(len(ROWS), batch, HQ, D).transpose(0, 1)
    ratio = bounds / apart.bound
    # A mask in a list's place counts the keys that it hides: a little larger, never smaller.
    assert ratio.min() > 1 - 1e-9
    assert ratio.max() < (1.001 if batch == 1 or form == "plain" else 1.5)
