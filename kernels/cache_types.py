"""Caches as engines keep them, in words: types of K and V, rotation, scales, layers. Loads no torch.

    CACHE = SAME[@FIRST-LAST:SAME]...      SAME = K[/V][+rotate=NAME][+scale=WHAT]

    q8_0                     K and V in blocks of ggml's q8_0
    q8_0/q4_0                K in q8_0, V in q4_0 (llama.cpp's `-ctk q8_0 -ctv q4_0`)
    q4_0+rotate=mainline     both rotated before they are stored, as llama.cpp does since 2026-04
    e4m3+scale=head          fp8, one scale a sequence and KV head
    q4_0@0-1:q8_0            layers 0 and 1 in q8_0, all others in q4_0

f16 is "as given". How numbers become codes and back is in `verify.kernels.cache`; what a kernel does with a
rotated cache in `verify.kernels.stored`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from verify.kernels.errors import SpecError, nearest
from verify.kernels.numbers import FLOAT_TYPES, FP8_TYPES

# Numbers of one head that share a scale.
BLOCK = 32


class CacheType(NamedTuple):
    """codes: number of codes; zero: the code of 0 (types without a minimum); minimum: whether m is kept."""

    codes: int
    zero: int
    minimum: bool = False


CACHE_TYPES: dict[str, CacheType] = {
    "q8_0": CacheType(255, 0),
    "q6_0": CacheType(64, 32),
    "q4_0": CacheType(16, 8),
    "q4_1": CacheType(16, 0, minimum=True),
    "q5_0": CacheType(32, 16),
    "q5_1": CacheType(32, 0, minimum=True),
    "iq4_nl": CacheType(16, 0),
}
# Types whose codes are floating-point numbers themselves. MLA's is vLLM's name for 512 e4m3 numbers with a
# float32 scale for each 128, and 64 bfloat16 numbers of RoPE behind them: 656 bytes a token.
MLA_FP8 = "fp8_ds_mla"
NVFP4 = "nvfp4"
SCALED_TYPES = (*FP8_TYPES, NVFP4, MLA_FP8)
NVFP4_BLOCK, MLA_BLOCK, MLA_ROPE = 16, 128, 64
# Types that keep numbers as they are given.
PLAIN_BITS = {name: float(kind.bits) for name, kind in FLOAT_TYPES.items()}
# What a kernel's own cache may be of.
KEPT_TYPES = ("f16", "bf16", *CACHE_TYPES, *SCALED_TYPES)
# How a scale is chosen, beside a number that is given: of the largest number of a sequence, of a sequence and
# KV head, of a token and KV head.
SCALES = ("tensor", "head", "token")
# Head sizes of K and V of MLA's latent cache.
MLA_SIZES = (576, 512)
# Rules by which engines choose blocks of the Walsh-Hadamard matrix, beside a size that is given.
ROTATIONS = ("mainline", "ik")
# Blocks of mainline's rotation: the smallest of K, and that of V.
MAINLINE_BLOCK = 64
GRAMMAR = "K[/V][+rotate=mainline|ik|N][+scale=tensor|head|token|X][@FIRST-LAST:...]"


class RotationBlocks(NamedTuple):
    """Numbers that one rotation mixes, of keys (and so of queries) and of values; 0: not rotated."""

    k: int = 0
    v: int = 0


class LayerRange(NamedTuple):
    """Layers first .. last, both counted from 0, and the cache that they have."""

    first: int
    last: int
    cache: CacheSpec


@dataclass(frozen=True)
class CacheSpec:
    """How keys and values are kept: what a text of the grammar above says. `parse_cache` makes it."""

    k: str = "f16"  # type of keys
    v: str = "f16"  # type of values
    rotate: str = ""  # mainline, ik, or numbers a block; empty: not rotated
    scale: str = ""  # of fp8 and nvfp4: tensor, head, token or a number; empty: 1, as without calibration
    layers: tuple[LayerRange, ...] = ()  # layers that have another one

    def __str__(self) -> str:
        text = self.k if self.k == self.v else f"{self.k}/{self.v}"
        text += f"+rotate={self.rotate}" if self.rotate else ""
        text += f"+scale={self.scale}" if self.scale else ""
        return text + "".join(f"@{x.first}-{x.last}:{x.cache}" for x in self.layers)

    @property
    def as_given(self) -> bool:
        """Whether keys and values stay what the kernel was given, in every layer."""
        return self == CacheSpec()

    def at(self, layer: int | None) -> CacheSpec:
        """The cache of one layer. None, of a call that no model makes: that of layers that are not named."""
        for some in self.layers:
            if layer is not None and some.first <= layer <= some.last:
                return some.cache
        return replace(self, layers=())

    @property
    def everywhere(self) -> tuple[CacheSpec, ...]:
        """Every cache that some layer has."""
        return self.at(None), *(some.cache for some in self.layers)

    @property
    def types(self) -> tuple[str, ...]:
        """Every type of K or V that some layer has, each once."""
        return tuple(dict.fromkeys(kind for one in self.everywhere for kind in (one.k, one.v)))

    @property
    def size_multiple(self) -> int:
        """What head sizes are multiples of."""
        found = [type_multiple(kind) for kind in self.types]
        return math.lcm(*found, *(int(one.rotate) for one in self.everywhere if one.rotate.isdecimal()))

    @property
    def looks_ahead(self) -> bool:
        """Whether what is kept of a key depends on keys beside it, later ones too: a scale of all of them."""
        return any(one.scale in ("tensor", "head") for one in self.everywhere)

    def blocks(self, k_size: int, v_size: int) -> RotationBlocks:
        """What is rotated of heads of these sizes; of a cache that is the same in all layers.

        mainline: of K and V apart, where the type is quantised and the head size a multiple of 64: K in
        blocks of the largest power of two that divides the head, V in blocks of 64. ik: whatever the type,
        the largest power of two that divides each head; of MLA 64.
        """
        if not self.rotate:
            return RotationBlocks()
        if self.rotate == "mainline":
            k, v = (
                size % MAINLINE_BLOCK == 0 and kind not in PLAIN_BITS
                for size, kind in ((k_size, self.k), (v_size, self.v))
            )
            return RotationBlocks(power_of_two(k_size) * k, MAINLINE_BLOCK * v)
        if self.rotate == "ik":
            if (k_size, v_size) == MLA_SIZES:
                return RotationBlocks(64, 64)
            return RotationBlocks(power_of_two(k_size), power_of_two(v_size))
        return RotationBlocks(int(self.rotate), int(self.rotate))

    def bytes_a_token(self, kv_heads: int, k_size: int, v_size: int, layer: int | None = None) -> float:
        """Memory of one token in one layer; MLA's fp8 keeps values among its keys."""
        one = self.at(layer)
        k = kv_heads * k_size * bits_per_number(one.k, k_size, one.scale)
        v = 0.0 if one.v == MLA_FP8 else kv_heads * v_size * bits_per_number(one.v, v_size, one.scale)
        return (k + v) / 8


