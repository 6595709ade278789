"""Reading kernels that state nothing before they are judged, so that budgets follow from what they compute.

What is read does not depend on time or load: the same run has the same budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from verify.identify.kept import read_or_known
from verify.identify.told import WORDS, acc_contradictions
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import AttentionPath, Call, Shape
from verify.kernels.heads import Heads
from verify.kernels.identify.arithmetics import KnownReadings, arithmetic_of, coarser, loosest_of
from verify.kernels.identify.asking import NotIdentifiable, Regime
from verify.kernels.identify.reading import LEAST_KEYS, Reading
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import type_of

# Query tokens of the calls: on the decode path two rows, as runs give several at once.
_ROWS: dict[AttentionPath, int] = {"decode": 2, "several": 4, "prefill": 4}
# Of calls of many sizes: lengths that are read, and of how many kinds of calls.
_ASKED_LENGTHS, _MOST_ASKED = (64, 2048), 9
# As many query tokens as stand for any more.
MOST_ROWS = 64


def states_nothing(kernel: Kernel, path: AttentionPath, heads: Heads) -> bool:
    """Whether a kernel's budget rests on what is assumed of it."""
    return not kernel.arithmetic(Shape(1, 1, LEAST_KEYS, heads), path).stated


def lengths_to(longest: int) -> list[int]:
    """Powers of two from 64, and the longest."""
    return sorted({1 << i for i in range(6, 31) if 1 << i < longest} | {max(longest, LEAST_KEYS)})


def learn(
    kernel: Kernel,
    heads: Sequence[Heads],
    lengths: Sequence[int],
    *,
    path: AttentionPath,
    dtype: torch.dtype,
    device: str,
    calls: Sequence[tuple[AttentionPath, int]] = (),
) -> list[str]:
    """Read a kernel that states nothing at these lengths, and let its budgets follow from that.

    calls: path and query tokens, at most `MOST_ROWS`, of each call to read; default two tokens of `path`,
    four of prefill. A call of another number is judged by the looser of the two around it, one of more by
    that of the most, one of a path that was not read by the loosest budget.

    Returns what a reader of the verdict must know; nothing for a kernel that states its arithmetic.
    """
    if not states_nothing(kernel, path, heads[0]):
        return []
    known: dict[tuple[Heads, AttentionPath, int], KnownReadings] = {}
    reasons: list[str] = []
    for each in heads:
        for of_path, n_q in sorted(set(calls or ((path, _ROWS[path]),))):
            regimes = [
                _regime(each, n_kv, n_q, dtype, device)
                for n_kv in sorted({max(n, LEAST_KEYS) for n in lengths})
            ]
            readings, why = _read(kernel, of_path, regimes)
            known[each, of_path, n_q] = KnownReadings(tuple(readings))
            reasons += why
    every = [r for of in known.values() for r in of.readings]
    kernel.budgets_follow(_chooser(known), _arithmetics(every, dtype))
    return _said(kernel, every, list(dict.fromkeys(reasons)), dtype)


def learn_as_asked(kernel: Kernel, device: str) -> None:
    """Read a kernel that states nothing where a call of other heads, path or type first needs its budget, for
    the first few of these; what a reader must know becomes a note of the kernel. All other calls, and such of
    more keys than were read, keep the loosest budget, and none that is tighter than what was read."""
    known: dict[tuple[Heads, AttentionPath, torch.dtype, int], KnownReadings] = {}
    seen: list[Arithmetic] = []

    def identified(call: Call) -> Arithmetic | None:
        heads, path, dtype = call.shape.heads, call.path, call.q.dtype
        if call.v_in_k is not None:
            return None
        # Many kernels are another one for a single query token.
        n_q = 1 if call.shape.rows == 1 else _ROWS[path]
        kind = (heads, path, dtype, n_q)
        if kind not in known and len(known) < _MOST_ASKED:
            # What is asked meanwhile is not asked for its budget.
            known[kind] = KnownReadings(())
            regimes = [_regime(heads, n_kv, n_q, dtype, device) for n_kv in _ASKED_LENGTHS]
            readings, why = _read(kernel, path, regimes)
            known[kind] = KnownReadings(tuple(readings))
            seen.extend(_arithmetics(readings, dtype))
            new = dict.fromkeys(_said(kernel, readings, why, dtype))
            kernel.notes.extend(said for said in new if said not in kernel.notes)
        found = known.get(kind)
        return None if found is None else found.at(call)

    kernel.budgets_follow(identified, seen)


