"""Gates of others: what their tests would have said of the same result on the same inputs.

Each gate looks at the whole result [B, T, Hq, Dv] against a reference and says yes or no. A gate is here to
be compared with, not to decide anything. Non-finite results fail every gate.

- llama.cpp, tests/test-backend-ops.cpp, test_flash_attn_ext::max_nmse_err and nmse():
  sum (x - y)^2 / sum x^2 <= 5e-4, where x is the result under test.
- FlashAttention, hopper/test_flash_attn.py, all in the input type: max |x - y| <= f max |plain - y|
  + 2 max |(y + 0.3) - 0.3 - y|, f = 2, or 3 with a softcap. tests/test_flash_attn.py has no second term (and
  for a KV cache 3 max |plain - y| + 1e-5): its reference is in the input type, so an ulp may make it fail.
- PyTorch, test/test_transformers.py, _check_equal and check_out_and_grad: max |x - y| <= max(1e-5,
  5 max |plain - y|). Tests that pass a factor of their own pass another.
- FlashInfer, tests of decode: assert_close(rtol=1e-3, atol=1e-3), in the input type.
- vLLM, tests/kernels/attention/test_attention.py: atol = 1e-3, rtol = 1e-5, in the input type.
- torch.testing.assert_close, its defaults (torch/testing/_comparison.py): atol 1e-5, and rtol 1e-3 for
  float16, 1.6e-2 for bfloat16, 1.3e-6 for float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from verify.kernels.call import Call
from verify.kernels.exact import finish_logits
from verify.kernels.sequences import sequences

NMSE_LIMIT = 5e-4
FUDGE_FACTOR = 5.0
_RTOL = {torch.float16: 1e-3, torch.bfloat16: 1.6e-2, torch.float32: 1.3e-6, torch.float64: 1e-7}


class GateCase(NamedTuple):
    """What gates look at: the result, the exact one, that of plain attention in the input type (all float64,
    [B, T, Hq, Dv]), the input type, and whether the call has a softcap."""

    out: torch.Tensor
    exact: torch.Tensor
    plain: torch.Tensor
    dtype: torch.dtype
    softcap: bool = False

    def in_type(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out and exact, rounded to the input type."""
        return self.out.to(self.dtype).double(), self.exact.to(self.dtype).double()


class Gate(NamedTuple):
    """name; rule in words; passes."""

    name: str
    rule: str
    passes: Callable[[GateCase], bool]


def nmse(out: torch.Tensor, exact: torch.Tensor) -> float:
    """sum (out - exact)^2 / sum exact^2; 0 where both are 0."""
    power = float(exact.double().square().sum())
    error = float((out.double() - exact).square().sum())
    return error / power if power else (0.0 if error == 0 else float("inf"))


def plain_attention(call: Call) -> torch.Tensor:
    """Attention as PyTorch's operators compute it in the input type, nothing wider: [B, T, Hq, Dv] float64.

    Queries times the scale, logits, softmax and result are each rounded to the type; the scale comes before
    the product, as in FlashAttention's attention_ref and in PyTorch's math form (which gives each operand its
    root): of float16, <q, k> itself may overflow. Needs B * T * Hq * S numbers.
    """
    shape, dtype = call.shape, call.q.dtype
    out = torch.zeros((*call.q.shape[:3], shape.v_size), dtype=torch.float64, device=call.q.device)
    heads = torch.arange(shape.q_heads, device=call.q.device).view(shape.kv_heads, shape.ratio)
    for sequence in sequences(call):
        rows, keys = len(sequence.q), len(sequence.k)
        positions = torch.arange(keys, device=call.q.device)
        scaled = (sequence.q.float() * call.scale).to(dtype).float()
        q = scaled.view(rows, shape.kv_heads, shape.ratio, shape.k_size).permute(1, 0, 2, 3)
        s = torch.einsum("htrd,shd->htrs", q, sequence.k.float()).to(dtype)
        mask = sequence.mask_of(slice(None), slice(0, keys), heads, kv_heads=shape.kv_heads)
        s = finish_logits(s.float(), sequence.kv_len.long(), positions, call, mask).to(dtype).float()
        if call.sinks is not None:
            sink = call.sinks.float().view(shape.kv_heads, 1, shape.ratio, 1)
            s = torch.cat((s, sink.expand(-1, rows, -1, 1)), -1)
        p = torch.softmax(s, -1).nan_to_num().to(dtype).float()[..., :keys]
        o = torch.einsum("htrs,shd->thrd", p, sequence.v.float()).to(dtype)
        out[sequence.at] = o.flatten(1, 2).double()
    return out


def compared(
    call: Call, out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor | None = None
) -> GateCase:
    """What the gates need, of a result and the exact one. plain: `plain_attention` of the call, if known."""
    plain = plain_attention(call) if plain is None else plain
    return GateCase(out.double(), exact, plain, call.q.dtype, call.softcap is not None)


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _llama_cpp(c: GateCase) -> bool:
    # As they call it: the result under test is what the error is relative to.
    return nmse(c.exact, c.out) <= NMSE_LIMIT


def _flash_attention(c: GateCase) -> bool:
    out, exact = c.in_type()
    typed = exact.to(c.dtype)
    rounding = _largest((typed + 0.3 - 0.3 - typed).double())
    factor = 3 if c.softcap else 2
    return _largest(out - exact) <= factor * _largest(c.plain - exact) + 2 * rounding


def _pytorch(c: GateCase) -> bool:
    return _largest(c.out - c.exact) <= max(1e-5, FUDGE_FACTOR * _largest(c.plain - c.exact))


def _close(c: GateCase, atol: float, rtol: float) -> bool:
    out, exact = c.in_type()
    return bool(((out - exact).abs() <= atol + rtol * exact.abs()).all())


GATES: tuple[Gate, ...] = (
    Gate("llama.cpp", "NMSE at most 5e-4", _llama_cpp),
    Gate(
        "FlashAttention",
        "largest error at most 2x that of plain attention, and its rounding",
        _flash_attention,
    ),
    Gate("PyTorch", f"largest error at most {FUDGE_FACTOR:g}x that of plain attention", _pytorch),
    Gate("FlashInfer", "atol = rtol = 1e-3", lambda c: _close(c, 1e-3, 1e-3)),
    Gate("vLLM", "atol = 1e-3, rtol = 1e-5", lambda c: _close(c, 1e-3, 1e-5)),
    Gate(
        "assert_close",
        "the defaults of torch.testing.assert_close",
        lambda c: _close(c, 1e-5, _RTOL[c.dtype]),
    ),
)


def verdicts(c: GateCase) -> dict[str, bool]:
    """Whether each gate passes the result."""
    finite = bool(torch.isfinite(c.out).all())
    return {gate.name: finite and gate.passes(c) for gate in GATES}
