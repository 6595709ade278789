"""One kernel, one regime: everything that is read off it."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch

from verify.kernels.bits import same_bits
from verify.kernels.identify.asking import (
    LARGE,
    PROBED_KEYS,
    SCALE,
    Asking,
    BareKernel,
    NotIdentifiable,
    Regime,
    at_keys,
    columns,
)
from verify.kernels.identify.logits import Logits, logits_seen
from verify.kernels.identify.parts import Cuts, cuts_seen
from verify.kernels.identify.sums import SumsSeen, sums_seen
from verify.kernels.identify.weights import Weights, weights_as, weights_seen

# Fewer keys than these show next to nothing of how they are summed.
LEAST_KEYS = 16
# Results whose bits tell their type.
_RESULTS = 1000
# Repetitions of a call that gave other bits once.
_ASKED_AGAIN = 8
# Keys that are drawn; longer rows repeat them.
_DRAWN = 2048
# The error of a kernel, relative to sum p|v|, from which on it is wrong, whatever its arithmetic.
_WRONG = 1.0 / 8.0
# More than a result of 8 bits, and P of 11, round a value.
_CAST = 2.0**-8 + 2.0**-10


@dataclass(frozen=True)
class Reading:
    """What was seen of a kernel in one regime. None is what cannot be told; every field's probe is in `how`.

    Types are f32, tf32, f16, bf16, e4m3 or e5m2. Head groups are not observable: heads share nothing.
    """

    n_kv: int  # visible keys
    n_q: int  # query tokens a call
    p: str | None  # type of P in the second product
    p_truncated: bool  # rounded toward zero
    p_normalised: bool  # divided by l before it was rounded
    p_flushed: bool  # subnormal P are 0
    offset: float | None  # added to the maximum, nats
    l_of_rounded_p: bool | None  # l sums P after it was rounded
    accumulator: str | None  # type of the second product's
    accumulator_bits: int | None  # leading one included; None: more than can be told
    rounding: str | None  # of the accumulators: nearest or truncated
    flushed_every: int | None  # keys after which a narrow accumulator goes into a wider one
    mma_block: int | None  # keys of one product, where that is less than a tile or no tile was seen
    sum_step: int | None  # keys that are summed before they are added to a narrow accumulator
    sum_keys: tuple[int, ...]  # keys that one narrow accumulator takes, where that was counted; else empty
    first_product: str | None  # type of q and k as they are multiplied
    q_scaled_in: str | None  # type of q where it was multiplied by the scale first
    logits: str | None  # type of the logits
    rescale: float | None  # largest growth of the maximum by which sums are not rescaled; 0: always
    tile: int | None  # keys over which the maximum is taken
    tile_order: str | None  # in which a part's tiles are walked: forward or backward
    cuts: tuple[int, ...]  # bounds of the KV parts
    parts_in: str | None  # type of partial results before they are merged
    merge: str  # none: one part; normalised: parts are divided by their l before they are merged
    result: str | None  # type of the result
    exponential: float  # largest relative error of exp(-g) seen beside roundings of P
    deterministic: bool  # the same call gave the same bits
    row_alone: bool | None  # a row alone has the bits of that row in a batch
    how: dict[str, str] = field(default_factory=dict, compare=False)  # field -> the probe that showed it
    calls: int = field(default=0, compare=False)  # that were made

    @property
    def parts(self) -> int:
        return len(self.cuts) - 1

    @property
    def same_as(self) -> tuple[object, ...]:
        """Equal for two lengths of one regime: all but the cuts, and what few keys do not show."""
        return (self.weights, self.accumulator, self.result)

    @property
    def weights(self) -> tuple[object, ...]:
        """What P is rounded to, and how."""
        return (self.p, self.p_truncated, self.p_normalised)

    @property
    def sums(self) -> tuple[object, ...]:
        """How the second product is summed, as far as more keys do not show more of it."""
        product = self.mma_block if self.tile is None else None
        return (self.accumulator, self.rounding, self.tile, self.tile_order, product)

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["parts"], found["cuts"] = self.parts, list(self.cuts)
        found["confidence"] = found.pop("how")
        for name in ("exponential",):
            if not math.isfinite(found[name]):
                found[name] = None
        return found


def read(asked: BareKernel, regime: Regime, *, known: Reading | None = None, seed: int = 0) -> Reading:
    """Everything that is read in a regime.

    known: what was read of the same calls with fewer keys. Where P, its sums and the result are as they were
    there, the rest is taken from it, at half the calls, and `how` says so.

    Raises NotIdentifiable with the reason: it fails, is not deterministic, clamps, casts, or is wrong.
    """
    if regime.n_kv < LEAST_KEYS:
        raise ValueError(f"n_kv: expected at least {LEAST_KEYS}, got {regime.n_kv}")
    ask = Asking(asked, regime)
    generator = torch.Generator().manual_seed(seed)
    if known is not None and not _tells(known):
        known = None
    sound = _sound(ask, generator, repeats=2 if known is None else 1)
    if known is None:
        _check_range(ask)
    cuts = cuts_seen(ask, generator)
    part = max(itertools.pairwise(cuts.bounds), key=lambda each: each[1] - each[0])
    if part[1] - part[0] < 3:
        raise NotIdentifiable(f"its parts are of {part[1] - part[0]} keys: no two keys share a sum")
    if known is not None:
        if (found := _as_known(ask, known, sound, cuts, part, seed)) is not None:
            return found
        _check_range(ask)
    weights = weights_seen(ask, part, generator)
    sums = sums_seen(ask, part, weights)
    before = _Before.of(logits_seen(ask, part, weights, sums.tiles, generator), _row_alone(ask, sound))
    return _put_together(ask, cuts, weights, sums, before, sound)


def _tells(known: Reading) -> bool:
    """Whether more keys than it has would show no more of what it is: its probes look at no more."""
    return max(b - a for a, b in itertools.pairwise(known.cuts)) >= PROBED_KEYS


def _as_known(
    ask: Asking,
    known: Reading,
    sound: _Sound,
    cuts: Cuts,
    part: tuple[int, int],
    seed: int,
) -> Reading | None:
    """The reading of a length that is of the known one's regime; None of any other."""
    # Its own: what is read anew after it is what would have been read without it.
    generator = torch.Generator().manual_seed(seed)
    weights = weights_as(
        ask,
        part,
        generator,
        known.p,
        known.offset,
        truncated=known.p_truncated,
        normalised=known.p_normalised,
    )
    if weights is None or sound.result != known.result:
        return None
    weights = weights._replace(l_of_rounded=known.l_of_rounded_p, flushed=known.p_flushed)
    sums = sums_seen(ask, part, weights)
    found = _put_together(ask, cuts, weights, sums, _Before.as_known(known), sound)
    if found.sums != known.sums:
        return None
    return replace(found, how={**found.how, "regime": f"the rest as at {known.n_kv} keys"})