AS_GIVEN = CacheSpec()
# What laws ask a kernel with caches for: every type, both kinds of scales beside 1, rotation, types apart.
LAW_CACHES = (
    *(kind for kind in KEPT_TYPES if kind not in ("f16", MLA_FP8)),
    "q8_0/q4_0",
    "q4_0+rotate=mainline",
    "f16+rotate=32",
    "q8_0/f16+rotate=ik",
    "e4m3+scale=token",
    "e4m3+scale=head",
    "nvfp4+scale=tensor",
)


def power_of_two(size: int) -> int:
    """The largest power of two that divides a size."""
    return size & -size


def type_multiple(kind: str) -> int:
    """What head sizes of a type are multiples of."""
    if kind in CACHE_TYPES:
        return BLOCK
    return {NVFP4: NVFP4_BLOCK, MLA_FP8: MLA_ROPE}.get(kind, 1)


def bits_per_number(cache_type: str, size: int = 0, scale: str = "") -> float:
    """Memory of one number, scale and minimum included: 8.5 for q8_0, 4.5 for q4_0.

    size: of the head, for types with a scale a token and head or a part of their own; scale: as in the
    grammar.
    """
    if cache_type in PLAIN_BITS:
        return PLAIN_BITS[cache_type]
    if cache_type in CACHE_TYPES:
        kind = CACHE_TYPES[cache_type]
        return float((kind.codes - 1).bit_length()) + 16 * (1 + kind.minimum) / BLOCK
    if cache_type == NVFP4:
        return 4 + 8 / NVFP4_BLOCK
    if cache_type == MLA_FP8:
        rope = size % MLA_BLOCK
        return (8 * (size - rope) + 32 * (size // MLA_BLOCK) + 16 * rope) / size
    return 8 + (32 / size if scale == "token" else 0.0)


def parse_cache(text: str, allowed: tuple[str, ...] = KEPT_TYPES) -> CacheSpec:
    """A cache from its text; allowed: types of K and V.

    Raises SpecError, one line that names the piece and what was expected.
    """
    base, *ranges = text.split("@")
    spec = _one_cache(text, base, allowed)
    layers = []
    for piece in ranges:
        numbers, colon, rest = piece.partition(":")
        first, dash, last = numbers.partition("-")
        last = last if dash else first
        if not colon or not first.isdecimal() or not last.isdecimal() or int(last) < int(first):
            raise SpecError(f"cache {text!r}: @{piece}: expected @FIRST-LAST:CACHE, layers counted from 0")
        layers.append(LayerRange(int(first), int(last), _one_cache(text, rest, allowed)))
    taken: set[int] = set()
    for some in layers:
        mine = set(range(some.first, min(some.last, some.first + 4096) + 1))
        if taken & mine:
            raise SpecError(f"cache {text!r}: layer {min(taken & mine)} is named twice")
        taken |= mine
    return replace(spec, layers=tuple(layers))


class RunCache(NamedTuple):
    """attention: the float type that q, k and v are rounded to; cache: what keys and values pass besides."""

    attention: str
    cache: CacheSpec


def run_cache(text: str) -> RunCache:
    """The cache that all arms of a run have, from `--cache-type` (or `-ctk`, `-ctv`: K/V).

    A float type alone is what q, k and v are rounded to. Where K or V is of another type, q is of K's float
    type, or f16. Raises SpecError, for scales of all keys too: rows of a window are computed side by side,
    and what an earlier row sees would depend on later ones.
    """
    if text in FLOAT_TYPES:
        return RunCache(text, AS_GIVEN)
    cache = parse_cache(text, (*FLOAT_TYPES, *KEPT_TYPES[2:]))
    if cache.looks_ahead:
        raise SpecError(f"cache {text!r}: of all arms: expected scale=token or a number")
    attention = (
        "f32" if "f32" in cache.types else "bf16" if "f16" not in cache.types and cache.k == "bf16" else "f16"
    )

    def of_numbers(one: CacheSpec) -> CacheSpec:
        k, v = ("f16" if kind == attention else kind for kind in (one.k, one.v))
        return replace(one, k=k, v=v, layers=tuple(x._replace(cache=of_numbers(x.cache)) for x in one.layers))

    return RunCache(attention, of_numbers(cache))


def _one_cache(text: str, piece: str, allowed: tuple[str, ...]) -> CacheSpec:
    types, *options = piece.split("+")
    k, slash, v = types.partition("/")
    for kind in (k, v) if slash else (k,):
        if kind not in allowed:
            hint = nearest(kind, allowed)
            raise SpecError(
                f"cache {text!r}: unknown type {kind!r}{hint}, expected one of {', '.join(allowed)}"
            )
    found: dict[str, str] = {"rotate": "", "scale": ""}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in found or not equals or found[name]:
            raise SpecError(f"cache {text!r}: {option!r}: expected {GRAMMAR}")
        found[name] = value
    spec = CacheSpec(k, v if slash else k, found["rotate"], found["scale"])
    _check_rotation(text, spec)
    _check_scale(text, spec)
    return spec


def _check_rotation(text: str, spec: CacheSpec) -> None:
    if not spec.rotate or spec.rotate in ROTATIONS:
        return
    size = int(spec.rotate) if spec.rotate.isdecimal() and len(spec.rotate) < 6 else 0
    if size < 2 or size != power_of_two(size):
        raise SpecError(
            f"cache {text!r}: rotate={spec.rotate}: expected {' or '.join(ROTATIONS)}, or a power of two"
        )


def _check_scale(text: str, spec: CacheSpec) -> None:
    if not spec.scale:
        return
    kinds = {spec.k, spec.v}
    if not kinds & {*FP8_TYPES, NVFP4}:
        raise SpecError(
            f"cache {text!r}: scale={spec.scale}: expected e4m3, e5m2 or nvfp4, other types have their own"
        )
    if spec.scale in SCALES:
        if NVFP4 in kinds and spec.scale == "token":
            raise SpecError(f"cache {text!r}: scale=token: nvfp4 has a scale for each 16 numbers already")
        return
    try:
        number = float(spec.scale)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise SpecError(
            f"cache {text!r}: scale={spec.scale}: expected {', '.join(SCALES)} or a number above 0"
        )