def _arithmetics(readings: Sequence[Reading], dtype: torch.dtype) -> list[Arithmetic]:
    """Each reading's, where budgets know its types."""
    kind = type_of(dtype)
    each = [arithmetic_of([reading], kind.name) for reading in readings] if kind is not None else []
    return [arithmetic for arithmetic in each if arithmetic is not None]


def _regime(heads: Heads, n_kv: int, n_q: int, dtype: torch.dtype, device: str) -> Regime:
    return Regime(
        n_kv=n_kv,
        n_q=min(n_q, n_kv),
        ratio=heads.ratio,
        kv_heads=heads.kv,
        size=heads.v_size,
        k_size=heads.k_size,
        dtype=dtype,
        device=device,
    )


def _read(kernel: Kernel, path: AttentionPath, regimes: Sequence[Regime]) -> tuple[list[Reading], list[str]]:
    """What is read in each regime, in order of length, up to the first in which nothing can be, and why it
    cannot."""
    readings: list[Reading] = []
    for regime in regimes:
        try:
            shorter = readings[-1] if readings else None
            readings.append(read_or_known(kernel, path, regime, shorter))
        except NotIdentifiable as error:
            # One that hung is asked again: what it is asked next is judged by itself.
            kernel.forgive()
            return readings, [str(error)]
    return readings, []


def _chooser(
    known: Mapping[tuple[Heads, AttentionPath, int], KnownReadings],
) -> Callable[[Call], Arithmetic | None]:
    def identified(call: Call) -> Arithmetic | None:
        heads, path = call.shape.heads, call.path
        # An engine may make a call a row on one path, and one of all rows on another.
        tokens = {n_q for of_heads, of_path, n_q in known if (of_heads, of_path) == (heads, path)}
        if not tokens:
            return None
        rows = min(call.shape.rows, max(tokens))
        # A kernel may change at any number of tokens between two that were read: both must allow for it.
        around = {max((n for n in tokens if n <= rows), default=min(tokens))}
        around.add(min(n for n in tokens if n >= rows))
        return loosest_of([known[heads, path, n] for n in sorted(around)], call)

    return identified


def _said(
    kernel: Kernel, readings: Sequence[Reading], reasons: Sequence[str], dtype: torch.dtype
) -> list[str]:
    said = [
        f"{kernel.spec}: nothing could be read off it: {each}; its budget is the loosest" for each in reasons
    ]
    kind = type_of(dtype)
    kinds: dict[object, Reading] = {each.same_as: each for each in readings}
    for each in kinds.values():
        if kind is None or arithmetic_of([each], kind.name) is None:
            said.append(
                f"{kernel.spec}: types were read off it that no budget knows; its budget is the loosest"
            )
            continue
        assert each.p is not None and each.accumulator is not None and each.result is not None
        words = [f"P {WORDS[each.p]}", f"sums {WORDS[each.accumulator]}", f"result {WORDS[each.result]}"]
        words.append(f"tiles of {each.tile}" if each.tile else "no tile seen")
        words.append(f"{each.parts} part{'s' if each.parts > 1 else ''} at {each.n_kv} keys")
        if each.n_q == 1:
            # And of more tokens it is another kind, or was not read.
            words[-1] += " in calls of one query token"
        said.append(f"{kernel.spec}: read off it: {', '.join(words)}; its budget follows from that")
    said += [f"{kernel.spec}: {each}" for each in coarser(readings)]
    said += [f"finding: {kernel.spec} {odd}" for odd in acc_contradictions(kernel.spec, readings)]
    return said
