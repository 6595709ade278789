"""What the device wrote: the KV parts of every row, counted by the slots that hold their lse.

A program writes one lse a head and slot: -inf into a slot for which its row has no keys, a number into one of
a part that it went through. Filled beforehand with a NaN that no device computes, a slot also shows that
nothing wrote it. So parts are counted where they ran, and a plan is held to the count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch

from verify.kernels.flash.rows import Kind, RowPlans
from verify.kernels.trace import Launched, RowKind, Signature

# The bits of a quiet NaN; arithmetic gives others (0x7FFFFFFF, 0x7FC00000).
_UNTOUCHED = 0x7FC0_5107
# What a slot holds, for a head.
NOT_WRITTEN, NO_KEYS, KEYS = 0, 1, 2


def fill(lse: torch.Tensor) -> None:
    """Fill slots, so that one that nothing writes shows."""
    lse.view(torch.int32).fill_(_UNTOUCHED)


def states(lse: torch.Tensor) -> torch.Tensor:
    """What slots hold that were filled beforehand: int8 of the same shape. Does not wait for the device."""
    written = lse.view(torch.int32) != _UNTOUCHED
    return written.to(torch.int8) + (written & (lse != -math.inf)).to(torch.int8)


def parts_with_keys(cuts: Sequence[int], n_kv: int, sliding_window: int | None) -> tuple[int, ...]:
    """The parts between `cuts` that hold keys which a row of n_kv keys sees.

    On the prefill path cuts are those of the longest row of a tile; a window hides all but the newest keys.
    """
    oldest = 0 if sliding_window is None else max(n_kv - sliding_window, 0)
    return tuple(i for i, (first, end) in enumerate(pairwise(cuts)) if first < n_kv and end > oldest)


def rows_as_planned(rows: RowPlans, path: str, kernel: str, binaries: Sequence[str]) -> Launched:
    """What a call launches that follows its plan; binaries: of each kind of its rows."""
    ran: Counter[RowKind] = Counter()
    for (n_kv, plan, kind), count in rows.counts.items():
        ran[path, n_kv, Signature(kernel, binaries[kind], plan.head_groups, plan.cuts, plan.launch)] += count
    return Launched(ran)


def as_planned(
    rows: RowPlans, lengths: Sequence[int], written: Sequence[torch.Tensor], sliding_window: int | None
) -> bool:
    """Whether every row's slots hold what its plan has them hold; waits for the device.

    lengths [B * T]: visible keys of each row; written: of each kind of rows, `states` [B', T, slots, Hq] of
    the first sequences.
    """
    which = {key: i for i, key in enumerate(rows.counts)}
    every = torch.tensor(
        [which[key] for key in zip(lengths, rows.plans, rows.kind_of_row, strict=True)], dtype=torch.long
    )
    wrong = []
    for kind, state in enumerate(written):
        index = every[: state.shape[0] * state.shape[1]]
        planned = torch.full((len(which), state.shape[2]), NO_KEYS, dtype=torch.int8)
        mine = torch.zeros(len(which), dtype=torch.bool)
        for i, (n_kv, plan, its_kind) in enumerate(which):
            mine[i] = its_kind == kind
            if mine[i]:
                planned[i, list(parts_with_keys(plan.cuts, n_kv, sliding_window))] = KEYS
        due = planned[index].to(state.device)[..., None]
        other = (state.flatten(0, 1) != due).flatten(1).any(1)
        wrong.append((other & mine[index].to(state.device)).any())
    return not wrong or not bool(torch.stack(wrong).any())


def rows_as_written(
    rows: RowPlans,
    lengths: Sequence[int],
    written: Sequence[torch.Tensor],
    sliding_window: int | None,
    *,
    ratio: int,
    path: str,
    kernel: str,
    binaries: Sequence[str],
) -> Launched:
    """What a call launched by the slots that were written, where its plan says other; as in `as_planned`.

    A head group that wrote no slot did not run. Where a row wrote other parts than the planned ones, of all
    rows of that plan it is known how many parts they have, and not where these begin. A row of a sequence
    whose slots are not held is taken for the last one that is like it.
    """
    ran: Counter[RowKind] = Counter()
    of_rows = [state.flatten(0, 1).cpu() for state in written]
    found, other, like = [], set(), {}
    for row, key in enumerate(zip(lengths, rows.plans, rows.kind_of_row, strict=True)):
        n_kv, plan, kind = key
        planned = parts_with_keys(plan.cuts, n_kv, sliding_window)
        if row < len(of_rows[kind]):
            like[key] = _groups_by_parts(of_rows[kind][row], rows.kinds[kind], ratio)
        found.append(like.get(key, {planned: list(plan.head_groups)}))
        if found[-1].keys() - {planned}:
            other.add(plan)
    for by_parts, n_kv, plan, kind in zip(found, lengths, rows.plans, rows.kind_of_row, strict=True):
        for parts, groups in by_parts.items():
            cuts = _bounds(len(parts), n_kv) if plan in other else plan.cuts
            same = plan not in other and tuple(groups) == plan.head_groups
            ran[
                path,
                n_kv,
                Signature(
                    kernel=kernel,
                    binary=binaries[kind],
                    head_groups=tuple(groups),
                    cuts=cuts,
                    launch=plan.launch,
                    as_planned=same,
                ),
            ] += 1
    return Launched(ran)


def _groups_by_parts(state: torch.Tensor, kind: Kind, ratio: int) -> dict[tuple[int, ...], list[int]]:
    """The head groups of a row that wrote anything, by the slots that all of their heads wrote a number into;
    state [slots, Hq]."""
    found: dict[tuple[int, ...], list[int]] = {}
    first = 0
    for size in kind.head_groups:
        mine = state.unflatten(1, (-1, ratio))[:, :, first : first + size].flatten(1)
        first += size
        if bool((mine != NOT_WRITTEN).any(0).all()):
            parts = tuple((mine == KEYS).all(1).nonzero()[:, 0].tolist())
            found.setdefault(parts, []).append(size)
    return found


def _bounds(parts: int, n_kv: int) -> tuple[int, ...]:
    """Bounds of so many parts, of which only the ends are known."""
    return (0, *[-1] * (parts - 1), n_kv) if parts else (0,)
