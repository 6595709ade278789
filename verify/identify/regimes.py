"""Reading a kernel at many lengths: where its arithmetic changes, and what was not looked at."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from verify.kernels.call import AttentionPath
from verify.kernels.heads import Heads
from verify.kernels.identify.asking import NotIdentifiable, Regime, bare
from verify.kernels.identify.reading import LEAST_KEYS, Reading, read
from verify.kernels.kernel import Kernel
from verify.kernels.plans.asked import MOST_SEVERAL
from verify.kernels.plans.spec import parse_spec
from verify.kernels.registry import UNTOLD

DEFAULT_HEADS = Heads(8, 2, 64, 64)
# Query tokens that are tried: text generation, and a few at once.
DEFAULT_N_Q = (1, 4)
SHORTEST, LONGEST, LONGEST_CUDA = 64, 8192, 131072
DEFAULT_SECONDS = 20.0


@dataclass(frozen=True)
class LengthSeen:
    """One length: what was read, or why nothing could be."""

    n_kv: int  # keys of the last row
    n_q: int  # query tokens a call
    reading: Reading | None  # None where nothing could be read
    reason: str = ""  # why not
    ratio: int = 1  # query heads a KV head
    batch: int = 1  # sequences a call

    @property
    def place(self) -> tuple[int, int, int]:
        """What lengths are neighbours within."""
        return (self.ratio, self.batch, self.n_q)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for lengths of one regime; numbers in a reason make none."""
        return (re.sub(r"[0-9.e%+-]+", "#", self.reason),) if self.reading is None else self.reading.same_as


@dataclass(frozen=True)
class RegimeSeen:
    """Lengths, neighbours among those that were asked, at which a kernel computes alike; last is the longest
    of them, whose cuts are shown. low, high: the first and the last that were asked."""

    low: int
    high: int
    last: LengthSeen

    def to_json(self) -> dict[str, Any]:
        ends = {
            "n_kv_min": self.low,
            "n_kv_max": self.high,
            "n_q_min": self.last.n_q,
            "n_q_max": self.last.n_q,
            "ratio": self.last.ratio,
            "batch": self.last.batch,
        }
        if self.last.reading is None:
            return {**ends, "identifiable": False, "reason": self.last.reason}
        found = self.last.reading.to_json()
        del found["n_kv"], found["n_q"]
        return {**ends, "identifiable": True, **found}


@dataclass
class Identified:
    """Everything that was seen of one kernel. not_looked_at: what was asked for, and was not tried."""

    spec: str
    seen: list[LengthSeen] = field(default_factory=list)
    not_looked_at: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def stretches(self) -> list[RegimeSeen]:
        """By query tokens, then by length; those that were asked for first."""
        found: list[RegimeSeen] = []
        asked = self.seen[0].place[:2] if self.seen else ()
        for each in sorted(self.seen, key=lambda s: (s.place[:2] != asked, s.place, s.n_kv)):
            last = found[-1] if found else None
            if last is not None and last.last.place == each.place and last.last.kind == each.kind:
                found[-1] = RegimeSeen(last.low, each.n_kv, each)
            else:
                found.append(RegimeSeen(each.n_kv, each.n_kv, each))
        return found

    @property
    def readings(self) -> list[Reading]:
        return [each.reading for each in self.seen if each.reading is not None]

    def reading_at(self, n_kv: int, n_q: int) -> Reading | None:
        """What was read at this length, None where it was not."""
        return next((r for r in self.readings if (r.n_kv, r.n_q) == (n_kv, n_q)), None)


def lengths_up_to(longest: int) -> list[int]:
    """Powers of two from 64."""
    return [n for n in (1 << i for i in range(6, 21)) if n <= longest] or [longest]


