"""Launch traces: what a kernel really ran, counted by the code that runs it and returned with the result.

The request says what should run; only the trace says what did. A verdict about a changed path rests on it.
A kernel returns what one call launched (`Launched`); whoever calls it adds that up (`LaunchTrace`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from verify.kernels.lengths import lengths_of

# Calls that a trace holds by themselves before it adds up their rows.
_CALLS_HELD = 256


class Signature(NamedTuple):
    """What computed one row: two rows with equal signatures and inputs ran the same arithmetic.

    An implementation that cannot say leaves head_groups and cuts empty.
    """

    kernel: str  # name with its numerical options
    binary: str  # hash of the code that ran
    head_groups: tuple[int, ...]  # query heads that each program handled
    cuts: tuple[int, ...]  # 0 < ... < n_kv: bounds of the KV parts; -1: not known where one is
    launch: str  # `one`, or `each` head group
    as_planned: bool = True  # False: the device did other than the plan says, whatever else it ran for that
    # Query tokens of the call, by which another kernel may be chosen; 0: rows are computed as if alone.
    tokens: int = 0
    page: int = 0  # keys a page, where windows were put to it so (`formed`); 0: none
    sequences: int = 1  # of such a call


@dataclass
class Coverage:
    """Rows of one kind that ran: the line of a report's coverage table."""

    path: str  # decode, several or prefill
    kernel: str  # name with its numerical options
    binary: str  # hash of the code that ran
    head_groups: tuple[int, ...]  # query heads that each program handled
    parts: int  # of the KV range; 0: not known
    launch: str  # `one`, or `each` head group
    tokens: int  # query tokens of a call; 0: rows are computed as if alone
    page: int  # keys a page; 0: none
    sequences: int  # of a call
    rows: int  # attention rows
    n_kv_min: int  # fewest keys of a row
    n_kv_max: int  # most keys of a row
    cuts_at_max: tuple[int, ...]  # bounds of the parts of the longest row

    def to_json(self) -> dict[str, Any]:
        """As reports list it; `kv_cuts` are those of the longest row."""
        return {
            "path": self.path,
            "kernel": self.kernel,
            "binary": self.binary,
            "launch": self.launch,
            "tokens_a_call": self.tokens,
            "page": self.page,
            "sequences": self.sequences,
            "head_groups": list(self.head_groups),
            "parts": self.parts,
            "kv_cuts": list(self.cuts_at_max),
            "rows": self.rows,
            "n_kv_min": self.n_kv_min,
            "n_kv_max": self.n_kv_max,
        }


# Path, visible keys, and what computed a row.
RowKind = tuple[str, int, Signature]


@dataclass(frozen=True, eq=False)
class Launched:
    """What one call launched: the number of its rows of each kind.

    A model makes the same call at every layer. A kernel may then return the same object each time, and a
    trace only counts how often.
    """

    rows: Mapping[RowKind, int]

    @classmethod
    def every_row(cls, path: str, kv_len: torch.Tensor, signature: Signature) -> Launched:
        """One signature computed every row of a call, kv_len [B, T]."""
        by_n_kv = Counter(lengths_of(kv_len).of_rows)
        return cls({(path, n_kv, signature): rows for n_kv, rows in by_n_kv.items()})

    @classmethod
    def together(cls, several: Iterable[Launched]) -> Launched:
        """What several calls launched, as one."""
        rows: Counter[RowKind] = Counter()
        for each in several:
            rows.update(each.rows)
        return cls(rows)


NOTHING = Launched({})


def heads_launched_alike(rows: Iterable[RowKind]) -> bool:
    """Whether no head had a launch to itself while others shared theirs: its arithmetic may be another."""
    groups = (signature.head_groups for _, _, signature in rows)
    return all(1 not in group or set(group) == {1} for group in groups)


