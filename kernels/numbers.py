"""The types of numbers, one table: what they are called, and what rounding to them costs.

u, tau, digits and least are those of IEEE 754 (binary16, binary32) and of bfloat16, which is the upper half
of a binary32. What tensor cores do is as measured on an H100 (`docs/numerics.md`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    # What types there are is told without torch.
    import torch


class FloatType(NamedTuple):
    """A type of numbers, and what a result that is rounded to it may lose beside what its sums lost."""

    name: str  # as specifications write it: f16
    torch_name: str  # as torch, numpy and Triton write it: float16
    bits: int  # that a number takes
    digits: int  # of the mantissa, the leading 1 left out
    least: int  # exponent of the smallest subnormal number
    u: float  # unit roundoff, relative
    tau: float  # half the smallest subnormal number: what underflow may lose
    largest: float = math.inf  # the largest finite number, of types that saturate there

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype


FLOAT_TYPES: dict[str, FloatType] = {
    kind.name: kind
    for kind in (
        FloatType(name="f16", torch_name="float16", bits=16, digits=10, least=-24, u=2.0**-11, tau=2.0**-25),
        FloatType(
            name="bf16", torch_name="bfloat16", bits=16, digits=7, least=-133, u=2.0**-8, tau=2.0**-134
        ),
        # Rounding to float32 is counted with the accumulators; below 2^-149 nothing is left to lose.
        FloatType(name="f32", torch_name="float32", bits=32, digits=23, least=-149, u=0.0, tau=0.0),
    )
}
# Types of 8 bits (OCP 8-bit floating point, 2023). Casts saturate. Numbers of them have a scale beside them.
FP8_TYPES: dict[str, FloatType] = {
    kind.name: kind
    for kind in (
        FloatType(
            name="e4m3", torch_name="float8_e4m3fn", bits=8, digits=3, least=-9, u=2.0**-4, tau=2.0**-10,
            largest=448.0,
        ),
        FloatType(
            name="e5m2", torch_name="float8_e5m2", bits=8, digits=2, least=-16, u=2.0**-3, tau=2.0**-17,
            largest=57344.0,
        ),
    )
}  # fmt: skip
# What P may be rounded to.
NUMBER_TYPES = {**FLOAT_TYPES, **FP8_TYPES}
# Powers of two that P, which is at most 1, is multiplied by before it becomes fp8, so that it fills the type:
# 2^8 of 448 is what FlashAttention 3 does for e4m3.
P_SCALES = {"e4m3": 2.0**8, "e5m2": 2.0**15}
# Unit roundoff of float32 sums: of units that round to nearest, and of tensor cores, which truncate.
U_F32 = 2.0**-24
U_F32_TENSOR_CORE = 2.0**-23
# P leaves the exponential as float32, whose subnormals a GPU's fast exponential turns into 0: whatever type
# it is rounded to afterwards, this much of it may be lost.
EXP_UNDERFLOW = 2.0**-126
# Keys that one matrix instruction adds up before its accumulator is rounded.
MMA_KEYS = 16
# Roundings that a float32 accumulator of tensor cores is charged for each of them: one of the sum, and one
# for all that is truncated of the products.
MMA_ROUNDINGS = 2
# Bits that a tensor core keeps below the accumulator's last place while it adds the products of one
# instruction: products are truncated there.
MMA_GUARD_BITS = 2


def type_of(dtype: torch.dtype) -> FloatType | None:
    """The type of numbers that torch calls so, None where the table has none."""
    return next((kind for kind in FLOAT_TYPES.values() if str(dtype) == f"torch.{kind.torch_name}"), None)