def identify(
    kernel: Kernel,
    lengths: Sequence[int],
    *,
    heads: Heads = DEFAULT_HEADS,
    n_qs: Sequence[int] = DEFAULT_N_Q,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    seconds: float = DEFAULT_SECONDS,
    bisect: bool = True,
    full: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Identified:
    """Read a kernel at these lengths, and halve the way to every change, as long as the time allows.

    seconds: of processor time; of a kernel in a process of its own, by the clock. full: at the shortest and
    the longest length other ratios and numbers of sequences are tried as well.
    """
    # Of a kernel in a process of its own only the wall clock knows.
    clock = time.monotonic if parse_spec(kernel.spec).name in UNTOLD else time.process_time
    began = clock()
    found = Identified(kernel.spec)

    def known(n_kv: int, place: tuple[int, int, int]) -> Reading | None:
        """The reading of the longest calls of the same kind with fewer keys."""
        of = [s for s in found.seen if s.place == place and s.n_kv < n_kv and s.reading is not None]
        return max(of, key=lambda s: s.n_kv).reading if of else None

    def look(n_kv: int, n_q: int, ratio: int = heads.ratio, batch: int = batch) -> LengthSeen:
        regime = Regime(
            n_kv=n_kv,
            n_q=n_q,
            batch=batch,
            ratio=ratio,
            kv_heads=heads.kv,
            size=heads.v_size,
            k_size=heads.k_size,
            dtype=dtype or input_type(kernel),
            device=device,
        )
        tell(f"{n_kv} keys, {n_q} query token{'s' if n_q > 1 else ''}")
        path = path_of(n_q, kernel)
        assert path is not None
        reading, reason = None, ""
        try:
            reading = read(bare(kernel, path), regime, known=known(n_kv, (ratio, batch, n_q)))
        except NotIdentifiable as error:
            reason = str(error)
        one = LengthSeen(n_kv=n_kv, n_q=n_q, reading=reading, reason=reason, ratio=ratio, batch=batch)
        found.seen.append(one)
        return one

    def spent() -> bool:
        return clock() - began > seconds

    for n_q in n_qs:
        if path_of(n_q, kernel) is None:
            found.not_looked_at.append(f"{n_q} query tokens: it has no path {path_of(n_q)}")
            continue
        for n_kv in lengths:
            if n_kv < max(LEAST_KEYS, n_q):
                found.not_looked_at.append(f"{n_kv} keys: fewer than {max(LEAST_KEYS, n_q)} show nothing")
            elif spent():
                found.not_looked_at.append(f"{n_kv} keys, {n_q} query tokens: the time was spent")
            else:
                look(n_kv, n_q)
    for ratio, sequences in others_than(heads.ratio, batch) if full else ():
        ratios = kernel.capabilities().ratios
        if ratios is not None and ratio not in ratios:
            found.not_looked_at.append(f"{ratio} query heads a KV head: it does not take them")
            continue
        for n_kv in sorted({min(lengths), max(lengths)}):
            if n_kv >= LEAST_KEYS and path_of(n_qs[0], kernel) is not None:
                look(n_kv, n_qs[0], ratio, sequences)
    found.not_looked_at += _options_of(kernel)
    while bisect and not spent():
        gap = next(_changes(found), None)
        if gap is None:
            break
        below, above = gap
        look((below.n_kv + above.n_kv) // 2, below.n_q, below.ratio, below.batch)
    for below, above in _changes(found):
        found.not_looked_at.append(
            f"{below.n_kv + 1} to {above.n_kv - 1} keys, {below.n_q} query tokens: a change lies between"
        )
    found.seconds = clock() - began
    return found


def _options_of(kernel: Kernel) -> list[str]:
    """Options of calls that a kernel takes, and that nothing is read with."""
    has = kernel.capabilities()
    words = {
        "windows": has.sliding_window,
        "sinks": has.sinks,
        "softcaps": has.softcap,
        "ALiBi": has.alibi,
    }
    named = [word for word, taken in words.items() if taken]
    return [f"calls with {', '.join(named)}: their budget is the loosest"] if named else []


def _changes(found: Identified) -> Iterator[tuple[LengthSeen, LengthSeen]]:
    """Neighbouring lengths that are not alike, and have others between them."""
    in_order = sorted(found.seen, key=lambda s: (s.place, s.n_kv))
    for below, above in pairwise(in_order):
        if below.place == above.place and below.kind != above.kind and above.n_kv > below.n_kv + 1:
            yield below, above


def path_of(n_q: int, kernel: Kernel | None = None) -> AttentionPath | None:
    """The path that calls of so many query tokens take; of a kernel the one that it has for them, or None."""
    due: AttentionPath = "decode" if n_q == 1 else "several" if n_q <= MOST_SEVERAL else "prefill"
    if kernel is None or due in (paths := kernel.capabilities().paths):
        return due
    # A few tokens are a short prompt where there is nothing else.
    return "prefill" if n_q > 1 and "prefill" in paths else None


def others_than(ratio: int, batch: int) -> list[tuple[int, int]]:
    """Ratios and numbers of sequences beside those of a run, one of them changed at a time."""
    ratios, batches = (1, 4, 8, 12, 16), (1, 4, 16)
    return [*((r, batch) for r in ratios if r != ratio), *((ratio, b) for b in batches if b != batch)]


def input_type(kernel: Kernel) -> torch.dtype:
    """float16 where the kernel takes it, else what it does take."""
    dtypes = kernel.capabilities().dtypes
    name = next((each for each in ("float16", "bfloat16", "float32") if each in dtypes), "float16")
    found: torch.dtype = getattr(torch, name)
    return found
