"""How the oracle multiplies: float64, or slices where float64 is slow; by name, or by a measurement.

A process has one answer a kind of device (`multiplying`), float64 where nothing was said: what takes no
product by name, exact attention in the evidence of a run say, multiplies so. What a measurement said is a
setting of the run: it is stored, and who goes on with the run, or shares it, takes it from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import torch

from verify.kernels.int8_products import has_int8_products, int8_bmm
from verify.kernels.sliced_products import sliced_bmm

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FLOAT64, INT8, AUTO = "float64", "int8", "auto"
# By the name that it has in `exact:acc=` and `--oracle`: a [h, m, k] times b [h, k, n], float64 in and out.
PRODUCTS: Mapping[str, Product] = MappingProxyType(
    {FLOAT64: torch.bmm, INT8: int8_bmm, "double-float32": sliced_bmm}
)
# Slices are chosen where they are at least so many times faster: far from the ratio of 1 at which two
# measurements of one card could differ, and more than what the rest of attention leaves of a small gain.
CLEARLY_FASTER = 2.0
# A card that multiplies float64 at more than a fourth of float32's rate has hardware for it: nothing is cut.
FLOAT64_IN_HARDWARE = 4.0
# Heads, rows, keys and numbers a head of the two products that are timed, and how often they are.
_TIMED_SHAPE, _TIMES = (4, 1024, 2048, 128), 3

_in_use: dict[str, str] = {}


class TimedProducts(NamedTuple):
    """Seconds of the two products of one attention, each way; NaN where that was not timed."""

    chosen: str
    float32_s: float = math.nan
    float64_s: float = math.nan
    int8_s: float = math.nan


def products_in_use(device: torch.device) -> str:
    """The name of this process's products on such a device."""
    return _in_use.get(device.type, FLOAT64)


@contextmanager
def multiplying(device: torch.device, name: str) -> Iterator[None]:
    """Within it the oracle multiplies so on devices of this kind. Raises KeyError: no such product."""
    if name not in PRODUCTS:
        raise KeyError(name)
    before = dict(_in_use)
    _in_use[device.type] = name
    try:
        yield
    finally:
        _in_use.clear()
        _in_use.update(before)


def chosen_products(asked: str, device: torch.device) -> str:
    """The products that `auto` stands for here; any other name is itself."""
    return timed_products(device).chosen if asked == AUTO else asked


@cache
def timed_products(device: torch.device) -> TimedProducts:
    """Measured once a process, a few milliseconds and what loading takes; nothing is on a CPU."""
    if device.type != "cuda":
        return TimedProducts(FLOAT64)
    heads, rows, keys, size = _TIMED_SHAPE
    # A generator of its own: the process's keeps its state.
    generator = torch.Generator(device).manual_seed(0)
    q, k, p, v = (
        torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
        for shape in ((heads, rows, size), (heads, size, keys), (heads, rows, keys), (heads, keys, size))
    )

    def seconds(product: Product, dtype: torch.dtype = torch.float64) -> float:
        operands, found = [x.to(dtype) for x in (q, k, p, v)], []
        # The first time loads libraries.
        for _ in range(1 + _TIMES):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            product(*operands[:2])
            product(*operands[2:])
            torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
        return min(found[1:])

    float32_s, float64_s = seconds(torch.bmm, torch.float32), seconds(torch.bmm)
    if is_in_hardware(float32_s, float64_s) or not has_int8_products(device):
        return TimedProducts(FLOAT64, float32_s, float64_s)
    int8_s = seconds(int8_bmm)
    return TimedProducts(quicker(float64_s, int8_s), float32_s, float64_s, int8_s)


def is_in_hardware(float32_s: float, float64_s: float) -> bool:
    """Whether a card has float64 to speak of, by these seconds of the same products."""
    return float64_s < FLOAT64_IN_HARDWARE * float32_s


def quicker(float64_s: float, int8_s: float) -> str:
    """Which is chosen by these seconds of the same products."""
    return INT8 if float64_s >= CLEARLY_FASTER * int8_s else FLOAT64
