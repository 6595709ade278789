"""What a kernel's cache holds, read from outside: proof that a codec ran, and which.

A row that sees one key alone has that key's value as its result, whatever the weights are, and its logit as
its lse: with q the i-th unit vector, number i of the key. So whatever returns out and lse shows the numbers
that it computes with, key by key, in the coordinates of its caller. A no-op, a type on the wrong tensor or
layer, a rotation that is missing or not undone all give other numbers than the codec does; and a codec
leaves at most its number of codes different numbers in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from verify.kernels.cache_types import (
    BLOCK,
    CACHE_TYPES,
    KEPT_TYPES,
    MLA_FP8,
    NVFP4,
    NVFP4_BLOCK,
    CacheSpec,
)
from verify.kernels.call import Call, checked_call
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import FLOAT_TYPES, FP8_TYPES
from verify.kernels.rotation import rotate
from verify.kernels.stored import held

# Keys that are read.
KEYS = 8
# What a number may be off, relative to the largest of its head, by the type of a kernel's results: an ulp of
# it, and of the numbers of 16 bits that a cache is expanded to or queries are rotated in.
TOLERANCES = {"bf16": 2.0**-7}
TOLERANCE = 2.0**-9
# Of so many numbers: two codecs may take a number that lies half-way between two codes to either.
OF_NUMBERS = 0.98
UNKNOWN = "none that is known"


class ReadBack(NamedTuple):
    """Keys and values [keys, Hkv, D], float64; k is None of a kernel that returns no lse."""

    k: torch.Tensor | None
    v: torch.Tensor


class SeenNumbers(NamedTuple):
    """What keys or values were recognised as. kind: the type and rotation that explain them best, of those
    that were asked after; error: how far from what those make of the keys, relative; asked: the same of what
    the kernel says that it holds; distinct: most different numbers in a block; codes: how many its type has
    (0: no such number)."""

    kind: str
    error: float
    asked: float
    distinct: int
    codes: int


class CacheSeen(NamedTuple):
    """What one layer's cache holds; k: None where it cannot be seen; tolerance: what numbers may be off."""

    layer: int | None
    cache: str
    k: SeenNumbers | None
    v: SeenNumbers
    tolerance: float

    @property
    def fault(self) -> str | None:
        """What is wrong, in a sentence, or None."""
        for name, seen in (("K", self.k), ("V", self.v)):
            if seen is None:
                continue
            where = "" if self.layer is None else f" of layer {self.layer}"
            if seen.asked <= self.tolerance:
                continue
            if seen.error * 2 < seen.asked:
                return f"{name}{where} was to be kept as {self.cache}, and reads as {seen.kind}"
            return f"{name}{where} is {seen.asked:.3g} off what a cache of {self.cache} makes of it"
        return None


def some_keys(call: Call) -> Call:
    """The first keys of a call's sequences, each a sequence of its own: [keys, 1, Hkv, D]."""
    k, v = (x[:, :KEYS].flatten(0, 1)[:KEYS, None] for x in (call.k, call.v))
    size = call.shape.k_size
    unit = torch.eye(size, dtype=call.q.dtype, device=call.q.device)
    q = unit[None, :, None].expand(len(k), -1, call.shape.q_heads, -1).contiguous()
    kv_len = torch.ones(len(k), size, dtype=torch.int32, device=call.q.device)
    made = checked_call(q, k.contiguous(), v.contiguous(), kv_len=kv_len, scale=1.0, path="decode")
    return replace(made, layer=call.layer)


def read_back(kernel: Kernel, asked: Call) -> ReadBack:
    """The numbers that a kernel computes with; asked: of `some_keys`. Raises KernelFailure."""
    result, ratio = kernel.run(asked), asked.shape.ratio
    v = result.out[:, 0, ::ratio].double()
    k = None
    if kernel.capabilities().lse:
        k = (result.lse[:, :, ::ratio].double() / asked.scale).transpose(1, 2)
    return ReadBack(k, v)


