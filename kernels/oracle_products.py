"""How the oracle multiplies: float64, or slices where float64 is slow; by name, or by a measurement.

A process has one answer a kind of device (`multiplying`), float64 where nothing was said: what takes no
product by name, exact attention in the evidence of a run say, multiplies so. What a measurement said is a
setting of the run: it is stored, and who goes on with the run, or shares it, takes it from there.
"""

from __future__ import annotations

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
# Heads, rows, keys and numbers a head of the two products that are timed, and how often they are.
_TIMED_SHAPE, _TIMES = (4, 1024, 2048, 128), 3

_in_use: dict[str, str] = {}


class TimedProducts(NamedTuple):
    """Seconds of the two products of one attention, each way; NaN where it was not timed."""

    chosen: str
    float64_s: float
    int8_s: float


def products_in_use(device: torch.device) -> str:
    """The name of this process's products on such a device."""
    return _in_use.get(device.type, FLOAT64)


@contextmanager
def multiplying(device: torch.device, name: str) -> Iterator[None]:
    """Within it the oracle multiplies so on devices of this kind. Raises KeyError: no such product."""
    assert PRODUCTS[name]
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
    """Measured once a process. On a CPU float64 is half as fast as float32, and nothing is."""
    if device.type != "cuda" or not has_int8_products(device):
        return TimedProducts(FLOAT64, float("nan"), float("nan"))
    heads, rows, keys, size = _TIMED_SHAPE
    generator = torch.Generator().manual_seed(0)
    q, k, p, v = (
        torch.rand(shape, generator=generator, dtype=torch.float64).to(device)
        for shape in ((heads, rows, size), (heads, size, keys), (heads, rows, keys), (heads, keys, size))
    )

    def seconds(product: Product) -> float:
        found = []
        # The first time loads libraries.
        for _ in range(1 + _TIMES):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            product(q, k)
            product(p, v)
            torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
        return min(found[1:])

    float64_s, int8_s = seconds(PRODUCTS[FLOAT64]), seconds(PRODUCTS[INT8])
    return TimedProducts(quicker(float64_s, int8_s), float64_s, int8_s)


def quicker(float64_s: float, int8_s: float) -> str:
    """Which is chosen by these seconds of the same products."""
    return INT8 if float64_s >= CLEARLY_FASTER * int8_s else FLOAT64