def bits_of(asked: BareKernel, regime: Regime) -> str:
    """A hash of a kernel's result for inputs that are always the same. Raises NotIdentifiable."""
    ask, generator = Asking(asked, regime), torch.Generator().manual_seed(3)
    q, k, v = (_drawn(ask, regime.batch, which, generator) for which in "qkv")
    return hashlib.sha256(ask.call(q, k, v).contiguous().numpy().tobytes()).hexdigest()


class _Before(NamedTuple):
    """What is read beside the second product, as `Reading` has it."""

    first_product: str | None
    q_scaled_in: str | None
    logits: str | None
    rescale: float | None
    row_alone: bool | None

    @classmethod
    def of(cls, seen: Logits, row_alone: bool | None) -> _Before:
        return cls(*seen, row_alone)

    @classmethod
    def as_known(cls, known: Reading) -> _Before:
        return cls(*(getattr(known, name) for name in cls._fields))


def _put_together(
    ask: Asking, cuts: Cuts, weights: Weights, sums: SumsSeen, before: _Before, sound: _Sound
) -> Reading:
    accumulator, tile = _accumulator(sums), sums.tiles.keys
    # Narrow sums within a tile, wide ones across: what is added up there is flushed.
    flushed = None
    if sums.tile_bits is not None and (sums.bits is None or sums.tile_bits < sums.bits):
        flushed = tile or sums.product
    block = sums.product if sums.product and (tile is None or sums.product < tile) else None
    how = {
        "p": f"cancelling pairs of keys; largest error of P {weights.error:.2g}",
        "offset": "phase of P's steps and where it underflows"
        if weights.offset_sure and weights.p != "f32"
        else "a key alone, to the bit"
        if weights.p == "f32"
        else "phase of P's steps: up to multiples of ln 2",
        "accumulator": "a small number beside a large one that is taken away later",
        "tile": sums.tiles.how or "nothing shows it",
        "cuts": "residues of pairs of keys",
        "result": f"bits of {_RESULTS} results",
        "heads": "head groups are not observable",
    }
    if block is not None:
        how["mma_block"] = "order of sums"
    if sums.tiles.order is not None:
        how["tile_order"] = "mirrored pairs of keys"
    if not sound.steady:
        how["deterministic"] = f"the first call gave other bits than the {_ASKED_AGAIN} after it"
    return Reading(
        n_kv=ask.regime.n_kv,
        n_q=ask.regime.n_q,
        p=weights.p,
        p_truncated=weights.truncated,
        p_normalised=weights.normalised,
        p_flushed=weights.flushed,
        offset=weights.offset,
        l_of_rounded_p=weights.l_of_rounded,
        accumulator=accumulator,
        accumulator_bits=sums.bits,
        rounding=None if sums.truncated is None else "truncated" if sums.truncated else "nearest",
        flushed_every=flushed,
        mma_block=block,
        sum_step=sums.product if accumulator not in ("f32", None) else None,
        sum_keys=sums.counted,
        first_product=before.first_product,
        q_scaled_in=before.q_scaled_in,
        logits=before.logits,
        rescale=before.rescale,
        tile=tile,
        tile_order=sums.tiles.order,
        cuts=cuts.bounds,
        parts_in=cuts.stored_in,
        merge="none" if len(cuts.bounds) == 2 else "normalised",
        result=sound.result,
        exponential=weights.exponential,
        deterministic=sound.steady,
        row_alone=before.row_alone,
        how=how,
        calls=ask.calls,
    )