def look(kernel: Kernel, call: Call) -> CacheSeen:
    """What a kernel holds of the keys of a call, beside what it says that it holds.

    A scale of all keys (`CacheSpec.looks_ahead`) is of each key here, as each is a sequence.
    """
    asked = some_keys(call)
    found, cache = read_back(kernel, asked), kernel.cache.at(call.layer)
    result = kernel.result_type(asked)
    due, tolerance = kernel.held(asked), TOLERANCES.get(result, TOLERANCE)
    # A float16 result has no number between 0 and 2^-24, and a cache of bfloat16 has many.
    step = 2 * FLOAT_TYPES[result].tau if result in FLOAT_TYPES else 0.0
    k = None if found.k is None else _recognised(found.k, asked, due, cache, "k", tolerance)
    v = _recognised(found.v, asked, due, cache, "v", tolerance, step)
    return CacheSeen(call.layer, str(cache), k, v, tolerance)


def _recognised(
    found: torch.Tensor,
    asked: Call,
    due: Call,
    cache: CacheSpec,
    which: str,
    tolerance: float,
    step: float = 0.0,
) -> SeenNumbers:
    """step: the least number that a result can be, which is no difference."""
    given = getattr(asked, which)[:, 0].double()
    size = given.abs().amax(-1, keepdim=True).clamp(min=1e-30)

    def off(held_as: torch.Tensor) -> float:
        beyond = ((found - held_as).abs() - step).clamp(min=0)
        away = (beyond / size).nan_to_num(nan=torch.inf).flatten()
        return float(away.sort().values[int(OF_NUMBERS * (len(away) - 1))])

    own = off(getattr(due, which)[:, 0].double())
    best, kind = own, _words(cache, which)
    # What is as it should be needs no other explanation.
    for other in _hypotheses(cache) if own > tolerance else ():
        try:
            made = getattr(held(asked, other), which)[:, 0].double()
        except ValueError:
            continue
        # As good is not better: what is said to be held is, unless something else explains it better.
        if (error := off(made)) < best / 2:
            best, kind = error, _words(other, which)
    if best > tolerance:
        kind = UNKNOWN
    name = getattr(cache, which)
    block = cache.blocks(asked.shape.k_size, asked.shape.v_size)
    stored = rotate(found, getattr(block, which)) if getattr(block, which) else found
    return SeenNumbers(kind, best, own, most_distinct(stored, name), codes_of(name))


def _hypotheses(cache: CacheSpec) -> Iterator[CacheSpec]:
    for rotate_by in dict.fromkeys(("", cache.rotate, "mainline", "ik")):
        for kind in KEPT_TYPES:
            if kind in FP8_TYPES or kind == NVFP4:
                for scale in dict.fromkeys(("", cache.scale, "token")):
                    if not (kind == NVFP4 and scale == "token"):
                        yield CacheSpec(kind, kind, rotate_by, scale)
            else:
                yield CacheSpec(kind, kind, rotate_by)


def _words(cache: CacheSpec, which: str) -> str:
    kind = getattr(cache, which)
    one = CacheSpec(kind, kind, cache.rotate, cache.scale if kind in (*FP8_TYPES, NVFP4) else "")
    return str(one) if not one.as_given else "what was given (f16)"


def block_of(kind: str) -> int:
    """Numbers that share a scale, as far as they are counted together here."""
    return NVFP4_BLOCK if kind == NVFP4 else BLOCK


def codes_of(kind: str) -> int:
    """Different numbers that a block can have; 0 where there are more than numbers in a block."""
    if kind == NVFP4:
        return 15
    codes = CACHE_TYPES[kind].codes if kind in CACHE_TYPES else 0
    return codes if 0 < codes < BLOCK else 0


def most_distinct(x: torch.Tensor, kind: str) -> int:
    """The most different numbers in a block of x [..., D]; those as near as float32 rounds are one."""
    size = block_of(kind)
    if x.shape[-1] % size or kind == MLA_FP8:
        return 0
    blocks = x.unflatten(-1, (-1, size)).flatten(0, -2).sort(-1).values
    largest = blocks.abs().amax(-1, keepdim=True)
    return int(((blocks.diff(dim=-1) > largest * 2.0**-16).sum(-1) + 1).max())
