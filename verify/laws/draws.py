"""Hypothesis strategies for the cases of laws: what comes first, or is smaller, is simpler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from verify.kernels.capabilities import Capabilities
from verify.kernels.judging.families import FAMILIES
from verify.kernels.numbers import FLOAT_TYPES
from verify.laws.cases import Parts, Problem
from verify.laws.law import Subject, head_sizes

# Lengths around the edges of tiles, and a few tiles.
LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 130, 200, 300, 520)
# Of cases that are not left to chance.
MOST_KEYS = 2048
# The longest row of a subject that is slow.
SMALL = 65
# Families whose logits depend on where a key stands: cutting or moving keys changes the problem.
BY_PLACE = ("window", "alibi")
# Families that need an option of the call, and the promise that they need.
OPTION_OF = {"sinks": "sinks", "window": "sliding_window", "softcap": "softcap", "alibi": "alibi"}
SEEDS = 999
# Sizes of keys and values, and ratios, that some kernels have code of their own for.
SIZES = ((72, 72), (80, 80), (96, 96), (192, 128), (256, 256), (576, 512))
RATIOS = (5, 8, 16, 20, 24, 32, 64)
# Calls that chance draws rarely: rows far apart, no multiples of 8 or 64, more query tokens than three, many
# sequences, of unlike lengths, long rows in each type.
KINDS_OF_CALLS: tuple[Mapping[str, Any], ...] = (
    {"n_kv": (300, 20), "kv_heads": 2, "ratio": 4},
    {"n_kv": (203, 7, 100), "kv_heads": 2, "spare": 37},
    {"n_kv": (97, 98, 99, 100), "path": "prefill", "kv_heads": 2, "ratio": 4},
    {"n_kv": tuple(range(53, 61)), "path": "prefill", "kv_heads": 2, "ratio": 4},
    {"n_kv": (130,), "batch": 4, "fewer": (0, 43, 7, 90), "kv_heads": 2, "ratio": 4},
    {"n_kv": (64,), "batch": 9, "kv_heads": 2, "ratio": 2},
    {"n_kv": (1101, 1064), "dtype": "bf16", "k_size": 64, "v_size": 64},
    {"n_kv": (1101, 1064), "dtype": "f16", "k_size": 64, "v_size": 64},
    {"n_kv": (300, 200), "dtype": "f32", "kv_heads": 2},
)


def families(has: Capabilities, *, without: Sequence[str] = ()) -> list[str]:
    """Names of the input families that a kernel takes, the plain one first."""
    names = [
        name
        for name in FAMILIES
        if not {name, *name.split("+")} & set(without)
        and all(getattr(has, option) for option in options_of(name))
    ]
    return sorted(names, key=lambda name: name != "gaussian")


def options_of(family: str) -> list[str]:
    """What a kernel must take for a family, by the names of `Capabilities`."""
    return [OPTION_OF[word] for word in family.split("+") if word in OPTION_OF]


def edges(subject: Subject) -> list[Mapping[str, Any]]:
    """Problems by the fields in which they are not left to chance: every family, then sizes, ratios and kinds
    of calls. Hypothesis draws a few neighbourhoods of cases, and may never come by some of these."""
    n_kv = (33, 20) if subject.small else (130, 93)
    by_family: list[Mapping[str, Any]] = [
        {"family": name, "n_kv": n_kv, "kv_heads": 2} for name in families(subject.capabilities)
    ]
    if subject.small:
        return by_family
    sizes = [{"k_size": k, "v_size": v, "n_kv": (70, 33)} for k, v in SIZES]
    ratios = [{"ratio": r, "n_kv": (70, 33), "kv_heads": 1 + (r < 24)} for r in RATIOS]
    return [*by_family, *KINDS_OF_CALLS, *sizes, *ratios]


@st.composite
def problems(
    draw: st.DrawFn,
    subject: Subject,
    *,
    without: Sequence[str] = (),
    only: Sequence[str] = (),
    rows: int = 3,
    batch: int = 2,
    least: int = 0,
    lengths: Sequence[int] = LENGTHS,
    path: str = "",
) -> Problem:
    """Attention problems that the subject takes.

    without, only: families left out, or the only ones; rows, batch: the most; least: keys that every row
    sees; lengths: of the longest row; path: this one alone.
    """
    has = subject.capabilities
    if not _holds_large(subject):
        # The law `large-values` says that it fails there, once.
        without = (*without, "near-overflow")
    of_family = list(only) or families(has, without=without)
    family = draw(st.sampled_from(of_family))
    most_rows, most_sequences = max(rows, 8) if rows > 1 else 1, 9 if batch > 1 else 1
    if subject.small:
        rows, batch, lengths = min(rows, 2), 1, [n for n in lengths if n <= SMALL] or lengths[:1]
    longest = draw(st.sampled_from([n for n in lengths if n >= max(least, 1)]))
    n_kv = [longest]
    if has.ragged and rows > 1:
        lowest = max(least, 0 if has.empty_rows else 1)
        n_kv += draw(st.lists(st.integers(min(lowest, longest), longest), max_size=rows - 1))
    elif rows > 1:
        n_kv *= draw(st.integers(1, rows))
    k_size = draw(st.sampled_from(head_sizes(has)))
    v_sizes = [n for n in head_sizes(replace(has, k_sizes=None)) if n <= 64] if has.v_size else [k_size]
    most_heads = 1 if subject.small else 3
    ratios = [
        n
        for n in ((1, 2, 3) if subject.small else (1, 2, 3, 4, 6, 12))
        if has.ratios is None or n in has.ratios
    ]
    types = [name for name, kind in FLOAT_TYPES.items() if kind.torch_name in has.dtypes]
    sequences = draw(st.integers(1, batch))
    # A law of one row is one of its length: of all sequences.
    unlike = has.ragged and rows > 1 and sequences > 1
    shorter = st.lists(st.integers(0, longest), min_size=sequences, max_size=sequences)
    drawn = Problem(
        family=family,
        n_kv=tuple(n_kv),
        batch=sequences,
        fewer=tuple(draw(shorter)) if unlike else (),
        kv_heads=draw(st.integers(1, most_heads)),
        ratio=draw(st.sampled_from(ratios or list(has.ratios or (1,)))),
        k_size=k_size,
        v_size=draw(st.sampled_from(v_sizes or [k_size])),
        spare=draw(st.integers(0, 3)),
        dtype=draw(st.sampled_from(types)),
        path=path or draw(st.sampled_from([p for p in ("decode", "prefill") if p in has.paths])),
        seed=draw(st.integers(0, SEEDS)),
    )
    if not subject.pinned:
        return drawn
    return _pinned(
        drawn,
        subject.pinned,
        has,
        families=of_family,
        rows=most_rows,
        sequences=most_sequences,
        keys=(least, max(lengths) if lengths is not LENGTHS else MOST_KEYS),
        path=path,
    )


def _pinned(
    drawn: Problem,
    pinned: Mapping[str, Any],
    has: Capabilities,
    *,
    families: Sequence[str],
    rows: int,
    sequences: int,
    keys: tuple[int, int],
    path: str,
) -> Problem:
    """A problem with those pinned fields that its law and its kernel allow; the others stay as drawn."""
    given = dict(pinned)
    asked = tuple(n for n in given.pop("n_kv", drawn.n_kv) if keys[0] <= n <= keys[1])
    n_kv = asked[:rows] or drawn.n_kv
    if not has.ragged:
        n_kv = n_kv[:1] * len(n_kv)
    batch = min(given.pop("batch", drawn.batch), sequences)
    fewer = given.pop("fewer", ())
    alike = not has.ragged or rows == 1 or len(fewer) != batch
    own_size = given.get("k_size", drawn.k_size)
    allowed = {
        "family": families,
        "path": has.paths if not path else (path,),
        "dtype": [name for name, kind in FLOAT_TYPES.items() if kind.torch_name in has.dtypes],
        "k_size": has.k_sizes or (own_size,),
        "ratio": has.ratios or (given.get("ratio"),),
    }
    if any(size % has.size_multiple for size in (own_size, given.get("v_size", 0))):
        allowed["k_size"] = ()
    kept = {name: value for name, value in given.items() if value in allowed.get(name, (value,))}
    if "k_size" not in kept:
        kept.pop("v_size", None)
    elif not has.v_size:
        kept["v_size"] = kept["k_size"]
    return replace(drawn, **kept, n_kv=n_kv, batch=batch, fewer=() if alike else tuple(fewer))


# Keys of a page: one, no part of a tile, part of a tile, a tile.
PAGE_SIZES = (16, 1, 5, 64)
MOST_DRAFTS = 8


@st.composite
def formed_problems(
    draw: st.DrawFn,
    subject: Subject,
    *,
    without: Sequence[str] = (),
    path: str = "",
    batch: int = 3,
    twist: int = SEEDS,
) -> Problem:
    """Problems on any path that the subject has, with a size of pages; path: that one alone."""
    has = subject.capabilities
    plain = "decode" if "decode" in has.paths else "prefill"
    problem = draw(problems(subject, without=without, path=plain, batch=batch))
    pages = PAGE_SIZES if has.page_sizes is None else has.page_sizes
    return replace(
        problem,
        path=path or draw(st.sampled_from(has.paths)),
        page=draw(st.sampled_from(pages)),
        twist=draw(st.integers(0, twist)),
    )


@st.composite
def trees(draw: st.DrawFn, subject: Subject) -> Problem:
    """Problems whose rows are drafts of a tree, drawn by the twist: all have the same number of keys."""
    problem = draw(formed_problems(subject, without=(*BY_PLACE, "near-overflow"), batch=2))
    rows = draw(st.integers(2, MOST_DRAFTS))
    n_kv = max(*problem.n_kv, rows)
    return replace(problem, n_kv=(n_kv,) * rows, fewer=())


def _holds_large(subject: Subject) -> bool:
    """Whether sums of values near 65504 are within the kernel's accumulators."""
    call = subject.simplest.call()
    return subject.kernel.arithmetic_of(call).acc != "f16"


