"""Plans: how one attention call is cut up into head groups and KV parts.

A plan is a rule. Given what a row is (its own n_kv, the head ratio, the KV heads) it says which query heads
one program handles together and where the KV range is cut. Batch and the number of rows never enter, so a row
computed alone and the same row in a batch follow the same plan.

Options as they are written in a specification:

    heads=12 | 8+4 | 4+4+4 | split      query heads of one KV head, one number a program; `split` is the
                                        powers of two of the ratio, largest first; default: one group
    kv=1 | 4 | size:4096 | auto         a number of parts, a part size in keys, or as many parts as fill the
                                        device's multiprocessors (so it moves when the head groups move)
    block=64                            keys a tile; cuts fall on tile edges
    launch=one | each | views           one launch for all head groups, or one a group: on contiguous copies
                                        of Q, or on views
    policy=ik-1183[,threshold=N]        the plan that a given engine would choose (see `policy`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, NamedTuple

from verify.kernels.errors import SpecError
from verify.kernels.plans.asked import RowAsked, SplitMode
from verify.kernels.plans.policy import Launch, Policy

# Without a GPU `kv=auto` counts on this many multiprocessors (an H100's), so that it can be studied on a CPU.
NOMINAL_SMS = 132
# Of `kv=auto`, on an H200. A launch that fills the multiprocessors leaves no room for the launches behind it
# to come forward, which costs what so many tiles a part take; up to half of them costs nothing.
TILES_A_PART_TO_FILL = 4
# The combining launch reads so many parts at once; beyond, each further 16 are as slow as one of them.
PARTS_AT_ONCE, PARTS_TOGETHER = 32, 16


class RowPlan(NamedTuple):
    """How one row is computed: head groups that sum to r, and part bounds 0 < ... < n_kv."""

    head_groups: tuple[int, ...]
    cuts: tuple[int, ...]
    launch: Launch


def powers_of_two(r: int) -> tuple[int, ...]:
    """The powers of two that sum to r, largest first: 12 is (8, 4), 3 is (2, 1)."""
    return tuple(1 << bit for bit in reversed(range(r.bit_length())) if r >> bit & 1)


def parse_heads(text: str) -> tuple[int, ...] | Literal["split"]:
    """`8+4` as (8, 4), `split` as itself. Raises SpecError."""
    if text == "split":
        return "split"
    try:
        groups = tuple(int(part) for part in text.split("+"))
    except ValueError:
        groups = ()
    if not groups or min(groups) < 1:
        raise SpecError(f"heads={text}: expected head groups such as 12, 8+4 or split")
    return groups


@dataclass(frozen=True)
class KVCuts:
    """Where the KV range is cut: a number of `parts`, a `size` in keys, or `auto` by multiprocessors."""

    mode: Literal["parts", "size", "auto"] = "parts"
    # Parts, or keys; of auto the tiles that a part has at least where more than half of the multiprocessors
    # have one, 0 or 1 for those of float16.
    value: int = 1

    @classmethod
    def parse(cls, text: str) -> KVCuts:
        if text == "auto":
            return cls("auto", 0)
        mode: Literal["parts", "size"] = "size" if text.startswith("size:") else "parts"
        try:
            value = int(text.removeprefix("size:"))
        except ValueError:
            value = 0
        if value < 1:
            raise SpecError(f"kv={text}: expected a number of parts from 1, size:KEYS, or auto")
        return cls(mode, value)

    def parts_wanted(self, programs: int, sms: int) -> int:
        """Parts of a row that is long enough for them (modes `parts` and `auto`; see `cuts`)."""
        return self.value if self.mode == "parts" else max(sms // programs, 1)

    @property
    def tiles_to_fill(self) -> int:
        return self.value if self.value > 1 else TILES_A_PART_TO_FILL

    def _parts(self, tiles: int, programs: int, sms: int) -> int:
        """Parts that so many tiles are cut into (modes `parts` and `auto`); `device.part_bounds` is the same.

        Of `auto` a part has two tiles at least, or one where half of the multiprocessors have no part yet
        and a tile takes its time (`tiles_to_fill` of 4). The fewer there are, the longer each takes, and the
        more the combining launch takes and the launches that wait for it: where one gains more than the other
        costs goes by tiles a part, `tiles_to_fill` of them, and twice that beyond 64 parts.
        """
        wanted = self.parts_wanted(programs, sms)
        if self.mode != "auto":
            return min(wanted, tiles)
        full = tiles // self.tiles_to_fill
        cheap = min(wanted // 2, PARTS_AT_ONCE)
        most = max(cheap, min(full, 2 * PARTS_AT_ONCE), full // 2)
        shortest = tiles // 2
        if self.tiles_to_fill <= TILES_A_PART_TO_FILL:
            shortest = max(shortest, min(tiles, wanted // 2))
        parts = min(wanted, shortest, most)
        if parts > PARTS_AT_ONCE:
            parts -= parts % PARTS_TOGETHER
        return max(parts, min(tiles, 1))

    def cuts(self, n_kv: int, block: int, programs: int, sms: int) -> tuple[int, ...]:
        """Part bounds 0 < c1 < ... < n_kv, on tile edges; no part is empty; (0,) for n_kv = 0.

        programs: blocks of the launch before the KV range is cut (KV heads times head groups);
        sms: multiprocessors, which `auto` fills.
        """
        tiles = -(-n_kv // block)
        if self.mode == "size":
            tiles_a_part = -(-self.value // block)
            edges = [*range(0, tiles, tiles_a_part), tiles]
        else:
            parts = self._parts(tiles, programs, sms)
            edges = [i * tiles // parts for i in range(parts + 1)] if parts else [0]
        bounds = sorted({min(edge * block, n_kv) for edge in edges})
        return tuple(bounds)


@dataclass(frozen=True)
class Plan:
    """A rule from a row to its cuts."""

    # Head groups; None: one padded group of all r heads.
    heads: tuple[int, ...] | Literal["split"] | None = None
    kv: KVCuts = KVCuts()  # how the KV range is cut
    block: int = 64  # keys a tile: cuts are multiples of it
    launch: Launch = "one"  # of the head groups
    policy: Policy | None = None  # an engine's choice by the row, in the place of `heads` and `launch`
    gpus: int = 1  # of the engine that the policy reproduces
    split_mode: SplitMode = "layer"  # of that engine
    sms: int = NOMINAL_SMS  # streaming multiprocessors, by which `kv=auto` cuts

    def at(self, row: RowAsked) -> RowPlan:
        """The plan of a row. Raises ValueError if head groups do not sum to r."""
        return _row_plan(self, row._replace(gpus=self.gpus, split_mode=self.split_mode))

    def of_lengths(self, row: RowAsked, lengths: tuple[int, ...]) -> Mapping[int, RowPlan]:
        """The plans of such rows, by how many keys they see: a model asks the same at every layer."""
        return _plans_of(self, row, lengths)

    def cuts_of(self, row: RowAsked) -> Callable[[int], tuple[int, ...]]:
        """The cuts of such a row by its number of keys."""
        return lambda n_kv: self.at(row.of_keys(n_kv)).cuts

    def groups(self, ratio: int) -> tuple[int, ...]:
        """Head groups at ratio r, policies left aside. Raises ValueError if they do not sum to r."""
        if self.heads is None:
            return (ratio,)
        if self.heads == "split":
            return powers_of_two(ratio)
        if sum(self.heads) != ratio:
            written = "+".join(map(str, self.heads))
            raise ValueError(
                f"heads={written}: sums to {sum(self.heads)}, expected r = {ratio} query heads a KV head"
            )
        return self.heads

    @property
    def ratios(self) -> tuple[int, ...] | None:
        """The ratios r that these head groups are for; None for all."""
        return (sum(self.heads),) if isinstance(self.heads, tuple) else None

    def with_sms(self, sms: int) -> Plan:
        """The same plan on a device with this many multiprocessors."""
        return replace(self, sms=sms)


def rows_of_like_cuts(plan: Plan, asked: RowAsked, n_kv: Sequence[int]) -> list[list[int]]:
    """Rows of one sequence that may share a tile: those whose parts begin at the same keys.

    n_kv: keys of each row. In such a tile every row has its own plan's parts, the last of which ends with its
    own keys.
    """
    tiles: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for row, n in enumerate(n_kv):
        planned = plan.at(asked.of_keys(n))
        tiles.setdefault((planned.head_groups, planned.cuts[:-1]), []).append(row)
    return list(tiles.values())


@lru_cache(maxsize=256)
def _plans_of(plan: Plan, row: RowAsked, lengths: tuple[int, ...]) -> Mapping[int, RowPlan]:
    return MappingProxyType({n: plan.at(row.of_keys(n)) for n in lengths})


@lru_cache(maxsize=1 << 18)
def _row_plan(plan: Plan, row: RowAsked) -> RowPlan:
    if plan.policy is None:
        groups, launch = plan.groups(row.ratio), plan.launch
    else:
        groups, launch = plan.policy.head_groups(row)
    programs = row.kv_heads * len(groups)
    return RowPlan(groups, plan.kv.cuts(row.n_kv, plan.block, programs, plan.sms), launch)
