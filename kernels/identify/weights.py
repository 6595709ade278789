"""The type of P as it enters the second product, its rounding, an offset on the maximum, and what l sums.

Key b has the largest logit, 0, and comes first; key a has the logit -g. A column that holds v_b at b and v_a
at a gives (P_b v_b + P_a v_a) / l. v_a and v_b are chosen so that v_b + v_a exp(-g) = 0 to 2^-20: what is
left is what rounding made of P_a and P_b, and even a 16-bit result shows it. With R(g) = P_a / P_b and P of
t bits,

    R(g) = A(g) / A(0) * 2^k,     A(g), A(0) whole numbers from 2^(t-1) to 2^t

so t is the smallest for which some A(0) makes all of them whole. P was X exp(-g) 2^k before it was rounded,
X = 2^(t-1) exp(-c) (times a power of two): every g bounds X from both sides, by half a unit either way where
P is rounded to nearest and by one unit above where it is truncated. Whichever leaves an X is how P is
rounded; X gives c up to multiples of ln 2, and where P underflows gives the multiple.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from verify.kernels.identify.asking import (
    DEAD,
    SCALE,
    Asking,
    NotIdentifiable,
    ValueColumns,
    at_keys,
    together,
)

# Differences of logits that are asked: numbers of 8 bits, whose exp(-g) have all kinds of mantissas.
_GAPS = 256
_LEAST_GAP, _LARGEST_GAP = 0.25, 3.5
# Relative error of R from float32 exponentials, logits and sums; of a cubic exponential, which is 1e-4 off.
_EXACT = 2.0**-19
_LOOSE = 2.0e-4
# Keys of a product, counted from the first of a part; where the last has fewer than so many the one before it
# is asked.
_PRODUCT, _FEW = 16, 8
# Relative errors of a scale that was rounded to 16 bits, in steps that no mantissa of P can tell apart.
_SLOPES = torch.arange(-140, 141, dtype=torch.float64) * 3e-5


class WeightType(NamedTuple):
    """A type that P may have: bits of its mantissa, leading one included, and its least exponents."""

    name: str
    bits: int
    normal: int  # exponent of the smallest normal number
    least: int  # of the smallest subnormal one


TYPES = (
    WeightType("e5m2", 3, -14, -16),
    WeightType("e4m3", 4, -6, -9),
    WeightType("bf16", 8, -126, -133),
    WeightType("f16", 11, -14, -24),
    WeightType("tf32", 11, -126, -136),
)


class AskedPart(NamedTuple):
    """Bounds of a part whose keys are asked. newest_first: its last tile is summed first."""

    first: int
    end: int
    newest_first: bool = False

    def key(self, i: int) -> int:
        """The key that is looked at after so many others, tile by tile."""
        return self.end - 1 - i if self.newest_first else self.first + i

    @property
    def together(self) -> range:
        """Keys of a product that is summed first, or nearly."""
        keys = self.end - self.first
        whole, tail = divmod(keys, _PRODUCT)
        if not self.newest_first or not whole:
            return range(self.first, min(self.end, self.first + _PRODUCT))
        start = self.first + _PRODUCT * (whole if tail >= _FEW else whole - 1)
        return range(start, min(self.end, start + _PRODUCT))


class Weights(NamedTuple):
    """What was seen of P."""

    p: str | None  # name of its type, f32 for none narrower; None: it cannot be told
    truncated: bool  # rounded toward zero
    offset: float | None  # added to the maximum, nats; None: it cannot be told
    offset_sure: bool  # its multiple of ln 2 was seen
    normalised: bool  # P was divided by l before it was rounded
    l_of_rounded: bool | None  # l sums rounded P
    flushed: bool  # subnormal P are 0
    exponential: float  # largest relative error of exp(-g) seen beside the rounding of P
    slope: float  # logits are so much larger than they should be, relative, as a rounded scale makes them
    error: float  # largest relative error of P seen
    newest_first: bool  # as of `AskedPart`


def weights_seen(ask: Asking, part: tuple[int, int], generator: torch.Generator) -> Weights:
    """part: bounds of a part of at least three keys."""
    gaps = _gaps(_LEAST_GAP, _LARGEST_GAP, _GAPS, generator)
    divided: Weights | None = None
    for newest_first in (False, True):
        where = AskedPart(*part, newest_first)
        ratio = ratios(ask, where, gaps)
        error = (ratio / torch.exp(-gaps) - 1).abs()
        if not bool(torch.isfinite(error).all()) or float(error.max()) > 0.5:
            raise NotIdentifiable("its weights are not exp(s - m): columns of two keys do not cancel")
        # Of keys in another tile than the largest nothing is rounded, if that tile is summed later.
        if (grid := _grid(gaps, ratio)) is not None:
            found = _of_grid(ask, where, gaps, ratio, grid, generator)
            # It may look divided where a maximum lags behind, and the largest key is looked at last.
            if not found.normalised:
                return found
            divided = divided or found
        elif divided is not None:
            break
        elif float(error.max()) <= 2 * _LOOSE and not newest_first:
            seen_late = ratios(ask, AskedPart(*part, True), gaps)
            if _grid(gaps, seen_late) is None:
                break
    if divided is not None:
        return divided
    where = AskedPart(*part)
    ratio = ratios(ask, where, gaps)
    error = (ratio / torch.exp(-gaps) - 1).abs()
    worst = float(error.max())
    # Keys of one call share l: P that was divided by it lies on another grid in each call.
    once = gaps[: min(part[1] - part[0] - 1, ask.regime.columns, len(gaps) // 2)]
    if len(once) >= 32 and (grid := _grid(once, _ratios_of_one_l(ask, where, once))) is not None:
        return _seen(grid, worst, where)
    told = worst <= 2 * _LOOSE
    harmless = told and _one_hot_is_exact(ask, where, generator)
    return Weights(
        p="f32" if told else None,
        truncated=False,
        offset=0.0 if harmless else None,
        offset_sure=harmless,
        normalised=False,
        l_of_rounded=False if told else None,
        flushed=False,
        exponential=worst if told else math.nan,
        slope=0.0,
        error=worst,
        newest_first=False,
    )


def weights_as(
    ask: Asking,
    part: tuple[int, int],
    generator: torch.Generator,
    p: str | None,
    offset: float | None,
    *,
    truncated: bool,
    normalised: bool,
) -> Weights | None:
    """P, where it is this one; what l sums is not asked. None of another, of one that was divided by l, and
    where little was told before."""
    if p is None or normalised or (p != "f32" and offset is None):
        return None
    gaps = _gaps(_LEAST_GAP, _LARGEST_GAP, _GAPS, generator)
    grids = []
    for newest_first in (False, True):
        where = AskedPart(*part, newest_first)
        ratio = ratios(ask, where, gaps)
        worst = float((ratio / torch.exp(-gaps) - 1).abs().nan_to_num(math.inf).max())
        grid = _grid(gaps, ratio)
        if grid is None and worst > 2 * _LOOSE:
            return None
        grids.append((grid, worst, where))
        if grid is not None:
            break
    grid, worst, where = grids[-1]
    if grid is None:
        same, worst = p == "f32", max(each[1] for each in grids)
    else:
        kind, multiple, _ = _range(ask, where, grid, _phase(grid), generator)
        seen = _phase(grid) + (multiple or 0) * math.log(2)
        same = kind is not None and (kind.name, grid.truncated) == (p, truncated)
        same = same and abs(seen - (offset or 0.0)) < 0.01
    if not same:
        return None
    return Weights(
        p=p,
        truncated=truncated,
        offset=offset,
        offset_sure=offset is not None,
        normalised=False,
        l_of_rounded=None,
        flushed=False,
        exponential=worst if grid is None else max(grid.gap, 0.0),
        slope=0.0 if grid is None else grid.slope,
        error=worst,
        newest_first=where.newest_first and grid is not None,
    )


def _phase(grid: _Grid) -> float:
    """The offset up to multiples of ln 2, nearest to 0."""
    phase = (grid.bits - 1) * math.log(2) - math.log(grid.x)
    return phase - round(phase / math.log(2)) * math.log(2)


def _of_grid(
    ask: Asking,
    part: AskedPart,
    gaps: torch.Tensor,
    ratio: torch.Tensor,
    grid: _Grid,
    generator: torch.Generator,
) -> Weights:
    """What ratios that lie on a grid say."""
    bits, x = grid.bits, grid.x
    phase = _phase(grid)
    doubled = _grid(gaps, ratios(ask, part, gaps, extra=0.5))
    found = _seen(grid, float((ratio / torch.exp(-gaps) - 1).abs().max()), part)
    if doubled is None or abs(math.log(doubled.x / x)) > 0.01:
        return found
    kind, multiple, flushed = _range(ask, part, grid, phase, generator)
    offset = phase + (multiple or 0) * math.log(2)
    return found._replace(
        p=None if kind is None else kind.name,
        normalised=False,
        flushed=flushed,
        # Half a unit of X among hundreds of bounds: what is nearer to 0 than that is 0.
        offset=0.0 if abs(offset) < 2.0 ** (-bits - 3) else offset,
        offset_sure=multiple is not None,
        l_of_rounded=_summed(ask, part, grid, generator),
    )


def _seen(grid: _Grid, worst: float, part: AskedPart) -> Weights:
    """What a grid alone says, of P that was divided by l."""
    return Weights(
        p={8: "bf16", 11: "f16", 4: "e4m3", 3: "e5m2"}[grid.bits],
        truncated=grid.truncated,
        offset=None,
        offset_sure=False,
        normalised=True,
        l_of_rounded=None,
        flushed=False,
        exponential=max(grid.gap, 0.0),
        slope=grid.slope,
        error=worst,
        newest_first=part.newest_first,
    )


def ratios(
    ask: Asking,
    part: AskedPart,
    gaps: torch.Tensor,
    *,
    extra: float | None = None,
    scale: float = SCALE,
    base: float = 0.0,
) -> torch.Tensor:
    """P of a key of logit -g over P of the largest, for each g.

    All keys of a row of logits lie near each other: kernels whose threads take every so many keys keep a
    maximum each. extra: how far below the largest all keys lie which are not asked; None: they have no
    weight. scale and base: of the call (`Asking.weigh`); what is asked then are 8 scale times the gaps.
    """
    rows = []
    near = part.together
    for g in gaps.split(max(min(len(near) - 1, ask.own), 1)):
        top, keys = near[0], torch.tensor(near[1 : 1 + len(g)])
        if part.newest_first:
            top, keys = near[-1], torch.tensor(near[-1 - len(g) : -1])
        logits = ask.level([top], DEAD if extra is None else -extra)
        if part.newest_first:
            # What is looked at before must leave no maximum that may lag.
            logits[0, near[-1] + 1 : part.end] = DEAD
        logits[0, keys] = -g
        rows.append(_Row(logits, _cancelling_columns(ask, g, top, keys, scale), g))
    all_logits = torch.cat([row.logits for row in rows])
    seen = ask.weigh_own(all_logits, [row.values for row in rows], scale=scale, base=base)
    return torch.cat([_of_row(ask, row, one, scale) for row, one in zip(rows, seen, strict=True)])


def _ratios_of_one_l(ask: Asking, part: AskedPart, gaps: torch.Tensor) -> torch.Tensor:
    """`ratios` of keys that share one row of logits, and so l: the part's first one and those beside it."""
    top, keys = part.first, torch.arange(part.first + 1, part.first + 1 + len(gaps))
    logits = ask.level([top])
    logits[0, keys] = -gaps
    row = _Row(logits, _cancelling_columns(ask, gaps, top, keys, SCALE), gaps)
    return _of_row(ask, row, ask.weigh(logits, row.values)[0], SCALE)


