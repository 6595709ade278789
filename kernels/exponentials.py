"""e^x in place without the detour that a vector library takes for results that underflow.

MKL, torch's library on x86, computes e^x an element at a time where the result is no normal number, 0 among
them: 15 to 60 ns, beside 0.3 (float32) and 0.5 (float64). Softmax has many: where a row's logits lie far
apart, most weights are 0. And a subnormal weight slows every product that it enters, a hundred times or more.
"""

from __future__ import annotations

import math

import torch

# Of anything larger e^x is a normal number, and of no two numbers the same: float32 and float64.
LEAST_EXPONENTS = {torch.float32: -87.3, torch.float64: -600.0}
# Half the distance between such exponents: e^x of the next one is larger by more.
_HALF_A_STEP = {torch.float32: 3e-6, torch.float64: 5e-14}


def flushed_exp_(x: torch.Tensor) -> torch.Tensor:
    """x = e^x in place, but 0 where x is at most `LEAST_EXPONENTS` of its type: e^-87.3 = 1.2e-38 in float32,
    e^-600 = 2.7e-261 in float64. All others have the bits of `torch.exp_`; NaN stays NaN.

    x: float32 or float64, of any shape; returned. On a GPU, where nothing is slow, smaller results are kept.

    >>> flushed_exp_(torch.tensor([0.0, -100.0, -torch.inf])).tolist()
    [1.0, 0.0, 0.0]
    """
    least = LEAST_EXPONENTS[x.dtype]
    if x.is_cuda or not x.numel() or bool(x.amin() > least):
        return x.exp_()
    smallest = math.exp(float(torch.tensor(least, dtype=x.dtype)))
    found = x.clamp_min_(least).exp_()
    return torch.threshold_(found, smallest * (1 + _HALF_A_STEP[x.dtype]), 0.0)