def _accumulator(sums: SumsSeen) -> str | None:
    bits = min((b for b in (sums.bits, sums.tile_bits) if b is not None), default=None)
    if bits is None or bits >= 22:
        return "f32"
    if bits == 11:
        return "tf32" if sums.wide else "f16"
    return {8: "bf16", 4: "e4m3", 3: "e5m2"}.get(bits)


class _Sound(NamedTuple):
    """A kernel that something can be read off: the type of its results, and a call that it answered."""

    result: str | None
    inputs: tuple[torch.Tensor, ...]  # q, k, v, drawn
    out: torch.Tensor
    steady: bool  # all calls gave the same bits; else all but the first


def _sound(ask: Asking, generator: torch.Generator, repeats: int) -> _Sound:
    """repeats: of its first call. Raises NotIdentifiable for a kernel that nothing can be read off."""
    r = ask.regime
    bits = seen = 0
    first: tuple[tuple[torch.Tensor, ...], torch.Tensor, bool] | None = None
    while first is None or seen < _RESULTS:
        q, k, v = (_drawn(ask, r.batch, which, generator) for which in "qkv")
        out = ask.call(q, k, v)
        if first is None:
            if list(out.shape) != (due := [*q.shape[:3], r.size]):
                raise NotIdentifiable(f"its result has shape {list(out.shape)}, expected {due}")
            again, steady = _repeated(ask, (q, k, v), out, repeats)
            _check_right(ask, q, k, v, out)
            first = (q, k, v), again, steady
        if not bool((some := out[out != 0]).numel()):
            raise NotIdentifiable("it is not attention: all of a result is 0")
        bits = max(bits, int(_bits_used(torch.frexp(some).mantissa).max()))
        seen += out.numel()
    by_bits = ((3, "e5m2"), (4, "e4m3"), (8, "bf16"), (11, "f16"))
    name = next((name for most, name in by_bits if bits <= most), "f32" if bits > 16 else None)
    if name == "f16" and not _has_steps_of_float16(ask):
        name = "tf32"
    return _Sound(name, *first)


def _repeated(
    ask: Asking, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], out: torch.Tensor, repeats: int
) -> tuple[torch.Tensor, bool]:
    """What the same call gives again, and whether it gave that at first.

    A library may choose its kernel while it is first called. Raises NotIdentifiable where later calls differ.
    """
    later = [ask.call(*inputs) for _ in range(repeats)]
    if all(same_bits(out, each) for each in later):
        return out, True
    later += [ask.call(*inputs) for _ in range(_ASKED_AGAIN - repeats)]
    if all(same_bits(later[0], each) for each in later):
        return later[0], False
    other = sum(not same_bits(a, b) for a, b in itertools.pairwise([out, *later]))
    off = max(float((each - out).norm() / out.norm().clamp(min=1e-300)) for each in later)
    raise NotIdentifiable(
        f"it is not deterministic: {other} of {_ASKED_AGAIN} repetitions of a call gave other bits than the"
        f" call before, by up to {off:.1g} of the result"
    )