class LaunchTrace:
    """Rows that ran, by path, n_kv and signature. Rows count attention rows: tokens times layers."""

    def __init__(self, calls: Iterable[Launched] = ()) -> None:
        self._rows: dict[RowKind, int] = {}
        self._calls: Counter[Launched] = Counter()
        for launched in calls:
            self.count(launched)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LaunchTrace) and self.rows == other.rows

    __hash__ = None  # type: ignore[assignment]

    @property
    def rows(self) -> Mapping[RowKind, int]:
        """Everything counted so far."""
        for launched, times in self._calls.items():
            for kind, rows in launched.rows.items():
                self._rows[kind] = self._rows.get(kind, 0) + rows * times
        self._calls.clear()
        return self._rows

    def count(self, launched: Launched) -> None:
        """Add what one call launched."""
        self._calls[launched] += 1
        if len(self._calls) > _CALLS_HELD:
            _ = self.rows

    def add(self, other: LaunchTrace) -> None:
        """Add everything of another trace."""
        self.count(Launched(dict(other.rows)))

    def at(self, n_kv: int) -> frozenset[tuple[str, Signature]]:
        """Everything that ran at this n_kv, as (path, signature)."""
        return self._by_n_kv().get(n_kv, frozenset())

    def _by_n_kv(self) -> dict[int, frozenset[tuple[str, Signature]]]:
        found: dict[int, set[tuple[str, Signature]]] = {}
        for path, n_kv, signature in self.rows:
            found.setdefault(n_kv, set()).add((path, signature))
        return {n_kv: frozenset(kinds) for n_kv, kinds in found.items()}

    def differs_from(self, other: LaunchTrace) -> frozenset[int]:
        """The n_kv at which this trace ran its plans, and not the same as `other` did.

        A plan that the device did not run is no other path, though its own binaries may have run beside it.
        """
        mine, theirs = self._by_n_kv(), other._by_n_kv()
        return frozenset(
            n
            for n, kinds in mine.items()
            if kinds != theirs.get(n) and any(signature.as_planned for _, signature in kinds)
        )

    @property
    def ran_its_plans(self) -> bool:
        """Whether the device did, for every row, what the plan says."""
        return all(signature.as_planned for _, _, signature in self.rows)

    @property
    def total_rows(self) -> int:
        return sum(self.rows.values())

    def coverage(self) -> list[Coverage]:
        """One line a kind of launch, rows added up, with its range of n_kv."""
        lines: dict[tuple[object, ...], Coverage] = {}
        for (path, n_kv, s), rows in sorted(self.rows.items()):
            parts = max(len(s.cuts) - 1, 0)
            key = (path, s.kernel, s.binary, s.head_groups, parts, s.launch, *s[6:])
            line = lines.get(key)
            if line is None:
                lines[key] = Coverage(
                    path=path,
                    kernel=s.kernel,
                    binary=s.binary,
                    head_groups=s.head_groups,
                    parts=parts,
                    launch=s.launch,
                    tokens=s.tokens,
                    page=s.page,
                    sequences=s.sequences,
                    rows=rows,
                    n_kv_min=n_kv,
                    n_kv_max=n_kv,
                    cuts_at_max=s.cuts,
                )
            else:
                line.rows += rows
                line.n_kv_min = min(line.n_kv_min, n_kv)
                if n_kv >= line.n_kv_max:
                    line.n_kv_max, line.cuts_at_max = n_kv, s.cuts
        return list(lines.values())

    def to_json(self) -> list[list[Any]]:
        """A list that `from_json` reads back; signatures are written once a row kind and n_kv."""
        return [
            [path, n_kv, s.kernel, s.binary, list(s.head_groups), list(s.cuts), *s[4:], rows]
            for (path, n_kv, s), rows in sorted(self.rows.items())
        ]

    @classmethod
    def from_json(cls, lines: Iterable[Sequence[Any]]) -> LaunchTrace:
        rows = {
            (
                path,
                n_kv,
                Signature(
                    kernel=kernel,
                    binary=binary,
                    head_groups=tuple(groups),
                    cuts=tuple(cuts),
                    launch=launch,
                    as_planned=as_planned,
                    **dict(zip(Signature._fields[6:], form, strict=False)),
                ),
            ): count
            # A run that was begun before has no tokens, or no pages.
            for path, n_kv, kernel, binary, groups, cuts, launch, as_planned, *form, count in lines
        }
        return cls([Launched(rows)])
