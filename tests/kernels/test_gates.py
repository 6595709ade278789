"""The gates of others, against results whose error is known."""

from __future__ import annotations

import math

import pytest
import torch

from verify.kernels.exact import exact_attention
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.gates import GATES, NMSE_LIMIT, compared, nmse, plain_attention, verdicts
from verify.kernels.judging.input_sizes import InputSizes

CALL = draw("gaussian", InputSizes(n_kv=(200, 65)), 0)
EXACT = exact_attention(CALL).out


def test_the_exact_result_passes_every_gate() -> None:
    assert verdicts(compared(CALL, EXACT, EXACT)) == {gate.name: True for gate in GATES}


def test_two_per_cent_pass_the_nmse_of_llama_cpp_and_three_do_not() -> None:
    """0.02^2 = 4e-4 lies under 5e-4: a kernel that is wrong by 2 % everywhere passes."""
    assert nmse(1.02 * EXACT, EXACT) == pytest.approx(4e-4)
    assert verdicts(compared(CALL, 1.02 * EXACT, EXACT))["llama.cpp"]
    assert not verdicts(compared(CALL, 1.03 * EXACT, EXACT))["llama.cpp"]
    assert NMSE_LIMIT == 5e-4


def test_elementwise_gates_at_their_tolerance() -> None:
    for gate, inside, outside in (
        ("FlashInfer", 5e-4, 3e-3),
        ("vLLM", 5e-4, 1.6e-3),
        ("assert_close", 0.0, 1e-3),
    ):
        for error, passes in ((inside, True), (outside, False)):
            assert verdicts(compared(CALL, EXACT + error, EXACT))[gate] is passes, (gate, error)


def test_the_error_of_plain_attention_is_the_limit_of_two_gates() -> None:
    typed = EXACT.half()
    plain = plain_attention(CALL)
    rounding = float((typed + 0.3 - 0.3 - typed).abs().max())
    # The error of one element, so that rounding it to float16 changes little.
    for gate, limit in (
        ("FlashAttention", 2 * float((plain - typed.double()).abs().max()) + 2 * rounding),
        ("PyTorch", 5 * float((plain - EXACT).abs().max())),
    ):
        for share, passes in ((0.8, True), (1.3, False)):
            out = EXACT.clone()
            out[0, 0, 0, 0] += share * limit
            assert verdicts(compared(CALL, out, EXACT))[gate] is passes, (gate, share)


def test_the_defaults_of_assert_close_are_torchs() -> None:
    from torch.testing._comparison import default_tolerances

    from verify.kernels.judging.gates import _RTOL

    for dtype, rtol in _RTOL.items():
        assert default_tolerances(dtype)[0] == rtol


def test_a_nan_fails_every_gate() -> None:
    out = EXACT.clone()
    out[0, 0, 0, 0] = math.nan
    assert not any(verdicts(compared(CALL, out, EXACT)).values())


# Logits of -12,800 lie 8 apart in float16: rounded to it, those of `massive` are no longer the same logits.
COARSE = {"massive": torch.float32}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_plain_attention_is_attention(family: str) -> None:
    dtype = COARSE.get(family, torch.float16)
    call = draw(family, InputSizes(n_kv=(100, 7, 0), dtype=dtype), 1)
    exact = exact_attention(call).out
    plain = plain_attention(call)
    assert torch.isfinite(plain).all()
    assert float((plain - exact).norm()) <= 0.03 * float(exact.norm())


def test_plain_attention_of_massive_logits_is_that_of_logits_rounded_to_float16() -> None:
    """<q, k> of -100,000 is Inf in float16, and all is lost; scaled first it is -12,800, to the next 8."""
    call = draw("massive", InputSizes(n_kv=(100, 7, 0)), 1)
    plain = plain_attention(call)
    shape = call.shape
    q = call.q.double().view(1, 3, shape.kv_heads, shape.ratio, -1)
    logits = call.scale * torch.einsum("bthrd,bshd->bthrs", q, call.k.double())
    assert float(logits[..., :100].mean()) == pytest.approx(-12800, rel=0.1)
    hidden = torch.arange(shape.keys) >= call.kv_len.view(1, 3, 1, 1, 1)
    p = torch.softmax(logits.half().double().masked_fill(hidden, -torch.inf), -1).nan_to_num()
    rounded = torch.einsum("bthrs,bshd->bthrd", p, call.v.double()).flatten(2, 3)
    assert float((plain - rounded).norm()) <= 0.03 * float(rounded.norm())
    exact = exact_attention(call).out
    assert float((plain - exact).norm()) > 0.3 * float(exact.norm())