def _drawn(ask: Asking, batch: int, which: str, generator: torch.Generator) -> torch.Tensor:
    """Gaussian q, k or v of the regime, in its type and on its device; long rows repeat their keys."""
    r = ask.regime
    rows, heads = (r.n_q, r.kv_heads * r.ratio) if which == "q" else (r.n_kv, r.kv_heads)
    size = r.size if which == "v" else r.k_size
    drawn = torch.randn(batch, min(rows, _DRAWN), heads, size, generator=generator, dtype=torch.float32)
    x = drawn.to(r.dtype).to(r.device)
    return x.repeat(1, -(-rows // x.shape[1]), 1, 1)[:, :rows]


def _bits_used(mantissa: torch.Tensor) -> torch.Tensor:
    """Bits of each mantissa, at most 24, from the leading one to the last that is set."""
    whole = (mantissa.abs() * 2.0**24).round().to(torch.int64)
    lowest = torch.log2((whole & -whole).double()).to(torch.int64)
    return 24 - lowest


def _has_steps_of_float16(ask: Asking) -> bool:
    """Whether results below 2^-14 have fewer bits: a key alone of value 3 * 2^-17 + 2^-24 keeps both."""
    if ask.regime.dtype == torch.bfloat16:
        values = [2.0**-20 * x for x in (1.0, 1.03125, 1.0625)]
    else:
        values = [2.0**-24 * x for x in (3.0, 5.0, 7.0)]
    # Two keys, one of value 0: half of an odd number of the smallest steps.
    found = ask.weigh(ask.level([0, 1]), columns([{0: v} for v in values]))[0]
    return bool((found != torch.tensor(values, dtype=torch.float64) / 2).any())


def _check_right(ask: Asking, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """Whether drawn inputs come out as attention, as far as every arithmetic agrees: their last rows."""
    off = torch.cat([_off_of_head(ask, q, k, v, out, head) for head in range(ask.regime.kv_heads)])
    if not bool((off < _WRONG).all()):
        raise NotIdentifiable(
            f"it is not attention: drawn inputs come out {float(off.nan_to_num(math.inf).max()):.0%} off,"
            " and no arithmetic explains more than an eighth"
        )


def _off_of_head(
    ask: Asking, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, head: int
) -> torch.Tensor:
    """How far the last row is off, relative, for the query heads of a KV head: [B * r]."""
    heads = slice(head * ask.regime.ratio, (head + 1) * ask.regime.ratio)
    its_k, its_v = k[:, :, head].double(), v[:, :, head].double()
    p = torch.softmax(SCALE * torch.einsum("brd,bsd->brs", q[:, -1, heads].double(), its_k), -1)
    exact, size = torch.bmm(p, its_v).cpu(), torch.bmm(p, its_v.abs()).cpu()
    return ((out[:, -1, heads] - exact).norm(dim=-1) / size.norm(dim=-1)).flatten()


def _check_range(ask: Asking) -> None:
    """Whether values and differences of logits pass as they are: a kernel that clamps them shows nothing."""
    n = ask.regime.n_kv
    found = ask.weigh(ask.level([n - 1]), columns([{n - 1: LARGE}, {0: LARGE}]))[0]
    g = torch.Generator().manual_seed(2)
    fine = torch.randint(129, 256, (ask.regime.columns,), generator=g).double()
    off = (ask.weigh(ask.level([n - 1]), at_keys(n - 1, fine))[0] / fine - 1).abs().max()
    if not abs(float(found[1])) < 1.0:
        raise NotIdentifiable(
            f"logits are clamped: a key 64 below the largest has a weight of {float(found[1]) / LARGE:.2g}"
        )
    if not abs(float(found[0]) / LARGE - 1) < _WRONG:
        raise NotIdentifiable(f"values are clamped: a key alone of value {LARGE:g} gives {float(found[0]):g}")
    if not float(off) < _CAST:
        raise NotIdentifiable(
            f"values are cast: a key alone gives its values of 8 bits {float(off):.2%} off, and sums of such"
            " values show nothing"
        )


def _row_alone(ask: Asking, sound: _Sound) -> bool | None:
    """Whether a sequence has the bits that it has alone between two others."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (x[:1] for x in sound.inputs)
    others = (_drawn(ask, 2, which, g) for which in "qkv")
    many_q, many_k, many_v = (torch.cat([o[:1], x, o[1:]]) for x, o in zip((q, k, v), others, strict=True))
    try:
        alone = sound.out if sound.out.shape[0] == 1 else ask.call(q, k, v)
        return same_bits(ask.call(many_q, many_k, many_v)[1:2], alone)
    except NotIdentifiable:
        return None
