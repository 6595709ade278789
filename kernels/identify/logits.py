"""The first product and the exponential: types of q and k, of the scaled q, of the logits, and the rescale.

All of it is read off P of pairs of keys (`weights.ratios`), whose logits differ by g. Far from 0, at 256,
logits of 16 bits move by up to an eighth or a whole one, and P with them. A scale just above a power of two
is rounded to it where q is multiplied by it in 16 bits; and log2 e is rounded with it where a kernel takes
powers of two. A maximum that may lag behind leaves P above 1, and rounded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from verify.kernels.identify.asking import SCALE, Asking, columns
from verify.kernels.identify.tiles import TilesSeen
from verify.kernels.identify.weights import AskedPart, Weights, cancelling, ratios, rounded

_FAR = 256.0
# Scales that 11 bits, and that 8 bits, round to 1/8.
_SCALES = (SCALE, SCALE * (1 + 0.00047), SCALE * (1 + 0.0036))
_BITS = {"f16": 11, "bf16": 8, "e4m3": 4, "e5m2": 3}
GROWTHS = (0.25, 1.0, 3.0, 5.0, 7.0, 9.0)


class Logits(NamedTuple):
    """What was seen before the second product; None for what cannot be told.

    first_product: type of q and k as they are multiplied; q_scaled_in: type in which q is multiplied by the
    scale; logits: type that they are rounded to; rescale: the largest growth of the maximum, of those asked,
    by which sums are not rescaled (0: they always are).
    """

    first_product: str | None
    q_scaled_in: str | None
    logits: str | None
    rescale: float | None


def logits_seen(
    ask: Asking, part: tuple[int, int], weights: Weights, tiles: TilesSeen, generator: torch.Generator
) -> Logits:
    """part: bounds of the longest part."""
    where = AskedPart(*part, weights.newest_first)
    u_p = {"f16": 2.0**-11, "bf16": 2.0**-8, "tf32": 2.0**-11, "f32": 0.0}.get(weights.p or "")
    if u_p is None:
        return Logits(None, None, None, None)
    u_p *= 2 if weights.truncated else 1
    return Logits(
        first_product=_first_product(ask, where, u_p, weights.slope, generator),
        q_scaled_in=_q_scaled_in(ask, where, u_p, weights, generator),
        logits=_logit_type(ask, where, u_p, generator),
        rescale=_rescale(ask, part, weights, tiles),
    )


def _first_product(
    ask: Asking, part: AskedPart, u_p: float, slope: float, generator: torch.Generator
) -> str | None:
    """The narrowest type whose rounding of k explains weights of keys of 11 bits (8 of bfloat16 inputs)."""
    given = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(ask.regime.dtype, "f32")
    bits = {"bf16": 8}.get(given, 11)
    gaps = torch.randint(2 ** (bits - 1), 2**bits, (32,), generator=generator).double() * 2.0 ** (3 - bits)
    seen = -torch.log(ratios(ask, part, gaps)) / (1 + slope)
    noise = 2 * u_p + 1e-3
    if float((seen - gaps).abs().max()) < noise:
        return given
    for name, narrow in _BITS.items():
        if float((seen - rounded(gaps, narrow)).abs().max()) < noise:
            return name
    return None


def _q_scaled_in(
    ask: Asking, part: AskedPart, u_p: float, weights: Weights, generator: torch.Generator
) -> str | None:
    """By how much logits are too large, at a scale of 1/8 and at two that 16 bits cannot hold."""
    # As far from 0 as P of 16 bits is normal.
    offset = weights.offset or 0.0
    most = int(16 * min(9.5 - offset, 8.0))
    # P of the largest key is rounded as well, the same for all.
    one = torch.tensor(math.exp(-offset), dtype=torch.float64)
    top = float(rounded(one, _BITS.get(weights.p or "", 24), truncated=weights.truncated) / one)
    gaps = torch.randint(most - 32, most, (64,), generator=generator).double() / 16
    slopes = []
    for scale in _SCALES:
        g = gaps * scale / SCALE
        moved = -torch.log(ratios(ask, part, gaps, scale=scale) * top) - g
        slopes.append(float((moved * g).sum() / g.square().sum()))
    found = {"f32": [0.0] * 3}
    for name, bits in (("f16", 11), ("bf16", 8)):
        for unit, what in ((1.0, name), (1 / math.log(2), name + " in powers of two")):
            factor = torch.tensor([8 * scale * unit for scale in _SCALES], dtype=torch.float64)
            found[what] = (rounded(factor, bits) / factor - 1).tolist()
    off = {name: max(abs(a - b) for a, b in zip(told, slopes, strict=True)) for name, told in found.items()}
    name = min(off, key=lambda each: off[each])
    # A mean of 64 roundings of P, and float32 logits.
    return name.split()[0] if off[name] < u_p / 20 + 2e-5 else None


def _logit_type(ask: Asking, part: AskedPart, u_p: float, generator: torch.Generator) -> str | None:
    gaps = (torch.randperm(52, generator=generator).double()[:48] + 4) / 16
    moved = -torch.log(ratios(ask, part, gaps, base=_FAR)) - gaps
    largest = float(moved.abs().max())
    # float32 at 256, in natural and in binary logarithms.
    if largest < 2 * u_p + 3e-4:
        return "f32"
    for name, bits in (("f16", 11), ("bf16", 8)):
        # Rounding to nearest moves at most half a unit, and one of the key beside it.
        unit = _FAR * 2.0 ** (1 - bits)
        if unit / 16 < largest <= unit * 1.1 + 2 * u_p:
            return name
    return None


def _rescale(ask: Asking, part: tuple[int, int], weights: Weights, tiles: TilesSeen) -> float | None:
    """The largest growth for which P of a later, larger key is rounded as exp(growth), as it is for all
    smaller ones: where the maximum does not lag a single one may look like it by chance."""
    bits = {"f16": 11, "bf16": 8}.get(weights.p or "")
    keys = part[1] - part[0]
    if bits is None or weights.normalised or not tiles.keys or keys < 2 * tiles.keys + 1:
        return None
    where = AskedPart(*part, tiles.order == "backward")
    early, late = where.key(0), where.key(keys - 1)
    input_bits = 11 if ask.regime.dtype != torch.bfloat16 else 8
    c = weights.offset or 0.0
    one = torch.tensor(math.exp(-c), dtype=torch.float64)
    p_one = float(rounded(one, bits, truncated=weights.truncated) / one) - 1
    lags, rows, values, terms = [], [], [], []
    for growth in GROWTHS:
        gaps = growth + torch.arange(16, dtype=torch.float64) * min(growth, 1.0) / 16
        exact = torch.exp(gaps - c)
        off = rounded(exact, bits, truncated=weights.truncated) / exact - 1
        at = (off.abs() - 0.6 * off.abs().max()).abs().argmin()
        e = torch.exp(-gaps[at])
        v_a, v_b = (float(v) for v in cancelling(e[None], input_bits))
        rows.append(ask.level([late]))
        rows[-1][0, early] = -gaps[at]
        values.append(columns([{early: v_a, late: v_b}]))
        lags.append(float(off[at]))
        terms.append((float(e), v_a * float(e), v_b))
    lagging = 0.0
    found = ask.weigh_own(torch.cat(rows), values)
    for growth, lag, (e_g, x, v_b), out in zip(GROWTHS, lags, terms, found, strict=True):
        seen = (float(out) * (1 + e_g) - (x + v_b)) / x
        # P of the earlier key and P of the later one: both 1, or the later one exp(g), rounded.
        if not abs(seen - (p_one - lag)) < abs(lag) / 2 < abs(seen):
            break
        lagging = growth
    return lagging