class _Row(NamedTuple):
    """A row of logits [1, n], a column for each of its gaps, and these."""

    logits: torch.Tensor
    values: ValueColumns
    gaps: torch.Tensor


def _cancelling_columns(
    ask: Asking, gaps: torch.Tensor, top: int, keys: torch.Tensor, scale: float
) -> ValueColumns:
    v_a, v_b = cancelling(torch.exp(-gaps * scale / SCALE), 11 if ask.regime.dtype != torch.bfloat16 else 8)
    large, small = at_keys(top, v_b), at_keys(keys, v_a)
    pairs = together([large, small])
    return pairs._replace(at=pairs.at % len(gaps), width=len(gaps))


def _of_row(ask: Asking, row: _Row, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """Ratios from the results of a row."""
    e = torch.exp(-row.gaps * scale / SCALE)
    count = len(row.gaps)
    v_b, v_a = row.values.values[:count], row.values.values[count:]
    x, l = v_a * e, torch.exp(row.logits * scale / SCALE).sum()
    return e * (1 + (seen * l - (x + v_b)) / x)


def cancelling(e: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """v_a and v_b of so many bits, about 2^14, with v_a e + v_b as near to 0 as can be."""
    steps = torch.arange(2 ** (bits - 1), 2**bits, dtype=torch.float64) * 2.0 ** (15 - bits)
    x = steps * e[:, None]
    near = rounded(x, bits)
    best = ((near - x).abs() / x).argmin(1)
    at = torch.arange(len(e))
    return steps[best], -near[at, best]


def rounded(x: torch.Tensor, bits: int, *, truncated: bool = False, least: float = -1000) -> torch.Tensor:
    """x at so many bits, in steps of 2^least at the least: to nearest, ties to even, or toward zero."""
    step = torch.exp2((torch.frexp(x).exponent.double() - bits).clamp(min=least))
    return (torch.floor(x / step) if truncated else torch.round(x / step)) * step


def _gaps(low: float, high: float, count: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of 8 bits between low and high, at most `count`, drawn."""
    every = [torch.arange(128, 256, dtype=torch.float64) * 2.0**e for e in range(-12, 1)]
    g = torch.cat(every)
    g = g[(g >= low) & (g <= high)]
    return g[torch.randperm(len(g), generator=generator)[:count]]


class _Grid(NamedTuple):
    """bits: of P; truncated; x: X; slope: logits are so much larger than asked, relative; gap: by how much,
    relative, bounds of X contradict each other."""

    bits: int
    truncated: bool
    x: float
    slope: float
    gap: float


def _grid(gaps: torch.Tensor, ratio: torch.Tensor) -> _Grid | None:
    """The coarsest grid that all ratios lie on; None for none of at most 11 bits."""
    for bits in sorted({t.bits for t in TYPES}):
        firsts = torch.arange(2 ** (bits - 1), 2**bits, dtype=torch.float64)
        z = firsts[:, None] * ratio
        z = z * torch.exp2(bits - torch.frexp(z).exponent.double())
        off = (z - z.round()).abs()
        fits = (off < 0.03 + 2.0**bits * _EXACT).double().mean(1)
        for i in fits.argsort(descending=True)[:3].tolist():
            if fits[i] < 0.97:
                break
            found = _bounds(gaps, ratio, bits, float(firsts[i]))
            if found is not None:
                return found
    return None


def _bounds(gaps: torch.Tensor, ratio: torch.Tensor, bits: int, first: float) -> _Grid | None:
    """What A(0) and every A(g) say; None where neither rounding leaves an X."""
    a = first * ratio
    scale = torch.exp2(bits - torch.frexp(a).exponent.double())
    a = torch.cat([torch.tensor([first], dtype=torch.float64), (a * scale).round()])
    # Where the scale of the logits was rounded, exponents are larger by a common factor.
    for slopes in (torch.zeros(1, dtype=torch.float64), _SLOPES):
        w = torch.cat(
            [
                torch.ones(len(slopes), 1, dtype=torch.float64),
                scale * torch.exp(-gaps * (1 + slopes[:, None])),
            ],
            1,
        )
        # Numbers next to a power of two have another step on one side.
        inner = (a > 2.0 ** (bits - 1)) & (a < 2.0**bits)
        inner[0] = True
        best: _Grid | None = None
        for truncated, below, above in ((False, 0.5, 0.5), (True, 0.0, 1.0)):
            low, high = ((a - below) / w)[:, inner], ((a + above) / w)[:, inner]
            if first == 2 ** (bits - 1) and not truncated:
                low[:, 0] = first - 0.25
            gap, at = ((low.amax(1) - high.amin(1)) / first).min(0)
            if best is None or float(gap) < best.gap:
                low_x, high_x = float(low[at].max()), float(high[at].min())
                x = (low_x + high_x) / 2
                whole, slack = 2.0 ** (bits - 1), max(float(gap), 0.0) * first + 1e-6 * first
                if low_x - slack <= whole <= high_x + slack:
                    x = whole
                best = _Grid(bits, truncated, x, float(slopes[at]), float(gap))
        if best is not None and best.gap <= _LOOSE:
            return best
    return None


def _range(
    ask: Asking, part: AskedPart, grid: _Grid, phase: float, generator: torch.Generator
) -> tuple[WeightType | None, int | None, bool]:
    """Which type of so many bits P has, the multiple of ln 2 in its offset, and whether subnormal P are 0: by
    where it underflows."""
    bits, truncated = grid.bits, grid.truncated
    kinds = [t for t in TYPES if t.bits == bits and t.normal > -100]
    if not kinds:
        return next((t for t in TYPES if t.bits == bits), None), None, False
    kind = kinds[0]
    low, high = 0.69 * (-kind.normal) - 4.5, 0.69 * (-kind.least) + 1
    low = max(low, 0.25)
    gaps = _gaps(low, min(high, 16.0), 64, generator)
    ratio = ratios(ask, part, gaps)
    seen = ratio * torch.exp(gaps) - 1
    fits = []
    for multiple in range(-16, 17):
        for flushed in (False, True):
            c = phase + multiple * math.log(2)
            p = torch.exp(-gaps * (1 + grid.slope) - c)
            q = rounded(p, bits, truncated=truncated, least=kind.least)
            if flushed:
                q = torch.where(p < 2.0**kind.normal, 0.0, q)
            largest = torch.tensor(math.exp(-c), dtype=torch.float64)
            told = q / rounded(largest, bits, truncated=truncated) * torch.exp(gaps) - 1
            fits.append((float((told - seen).abs().mean()), multiple, flushed))
    misfit, multiple, flushed = min(fits)
    # The same bits, and a range so wide that nothing underflows here.
    wide = next((t for t in TYPES if t.bits == bits and t.normal < -100), None)
    p, one = torch.exp(-gaps * (1 + grid.slope) - phase), torch.tensor(math.exp(-phase), dtype=torch.float64)
    told = (
        rounded(p, bits, truncated=truncated) / rounded(one, bits, truncated=truncated) * torch.exp(gaps) - 1
    )
    if wide is not None and float((told - seen).abs().mean()) < misfit:
        return wide, None, False
    return (kind, multiple, flushed) if misfit < 2.0**-bits else (None, None, False)


def _summed(ask: Asking, part: AskedPart, grid: _Grid, generator: torch.Generator) -> bool | None:
    """Whether l sums rounded P: keys of one g, whose P is rounded far, and values of many mantissas.

    Few keys: in another tile, that is summed before the largest one's, they are not rounded.
    """
    bits, truncated, x = grid.bits, grid.truncated, grid.x
    first, keys = part.key(0), [part.key(i) for i in range(1, min(part.end - part.first, _PRODUCT))]
    gaps = _gaps(0.25, 2.0, 128, generator)
    scale = x / 2.0 ** (bits - 1)
    off = rounded(scale * torch.exp(-gaps), bits, truncated=truncated) / (scale * torch.exp(-gaps)) - 1
    order = off.argsort()
    # Rounded far, half of them up and half down: an exponential that is off by a factor moves all alike.
    gaps = gaps[torch.cat([order[:4], order[-4:]])]
    p_b = float(rounded(torch.tensor(scale, dtype=torch.float64), bits, truncated=truncated))
    p = ratios(ask, part, gaps) * p_b
    logits = torch.cat([ask.level([first]) for _ in gaps])
    logits[:, keys] = -gaps[:, None]
    # 8 bits, as every 16-bit type has them.
    v = torch.randint(128, 256, (ask.regime.columns,), generator=generator).double()
    # One key at a time, so that sums round little.
    out = ask.weigh(logits, at_keys(keys[0], v))
    as_is = scale + len(keys) * scale * torch.exp(-gaps * (1 + grid.slope))
    as_rounded = p_b + len(keys) * p
    seen = (out * (as_is / p)[:, None] / v - 1).mean(1)
    told = as_is / as_rounded - 1
    told, seen = told - told.mean(), seen - seen.mean()
    slope = float((seen * told).sum() / told.square().sum())
    unsure = float((seen - slope * told).norm() / told.norm()) / math.sqrt(len(gaps) - 2)
    if unsure > 0.12 or min(abs(slope), abs(slope - 1)) > 0.3:
        return None
    return slope > 0.5


def _one_hot_is_exact(ask: Asking, part: AskedPart, generator: torch.Generator) -> bool:
    """Whether a key alone gives its value to the bit: P of the largest key is then a power of two."""
    v = torch.randint(128, 256, (ask.regime.columns,), generator=generator).double()
    return bool((ask.weigh(ask.level([part.first]), at_keys(part.first, v))[0] == v).all())
