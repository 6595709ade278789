"""What `verify identify` prints: a line a regime, and the JSON."""

from __future__ import annotations

from typing import Any

from verify.identify.regimes import RegimeSeen
from verify.identify.run import IdentifyOutcome
from verify.identify.told import WORDS
from verify.kernels.identify.reading import Reading

# Cuts of a picture of the order of summation.
_MOST_PARTS = 6


def identify_json(outcome: IdentifyOutcome) -> dict[str, Any]:
    """As `docs/json-of-commands.md` lists it."""
    found = outcome.found
    return {
        "schema": 1,
        "command": "identify",
        "spec": found.spec,
        "exit_code": outcome.exit_code,
        "identifiable": bool(found.readings),
        "reasons": sorted({each.reason for each in found.seen if each.reason}),
        "regimes": [{**each.to_json(), "said": sentence(each)} for each in found.stretches],
        "contradictions": outcome.contradictions,
        "not_looked_at": found.not_looked_at,
        "device": outcome.device,
        "seconds": round(found.seconds, 2),
    }


def identify_lines(outcome: IdentifyOutcome) -> list[str]:
    """The screen."""
    found = outcome.found
    lines = [f"{found.spec}: as seen from q, k, v and out alone"]
    first = found.stretches[0].last.place[:2] if found.stretches else ()
    for each in found.stretches:
        span = f"n_kv {each.low}" + (f" to {each.high}" if each.high > each.low else "")
        where = f"{span}, n_q {each.last.n_q}"
        if each.last.place[:2] != first:
            where += f", ratio {each.last.ratio}, {each.last.batch} sequences"
        lines.append(f"{where}: {sentence(each)}")
        if (reading := each.last.reading) is not None:
            lines.append(f"  order at {reading.n_kv} keys: {order_of(reading)}")
            lines += [f"  cannot be told: {', '.join(unknown)}"] if (unknown := untold(reading)) else []
    lines += [f"finding: {found.spec} {each}" for each in outcome.contradictions]
    lines += [f"not looked at: {each}" for each in found.not_looked_at]
    if found.readings:
        lines.append("head groups are not observable: heads share nothing")
    return lines + outcome.notes


def sentence(each: RegimeSeen) -> str:
    """One stretch of lengths in a line."""
    r = each.last.reading
    if r is None:
        return f"not identifiable: {each.last.reason}"
    words = [f"P {_type(r.p)}"]
    if r.p not in (None, "f32"):
        words[0] += ", truncated" if r.p_truncated else ""
        words[0] += ", after its division by l" if r.p_normalised else ""
        words[0] += ", which l sums rounded" if r.l_of_rounded_p else ""
    if r.offset:
        words.append(f"offset {r.offset:.4f} on the maximum")
    bits = "" if r.accumulator_bits is None else f" ({r.accumulator_bits} bits, {r.rounding})"
    words.append(f"sums {_type(r.accumulator)}{bits}")
    if r.flushed_every:
        words.append(f"flushed every {r.flushed_every} keys")
    if r.sum_keys and max(r.sum_keys) < r.n_kv:
        words.append(f"at most {max(r.sum_keys)} keys a sum")
    if r.mma_block:
        words.append(f"products of {r.mma_block} keys")
    if r.q_scaled_in not in (None, "f32"):
        words.append(f"q scaled in {_type(r.q_scaled_in)}")
    if r.logits not in (None, "f32"):
        words.append(f"logits {_type(r.logits)}")
    if r.rescale:
        words.append(f"no rescale up to a growth of {r.rescale:g} or more")
    words.append(tiles_seen(r))
    words.append(f"{r.parts} part{'s' if r.parts > 1 else ''}")
    words.append(f"result {_type(r.result)}")
    if not r.deterministic:
        words.append("its first call gave other bits than those after it")
    if not r.row_alone:
        words.append("a row alone has other bits than in a batch" if r.row_alone is False else "")
    return "; ".join(word for word in words if word)


def tiles_seen(r: Reading) -> str:
    """Tiles of keys, and the order of their walk where it is not the usual one."""
    if not r.tile:
        return "no tile seen"
    return f"tiles of {r.tile}" + (", from the last to the first" if r.tile_order == "backward" else "")


def order_of(r: Reading) -> str:
    """Which keys are summed with which, as text: tiles in a part, parts in the merge."""
    parts = []
    for a, b in list(zip(r.cuts, r.cuts[1:], strict=False))[:_MOST_PARTS]:
        tiles = "" if not r.tile or b - a <= r.tile else f" in {tiles_seen(r)}"
        parts.append(f"[{a}..{b - 1}{tiles}]")
    more = f" + {r.parts - _MOST_PARTS} more" if r.parts > _MOST_PARTS else ""
    return " + ".join(parts) + more


def untold(r: Reading) -> list[str]:
    """What no probe could tell, in the words of the JSON."""
    names = ("p", "offset", "accumulator", "first_product", "q_scaled_in", "logits", "tile", "result")
    return [name for name in names if getattr(r, name) is None]


def _type(name: str | None) -> str:
    return "of a type that cannot be told" if name is None else WORDS.get(name, name)