@st.composite
def cut_problems(draw: st.DrawFn, subject: Subject) -> Problem:
    """Problems with cuts: any of a short row; several, repeated ones included, of a long row."""
    problem = draw(problems(subject, without=BY_PLACE, rows=1, path="decode"))
    n = max(problem.n_kv)
    cuts = draw(st.lists(st.integers(0, n), min_size=1, max_size=1 if n < 8 else 4))
    return replace(problem, cuts=tuple(sorted(cuts)))


@st.composite
def planned_problems(
    draw: st.DrawFn,
    subject: Subject,
    *,
    groups: bool = False,
    parts: bool = False,
    block: bool = False,
    path: str = "",
) -> Problem:
    """Problems with a plan of their own: a composition of r, a number of parts, a size of tiles."""
    problem = draw(problems(subject, path=path))
    if groups:
        problem = replace(problem, groups=draw(compositions(problem.ratio)))
    if parts:
        problem = replace(problem, parts=draw(st.integers(2, 9)), block=16)
    if block:
        problem = replace(problem, block=draw(st.sampled_from([16, 32, 128])))
    return problem


@st.composite
def compositions(draw: st.DrawFn, total: int) -> tuple[int, ...]:
    """Every way to write r as a sum of head groups, in order: bars between heads, or none."""
    bars = draw(st.lists(st.booleans(), min_size=total - 1, max_size=total - 1))
    groups = [1]
    for bar in bars:
        if bar:
            groups.append(1)
        else:
            groups[-1] += 1
    return tuple(groups)


