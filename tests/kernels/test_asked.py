"""What is asked about the rows of a call: one record, made in one place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support.problems import problem
from verify.kernels.call import AttentionPath
from verify.kernels.flash.rows import plans_of_rows
from verify.kernels.heads import Heads
from verify.kernels.plans.asked import PREFILL_TOKENS, RowAsked
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.policy import policy_named


def test_a_call_asks_for_what_it_is() -> None:
    call = problem(rows=3, kv_heads=2, ratio=3, size=16)
    plain = call.asked()
    assert plain == RowAsked(Heads(6, 2, 16, 16)) == call.shape.asked("decode")
    one_each = torch.zeros(6)
    more = replace(call, sinks=one_each, alibi_slopes=one_each, sliding_window=2, path="prefill")
    assert more.asked("q8_0") == plain._replace(
        n_q=PREFILL_TOKENS, cache_type="q8_0", sinks=True, alibi=True, sliding_window=True
    )
    # Batch and number of rows never enter: a row alone follows the plan that it has in its batch.
    assert problem(rows=9, batch=2, kv_heads=2, ratio=3, size=16).asked() == plain


def test_heads_of_a_gpu_keep_their_ratio() -> None:
    heads = Heads(96, 8, 128, 64)
    assert (heads.ratio, heads.with_kv(2), str(heads)) == (12, Heads(24, 2, 128, 64), "96/8 x 128/64")


def test_the_plan_says_of_what_engine_it_is() -> None:
    """GPUs and split mode are the plan's; the row is asked about as it is."""
    row = RowAsked(Heads(96, 8, 128, 128), n_kv=16_384)
    graph = Plan(policy=policy_named("ik-1190"), gpus=8, split_mode="graph", kv=KVCuts("auto"))
    assert graph.at(row).head_groups == (4, 4, 4)
    assert replace(graph, gpus=1).at(row).head_groups == (8, 4)
    assert graph.cuts_of(row)(16_384) == graph.at(row).cuts


@pytest.mark.parametrize("policy", ["ik-2026-08", "mainline-2026-10", "ik-1192"])
@pytest.mark.parametrize("path", ["prefill", "decode"])
def test_rows_of_a_prompt_are_grouped_alike_whatever_their_length(policy: str, path: AttentionPath) -> None:
    """A prompt has many query tokens: what policies do for a few of them at some length is not for it."""
    asked = RowAsked(Heads(20, 1, 576, 512), n_q=1 if path == "decode" else PREFILL_TOKENS)
    lengths = (1, 5, 100, 2048, 9000, 20_000)
    rows = plans_of_rows(Plan(policy=policy_named(policy)), asked, lengths, len(lengths), 3)
    assert len(rows.plans) == len(lengths)
    assert path == "decode" or len(rows.kinds) == 1
