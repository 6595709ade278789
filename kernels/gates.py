"""Gates of others: what their tests would have said of the same result on the same inputs.

Each gate looks at the whole result [B, T, Hq, Dv] against a reference and says yes or no. A gate is here to
be compared with, not to decide anything. Non-finite results fail every gate.

- llama.cpp: test-backend-ops, normalised mean square error sum (x - y)^2 / sum y^2 <= 5e-4.
- FlashAttention: largest error at most twice that of plain attention in the input type, both against plain
  attention in a wider type.
- PyTorch: tests of scaled dot-product attention take as tolerance a fudge factor times the error of plain
  attention in the input type, and no less than that type's defaults.
- vLLM, FlashInfer: |x - y| <= 1e-3 + 1e-3 |y|, in the input type.
- torch.testing.assert_close: |x - y| <= 1e-5 + 1e-3 |y| for float16 (1.6e-2 for bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels.contract import Call
from kernels.exact import finish_logits

NMSE_LIMIT = 5e-4
# Fudge factors in PyTorch's tests differ by test; this is a usual one for the output.
FUDGE_FACTOR = 4.0
_DEFAULTS = {  # atol, rtol of PyTorch's attention tests
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1e-3, 1.6e-2),
    torch.float32: (1e-5, 1.3e-6),
    torch.float64: (1e-7, 1e-7),
}


class Compared(NamedTuple):
    """What gates look at: the result, the exact one, that of plain attention in the input type (all float64,
    [B, T, Hq, Dv]), and the input type."""

    out: torch.Tensor
    exact: torch.Tensor
    plain: torch.Tensor
    dtype: torch.dtype


class Gate(NamedTuple):
    """name; rule in words; passes."""

    name: str
    rule: str
    passes: Callable[[Compared], bool]


def nmse(out: torch.Tensor, exact: torch.Tensor) -> float:
    """sum (out - exact)^2 / sum exact^2; 0 where both are 0."""
    power = float(exact.double().square().sum())
    error = float((out.double() - exact).square().sum())
    return error / power if power else (0.0 if error == 0 else float("inf"))


def plain_attention(call: Call) -> torch.Tensor:
    """Attention as PyTorch's operators compute it in the input type, nothing wider: [B, T, Hq, Dv] float64.

    Logits, softmax and result are each rounded to the type. Needs B * T * Hq * S numbers.
    """
    shape, dtype = call.shape, call.q.dtype
    out = torch.zeros((*call.q.shape[:3], shape.v_size), dtype=torch.float64, device=call.q.device)
    positions = torch.arange(shape.keys, device=call.q.device)
    for b in range(shape.batch):
        q = call.q[b].float().view(shape.rows, shape.kv_heads, shape.ratio, -1).permute(1, 0, 2, 3)
        s = torch.einsum("htrd,shd->htrs", q, call.k[b].float()).to(dtype) * call.scale
        s = finish_logits(s.float(), call.kv_len[b].long(), positions, call).to(dtype).float()
        if call.sinks is not None:
            sink = call.sinks.float().view(shape.kv_heads, 1, shape.ratio, 1)
            s = torch.cat((s, sink.expand(-1, shape.rows, -1, 1)), -1)
        p = torch.softmax(s, -1).nan_to_num().to(dtype).float()[..., : shape.keys]
        o = torch.einsum("htrs,shd->thrd", p, call.v[b].float()).to(dtype)
        out[b] = o.flatten(1, 2).double()
    return out


def compared(call: Call, out: torch.Tensor, exact: torch.Tensor) -> Compared:
    """What the gates need, of a result and the exact one."""
    return Compared(out.double(), exact, plain_attention(call), call.q.dtype)


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _flash_attention(c: Compared) -> bool:
    return _largest(c.out - c.exact) <= 2 * _largest(c.plain - c.exact) + 1e-5


def _pytorch(c: Compared) -> bool:
    atol, rtol = _DEFAULTS[c.dtype]
    deviation = (c.exact - c.plain).abs()
    relative = (deviation / c.exact.abs()).nan_to_num(nan=rtol)
    atol = FUDGE_FACTOR * max(_largest(deviation), atol)
    worst = _largest(relative)
    # Where an exact 0 makes the relative error infinite, the type's default is taken.
    rtol = FUDGE_FACTOR * max(worst if worst < 1e30 else rtol, rtol)
    return _close(c, atol, rtol, rounded=False)


def _close(c: Compared, atol: float, rtol: float, *, rounded: bool = True) -> bool:
    out, exact = c.out, c.exact
    if rounded:
        out, exact = out.to(c.dtype).double(), exact.to(c.dtype).double()
    return bool(((out - exact).abs() <= atol + rtol * exact.abs()).all())


GATES: tuple[Gate, ...] = (
    Gate("llama.cpp", "NMSE at most 5e-4", lambda c: nmse(c.out, c.exact) <= NMSE_LIMIT),
    Gate("FlashAttention", "largest error at most 2x that of plain attention", _flash_attention),
    Gate("PyTorch", f"{FUDGE_FACTOR:g}x the error of plain attention, element by element", _pytorch),
    Gate("vLLM, FlashInfer", "atol = rtol = 1e-3", lambda c: _close(c, 1e-3, 1e-3)),
    Gate(
        "assert_close",
        "the defaults of torch.testing.assert_close",
        lambda c: _close(c, 1e-5, {torch.bfloat16: 1.6e-2, torch.float16: 1e-3}.get(c.dtype, 1.3e-6)),
    ),
)


def verdicts(c: Compared) -> dict[str, bool]:
    """Whether each gate passes the result."""
    finite = bool(torch.isfinite(c.out).all())
    return {gate.name: finite and gate.passes(c) for gate in GATES}
