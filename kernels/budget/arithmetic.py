"""The arithmetic model of a kernel: which roundings it makes, and how many additions deep they lie.

The error budget (`budget`) is a function of this record and of the inputs alone. Unit roundoffs are 2^-24 for
float32 that rounds to nearest and 2^-23 for tensor cores, which truncate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch

from verify.kernels.numbers import (
    EXP_UNDERFLOW,
    FLOAT_TYPES,
    MMA_GUARD_BITS,
    MMA_KEYS,
    NUMBER_TYPES,
    U_F32,
    U_F32_TENSOR_CORE,
    type_of,
)

# The largest offset on the maximum that a kernel is taken to have of which nothing is stated, in nats.
LARGEST_OFFSET = 3.0


class Depths(NamedTuple):
    """Roundings that one term can pass."""

    parts: int  # KV parts of the row
    tiles: int  # of its longest part
    d_l: int  # in the denominator
    d_n: int  # in the numerator
    d_m: int  # in the merge
    longest: int  # keys of its longest part
    summed: int  # of these, keys that one accumulator of the second product takes


@dataclass(frozen=True)
class Arithmetic:
    """Roundings of one kernel and plan. Unit roundoffs where nothing else is said."""

    p: str = "f16"  # type of P as it enters the second product
    out: str = "f32"  # type of the result
    acc: str = "f32"  # type of the output accumulators
    u: float = U_F32  # of float32 accumulators of both products
    u_q: float = 0.0  # rounding of q inside the kernel
    u_k: float = 0.0  # of k, likewise
    u_v: float = 0.0  # of v, likewise
    u_part: float = 0.0  # of stored partial results
    block: int | None = 64  # keys a tile; None: not known
    l_in_tiles: bool = True  # the denominator sums a block, then blocks; else keys in any order
    tile_order: str | None = "forward"  # in which a part's tiles are walked, or backward; None: not known
    # Part bounds of a row with n_kv keys; None: not known.
    cuts_at: Callable[[int], tuple[int, ...]] | None = None
    l_from_rounded_p: bool = False  # the denominator sums P after it was rounded
    p_shift: float = 0.0  # P is exp(s - m - p_shift), so that much sooner it underflows
    u_tanh: float = 2 * U_F32  # relative error of the softcap's tanh
    u_exp: float = 0.0  # relative error of the exponential, beyond the roundings of its argument
    stale_maximum: bool = False  # the running maximum may lag behind, so that the largest P is not 1
    q_blocks: bool = False  # q is quantised to blocks of q8_0 before the product
    # Roundings that a float32 accumulator of the second product passes for every MMA_KEYS keys, where it runs
    # on from tile to tile; 0: each tile is a product of its own, added to it.
    chained: int = 0
    # Keys whose products are summed before a narrow accumulator is rounded.
    sum_step: int = MMA_KEYS
    # The share of a part's keys that one accumulator takes: less than 1 where threads take every so many keys
    # and are merged afterwards.
    sum_share: float = 1.0
    # Matrix products that a tile of P and V takes, each of which rounds that accumulator; more than one where
    # an operand is split.
    passes: int = 1
    # A row may have the cuts of another row, of up to so many keys, that shares its tile; 0: it has its own.
    shared_up_to: int = 0
    p_scale: float = 1.0  # a power of two that P is multiplied by before it is rounded to its type
    q_scaled: str = ""  # type of 8 bits that q is rounded to, with one scale a row and head
    k_rotation: int = 0  # numbers a block in which q and k are rotated; 0: they are not
    v_rotation: int = 0  # numbers a block in which v and the result are rotated; 0: they are not
    # The kernel, or whoever wrote its specification, says all of this. Otherwise it is assumed, as the
    # loosest that there is: a bound holds all the same, but nothing may be demanded of it to the bit, nor may
    # any of it excuse what is far off.
    stated: bool = True
    # It was read off the kernel (`verify.kernels.identify`): as sure as what is stated, but that no bits are
    # demanded for it.
    identified: bool = False

    @property
    def exact_maximum(self) -> bool:
        """Whether the P of the largest logit is 1, exact in every type: not where the maximum lags behind,
        nor where it is offset. llama.cpp's 3 * 0.6931 on CUDA gives 0.1250177; even ln 8 gives 0.125 only
        as nearly as s - (m + ln 8) is rounded."""
        return not self.stale_maximum and self.p_shift == 0

    @property
    def tile_orders(self) -> tuple[str, ...]:
        """Orders in which a part's tiles may be walked."""
        return ("forward", "backward") if self.tile_order is None else (self.tile_order,)

    @property
    def promises_bits(self) -> bool:
        """Whether a row whose weight lies on one key alone must be that key's value, to the bit."""
        if self.k_rotation or self.v_rotation:
            return False
        return self.stated and not self.identified and self.exact_maximum

    @property
    def truncates(self) -> bool:
        """Whether the output accumulators are those of tensor cores, in float32: they round toward zero."""
        return self.acc == "f32" and self.u == U_F32_TENSOR_CORE

    def shrinking(self, n_kv: int) -> float:
        """By how much, relative to sum p|v|, accumulators may shrink every result alike: 0 where they round.

        Truncation to u at each of n / 16 matrix instructions of the longest part. In float16 accumulators the
        sum itself is rounded, but each product was truncated before: the worst case of all 16 is allowed, 5 u
        an instruction (an H100 shows 2.9 u, and 0.9 u of float32 accumulators).
        """
        if self.u != U_F32_TENSOR_CORE:
            return 0.0
        products = 0.0 if self.truncates else MMA_KEYS / 2**MMA_GUARD_BITS
        return self.depths(n_kv).summed / MMA_KEYS * self.passes * self.u * (1 + products)

    @property
    def u_acc(self) -> float:
        """Unit roundoff of the output accumulators."""
        return FLOAT_TYPES["f16"].u if self.acc == "f16" else self.u

    @property
    def tau_p(self) -> float:
        """What a P that underflows may lose, in units of exp(s - m)."""
        return max(NUMBER_TYPES[self.p].tau / self.p_scale, EXP_UNDERFLOW) * math.exp(self.p_shift)

    @property
    def tau_acc(self) -> float:
        """What a sum in a float16 accumulator may lose where it underflows, in units of exp(s - m)."""
        return FLOAT_TYPES["f16"].tau * math.exp(self.p_shift) if self.acc == "f16" else 0.0

    def depths(self, n_kv: int) -> Depths:
        """Depths of a row with n_kv keys; the loosest order of summation where the plan is not known."""
        if self.block is None or self.cuts_at is None:
            # A key at a time, rescaled after each; parts of 16 keys.
            parts, summed = max(-(-n_kv // 16), 1), min(math.ceil(self.sum_share * n_kv), n_kv)
            return Depths(
                parts=parts,
                tiles=n_kv,
                d_l=2 * n_kv,
                d_n=2 * summed,
                d_m=parts + 3,
                longest=n_kv,
                summed=summed,
            )
        possible = [self.cuts_at(n_kv)]
        if self.shared_up_to > n_kv:
            possible.append(self.cuts_at(self.shared_up_to))
        parts = max(1, *(len(cuts) - 1 for cuts in possible))
        longest = max((b - a for cuts in possible for a, b in pairwise(cuts)), default=0)
        longest = min(longest, n_kv)
        tiles = -(-longest // self.block)
        summed = min(math.ceil(self.sum_share * longest), longest)
        d_l = d_n = self.block + 2 * tiles
        if not self.l_in_tiles:
            # Of tiles of any size: those of one block, or one of all keys, are the deepest.
            d_l = max(d_l, longest + 2)
        # An accumulator that runs on is rounded at each matrix instruction and rescale, in every tile.
        instructions = -(-self.block // MMA_KEYS)
        if self.acc != "f32":
            d_n = -(-summed // self.block) * (-(-self.block // self.sum_step) + 1) + 1
        elif self.chained:
            d_n = max(d_n, tiles * (self.chained * instructions + 1) + 1)
        return Depths(
            parts=parts,
            tiles=tiles,
            d_l=d_l,
            d_n=d_n,
            d_m=parts + 3 if parts > 1 else 0,
            longest=longest,
            summed=summed,
        )


# Kernels that compute e^x by a polynomial of degree 3, to spare the special function unit, are off by 8.8e-5.
APPROXIMATE_EXP = 2.0**-13


def no_tighter_than(assumed: Arithmetic, seen: Sequence[Arithmetic]) -> Arithmetic:
    """What is assumed of some call of a kernel, of whose other calls this was seen: a type that it has there,
    or an offset, it may have here."""
    p = max((assumed.p, *(each.p for each in seen)), key=lambda name: NUMBER_TYPES[name].u)
    return replace(
        assumed,
        p=p,
        acc="f16" if any(each.acc == "f16" for each in seen) else assumed.acc,
        p_shift=max(assumed.p_shift, *(each.p_shift for each in seen)) if seen else assumed.p_shift,
    )


def loosest_of(dtype: torch.dtype, *, acc: str | None = None) -> Arithmetic:
    """`loosest` for inputs of a dtype; of float32 too a kernel may make float16 numbers."""
    kind = type_of(dtype)
    return loosest("bf16" if kind is not None and kind.name == "bf16" else "f16", acc=acc)


def loosest(input_type: str, *, acc: str | None = None) -> Arithmetic:
    """The arithmetic of a kernel about which only its input type (`f16`, `bf16` or `f32`) is known.

    It may pre-scale and round q, offset the maximum, hold P and the accumulators in the input type and return
    it, in any order of summation: a bound that no correct kernel of this type can break. `acc`: the type of
    its accumulators, where its author vouches for it.
    """
    u = FLOAT_TYPES[input_type].u
    acc = acc or ("f16" if input_type == "f16" else "f32")
    return Arithmetic(
        p=input_type, out=input_type, acc=acc, u=U_F32_TENSOR_CORE, u_q=u, u_part=u, block=None, cuts_at=None,
        l_from_rounded_p=True, u_tanh=max(2.0**-11, u), u_exp=APPROXIMATE_EXP, p_shift=LARGEST_OFFSET,
        stated=False,
    )  # fmt: skip
