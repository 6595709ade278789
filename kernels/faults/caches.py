"""Known faults of caches: a kernel over a cache with one step of keeping and reading it broken.

`OverCache` is right, whatever its cache; each class after it errs in one step, and says where that was seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.cache import dequantise
from verify.kernels.cache_types import AS_GIVEN, CACHE_TYPES, CacheSpec
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.eager import over_rotation
from verify.kernels.faults.record import CacheFault
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.rotation import rotate
from verify.kernels.stored import StoredCall, store


class OverCache(TileKernel):
    """The correct tile kernel, over a cache of its own, in steps that can be broken."""

    def __init__(self, spec: str, *, cache: CacheSpec = AS_GIVEN, **options: Any) -> None:
        super().__init__(spec, **options)
        self.cache = cache

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return over_rotation(super().arithmetic(shape, path), self.cache.at(None), shape, torch.float16)

    def arithmetic_of(self, call: Call) -> Arithmetic:
        plain = super().arithmetic(call.shape, call.path)
        return over_rotation(plain, self.cache.at(call.layer), call.shape, call.q.dtype)

    def run(self, call: Call) -> Result:
        cache = self.kept(call)
        if cache.as_given:
            return super().run(call)
        stored = self.keep(call, cache)
        result = super().run(self.numbers_of(call, stored))
        return Result(self.turned_back(stored, result.out), result.lse, result.launched)

    def kept(self, call: Call) -> CacheSpec:
        """The cache of the call's layer."""
        return self.cache.at(call.layer)

    def keep(self, call: Call, cache: CacheSpec) -> StoredCall:
        return store(call, cache)

    def numbers_of(self, call: Call, stored: StoredCall) -> Call:
        """The call that attention is computed of; call: as it was given."""
        return stored.call

    def turned_back(self, stored: StoredCall, out: torch.Tensor) -> torch.Tensor:
        return stored.undone(out)


CACHE_FAULTS: list[CacheFault] = []


def cache_fault(
    name: str, what: str, cache: str, *references: str
) -> Callable[[type[OverCache]], type[OverCache]]:
    """Declares a subclass of `OverCache` as a known fault; cache: one under which it shows."""

    def declare(kind: type[OverCache]) -> type[OverCache]:
        CACHE_FAULTS.append(CacheFault(name, what, references or ("emulated",), cache, kind))
        return kind

    return declare


@cache_fault("codec did not run", "K and V stay as they were given", "q4_0")
class CodecDidNotRun(OverCache):
    """An override that did nothing."""

    def keep(self, call: Call, cache: CacheSpec) -> StoredCall:
        return super().keep(call, replace(cache, k="f16", v="f16"))


@cache_fault("cache of the next layer", "ranges of layers are one off", "q8_0@1-1:q4_0")
class CacheOfTheNextLayer(OverCache):
    """Layers are counted from 1 where the ranges count from 0."""

    def kept(self, call: Call) -> CacheSpec:
        return self.cache.at(None if call.layer is None else call.layer + 1)


@cache_fault("rotation not undone", "the result stays as rotated V has it", "q8_0+rotate=mainline")
class RotationNotUndone(OverCache):
    """V is rotated before it is kept, the result is not."""

    def turned_back(self, stored: StoredCall, out: torch.Tensor) -> torch.Tensor:
        return out


@cache_fault("queries not rotated", "K is kept rotated, queries are not", "q8_0+rotate=mainline")
class QueriesNotRotated(OverCache):
    """Scores of unlike coordinates."""

    def numbers_of(self, call: Call, stored: StoredCall) -> Call:
        return replace(stored.call, q=call.q)


@cache_fault("K and V swapped", "K is kept in V's type, V in K's", "q8_0/q4_0")
class TypesSwapped(OverCache):
    """The cheaper type on the tensor that needs the better one."""

    def keep(self, call: Call, cache: CacheSpec) -> StoredCall:
        return super().keep(call, replace(cache, k=cache.v, v=cache.k))


@cache_fault("rotation left out", "a cache that is said to be rotated is not", "q4_0+rotate=mainline")
class RotationLeftOut(OverCache):
    """Right attention, over other numbers than those that are said to be kept."""

    def keep(self, call: Call, cache: CacheSpec) -> StoredCall:
        return super().keep(call, replace(cache, rotate=""))


@cache_fault("scale of the next key", "each block of V is read with the scale of the key before", "q8_0")
class ScaleOfTheNextKey(OverCache):
    """An index of scales that is one off."""

    def numbers_of(self, call: Call, stored: StoredCall) -> Call:
        if stored.v.type not in CACHE_TYPES or stored.v.scale is None:
            return stored.call
        moved = stored.v._replace(scale=stored.v.scale.roll(1, 1))
        return replace(stored.call, v=dequantise(moved).to(call.v.dtype))


@cache_fault("fp8 read as the other", "codes of e4m3 are read as e5m2", "e4m3")
class ReadAsE5M2(OverCache):
    """The two types of 8 bits share a byte."""

    def numbers_of(self, call: Call, stored: StoredCall) -> Call:
        if stored.v.type != "e4m3":
            return stored.call
        codes = stored.v.codes.view(torch.uint8).view(torch.float8_e5m2).float()
        return replace(stored.call, v=codes.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(call.v.dtype))


@cache_fault("fp8 wraps", "numbers beyond 448 become small ones", "e4m3")
class Fp8Wraps(OverCache):
    """A cast that does not saturate."""

    def keep(self, call: Call, cache: CacheSpec) -> StoredCall:
        wrapped = torch.where(call.v.abs() > 448, call.v.sign() * (call.v.abs() % 448), call.v)
        return super().keep(replace(call, v=wrapped) if "e4m3" in cache.v else call, cache)


@cache_fault("half of the head rotated", "V is rotated back in blocks half as large", "q8_0+rotate=mainline")
class HalfRotated(OverCache):
    """The block of V's rotation is taken for another."""

    def turned_back(self, stored: StoredCall, out: torch.Tensor) -> torch.Tensor:
        return rotate(out, stored.rotation.v // 2)
