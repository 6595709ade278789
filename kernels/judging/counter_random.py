"""Random numbers as a function of a counter: equal bits on every device, however many are drawn.

A generator that keeps a state gives other numbers on a GPU than on a CPU, and drawing K and V of a long
context on the CPU takes longer than every kernel that reads them. Here the i-th word of a stream is a hash of
seed, stream and i, in wrapping 64-bit integers, which every device computes alike:

    z = key + i * 0x9E3779B97F4A7C15
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
    z = (z ^ z >> 27) * 0x94D049BB133111EB
    z =  z ^ z >> 31

Source: G. Steele, D. Lea, C. Flood, Fast splittable pseudorandom number generators, 2014 (SplitMix64). A word
is four numbers of 16 bits. A normal number is one of the 65,536 quantiles (i + 1/2) / 65536 of the standard
normal distribution, looked up: a logarithm and a cosine would differ from device to device. None is beyond
4.33 in magnitude.
"""

from __future__ import annotations

import math
from functools import cache

import torch

_WORD = 1 << 64
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Numbers of 16 bits in a word.
_A_WORD = 4
_LEVELS = 1 << 16


class CounterRandom:
    """Streams of random numbers of one seed. Every call takes the next stream; tensors lie on `device`."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.device = seed, torch.device(device)
        self.streams = 0

    def normal(self, *shape: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Standard normal numbers, float32."""
        levels = self._levels(math.prod(shape), device)
        return _quantiles(levels.device).index_select(0, levels).view(shape)

    def uniform(self, *shape: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Multiples of 2^-16 in [0, 1), float32."""
        return self._levels(math.prod(shape), device).float().mul_(1 / _LEVELS).view(shape)

    def integer(self, below: int) -> int:
        """From 0 to below - 1."""
        return int(_words(self._key(), 1, torch.device("cpu"))[0]) % below

    def permutation(self, n: int) -> torch.Tensor:
        """The numbers 0 to n - 1 in random order, int64, on the CPU."""
        return _words(self._key(), n, torch.device("cpu")).argsort()

    def _levels(self, count: int, device: torch.device | str | None) -> torch.Tensor:
        """[count] int32 from 0 to 65535."""
        device = self.device if device is None else torch.device(device)
        words = _words(self._key(), -(-count // _A_WORD), device)
        return words.view(torch.int16)[:count].int().add_(_LEVELS // 2)

    def _key(self) -> int:
        """Where this call's stream begins: streams of all seeds lie far apart."""
        self.streams += 1
        return _mixed(_mixed(self.seed * _STEP) + self.streams * _SECOND)


def _mixed(z: int) -> int:
    """SplitMix64's finaliser."""
    z %= _WORD
    z = (z ^ (z >> 30)) * _FIRST % _WORD
    z = (z ^ (z >> 27)) * _SECOND % _WORD
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    """The int64 of the same bits."""
    return z - _WORD if z >= _WORD // 2 else z


def _words(key: int, count: int, device: torch.device) -> torch.Tensor:
    """[count] int64: `_mixed(key + i * _STEP)` for i = 1, 2, ..."""
    z = torch.arange(1, count + 1, device=device).mul_(_signed(_STEP)).add_(_signed(key))
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        z.bitwise_xor_(_shifted(z, shift)).mul_(_signed(factor))
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: torch.Tensor, n: int) -> torch.Tensor:
    """z >> n of the unsigned word: int64 shifts its sign in, which is cut off."""
    return (z >> n).bitwise_and_((1 << (64 - n)) - 1)


@cache
def _quantiles(device: torch.device) -> torch.Tensor:
    """[65536] float32. Always computed on the CPU, so that every device has the same table."""
    if device.type != "cpu":
        return _quantiles(torch.device("cpu")).to(device)
    levels = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    return torch.special.ndtri(levels).float()