def twisted(cases: st.SearchStrategy[Problem], twist: st.SearchStrategy[int]) -> st.SearchStrategy[Problem]:
    """The same cases with a `twist`."""
    return st.builds(lambda problem, n: replace(problem, twist=n), cases, twist)


# A part as one number: an lse of up to 100 in multiples of 1/64, exact in float32 under whole shifts, and a
# value. At 10,000 lists drawing them is most of the time, and each number drawn costs alike.
_LEVELS, _VALUES = 2 * 6400 + 1, 2 * 99 + 1
_PART = st.integers(0, _LEVELS * _VALUES - 1)
_PARTS = {count: st.tuples(*[_PART] * count) for count in range(1, 10)}


def _part(number: int) -> tuple[float, int]:
    level, value = divmod(number, _VALUES)
    return _signed(level) / 64, _signed(value)


def _signed(number: int) -> int:
    """0, 1, -1, 2, -2, ...: what is simpler comes first."""
    return (number + 1) // 2 * (1 if number % 2 else -1)


@st.composite
def part_lists(
    draw: st.DrawFn,
    *,
    least: int = 1,
    most: int = 9,
    order: bool = False,
    shift: int = 0,
    empties: bool = True,
) -> Parts:
    """Lists of parts, some of them empty (`empties`), with an order of merging, and a shift of every lse."""
    drawn = draw(_PARTS[draw(st.integers(least, most))])
    empty = draw(st.integers(0, (1 << len(drawn)) - 1)) if empties and draw(st.booleans()) else 0
    found = [_part(number) for number in drawn]
    parts = tuple((-math.inf if empty >> i & 1 else lse, value) for i, (lse, value) in enumerate(found))
    merges = []
    if order:
        # Each merge takes one of the pairs of neighbours that are left: one number says which all take.
        chosen = draw(st.integers(0, math.factorial(len(parts) - 1) - 1))
        for pairs in range(len(parts) - 1, 0, -1):
            chosen, pair = divmod(chosen, pairs)
            merges.append(pair)
    return Parts(parts, tuple(merges), draw(st.integers(-shift, shift)) if shift else 0)


@st.composite
def far_parts(draw: st.DrawFn) -> Parts:
    """Two parts or more that lie 100 nats and more apart."""
    level, parts = draw(st.integers(-5000, 5000)), []
    for _ in range(draw(st.integers(2, 4))):
        parts.append((float(level), draw(st.integers(-99, 99))))
        level += draw(st.sampled_from([-1, 1])) * draw(st.integers(100, 3000))
    return Parts(tuple(parts))
