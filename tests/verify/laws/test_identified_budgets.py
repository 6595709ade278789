"""`verify props` reads kernels that state nothing: their budgets are those of what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support import right_kernels
from verify.identify import learning
from verify.kernels.foreign.function_kernel import FunctionKernel
from verify.laws import LAWS, LawBroken, Problem, subject_of

LAW = LAWS["within-budget"]
PROBLEM = Problem(n_kv=(300,), ratio=4, k_size=64, v_size=64, dtype="f16")


def attend(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float, by: float = 1.0) -> torch.Tensor:
    ratio = q.shape[2] // k.shape[2]
    s = scale * torch.einsum("bthd,bshd->bhts", q.float(), k.float().repeat_interleave(ratio, 2))
    s = s.masked_fill(torch.arange(k.shape[1]) >= kv_len[:, None, :, None], -torch.inf)
    p = torch.softmax(s, -1).nan_to_num()
    out = torch.einsum("bhts,bshd->bthd", p, v.float().repeat_interleave(ratio, 2))
    out[:, :, -1] *= by
    return out


def one_head_off(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> torch.Tensor:
    """2 % of one head: nothing to float16 sums of 300 keys, everything to float32's."""
    return attend(q, k, v, kv_len=kv_len, scale=scale, by=1.02)


def test_a_head_that_is_off_breaks_the_budget_that_is_read_off_the_kernel() -> None:
    assert LAW.check(subject_of(FunctionKernel(one_head_off)), PROBLEM) <= 1
    read = subject_of(FunctionKernel(one_head_off), identify=True)
    with pytest.raises(LawBroken):
        LAW.check(read, PROBLEM)
    assert any("read off it: P float32, sums float32" in note for note in read.kernel.notes)
    right = subject_of(FunctionKernel(attend), identify=True)
    assert LAW.check(right, PROBLEM) < 1
    known = right.kernel.arithmetic_of(PROBLEM.call("cpu"))
    assert known.identified and known.p == "f32"


def single_in_float16(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> torch.Tensor:
    """As engines that take another kernel for a single query token: only there is P in float16."""
    if q.shape[1] > 1:
        return attend(q, k, v, kv_len=kv_len, scale=scale)
    s = scale * torch.einsum("bthd,bshd->bhts", q.float(), k.float().repeat_interleave(q.shape[2], 2))
    s = s.masked_fill(torch.arange(k.shape[1]) >= kv_len[:, None, :, None], -torch.inf)
    p = torch.exp(s - s.amax(-1, keepdim=True).clamp(min=-1e30)).half().float()
    out = torch.einsum("bhts,bshd->bthd", p, v.float().repeat_interleave(q.shape[2], 2))
    return out / p.sum(-1).clamp(min=1e-30).transpose(1, 2)[..., None]


def test_a_single_query_token_has_a_reading_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "_ASKED_LENGTHS", (64,))
    subject = subject_of(FunctionKernel(single_in_float16), identify=True)
    problem = Problem(n_kv=(64, 45), kv_heads=1, ratio=2, k_size=32, v_size=32, dtype="bf16")
    assert LAWS["row-alone"].check(subject, problem) <= 1
    together = problem.call("cpu")
    alone = together.of_rows(torch.tensor([0]))
    assert [subject.kernel.arithmetic_of(call).p for call in (together, alone)] == ["f32", "f16"]


def test_only_a_few_kinds_of_calls_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "_MOST_ASKED", 2)
    monkeypatch.setattr(learning, "_ASKED_LENGTHS", (64,))
    right = subject_of(FunctionKernel(attend), identify=True).kernel
    calls = [Problem(n_kv=(20,), ratio=r, k_size=16, v_size=16).call("cpu") for r in (1, 2, 3, 4)]
    for _ in range(2):
        assert [right.arithmetic_of(call).identified for call in calls] == [True, True, False, False]


def test_calls_of_which_nothing_is_read_have_no_tighter_budget_than_those_that_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16 inputs are taken to be summed in float32: not by a kernel whose float16 sums were seen."""
    monkeypatch.setattr(learning, "_MOST_ASKED", 1)
    problem = Problem(family="denormal", n_kv=(1,), dtype="bf16")
    kernel = right_kernels.ggml_offset_float16_sums
    unseen = subject_of(FunctionKernel(kernel), identify=True)
    with pytest.raises(LawBroken):
        # The first kind of calls is another's, so that none of these is read.
        unseen.kernel.budgets_follow(lambda call: None)
        LAW.check(unseen, problem)
    seen = subject_of(FunctionKernel(kernel), identify=True)
    assert seen.kernel.arithmetic_of(Problem(n_kv=(40,)).call("cpu")).identified
    assumed = seen.kernel.arithmetic_of(problem.call("cpu"))
    assert not assumed.stated and assumed.acc == "f16"
    assert LAW.check(seen, problem) <= 1
