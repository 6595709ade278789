"""What the device wrote: the KV parts of every row, counted by the slots that hold their lse.

A program writes one lse a head and slot: -inf into a slot for which its row has no keys, a number into one of
a part that it went through. Filled beforehand with a NaN that no device computes, a slot also shows that
nothing wrote it. So parts are counted where they ran, and a plan is held to the count.

That a slot was written does not say which keys it holds. So the numbers of one row, the longest of each kind,
are held against the log-sum-exp of the keys of its planned parts, in float64: a part that begins or ends
elsewhere has another one. Not seen: bounds that only other rows, or heads of other KV heads, have elsewhere;
keys that carry less of their part than `_ROOM` leaves; and of a merge, anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from verify.kernels.call import Call
from verify.kernels.exact import finish_logits
from verify.kernels.flash.rows import Kind, RowPlans
from verify.kernels.trace import Launched, RowKind, Signature

# The bits of a quiet NaN; arithmetic gives others (0x7FFFFFFF, 0x7FC00000).
_UNTOUCHED = 0x7FC0_5107
# What a slot holds, for a head.
NOT_WRITTEN, NO_KEYS, KEYS, OTHER_KEYS = 0, 1, 2, 3
# By how much a written lse may differ from that of the planned keys: a share of the largest sum of a logit's
# products, for their rounding and that of what is made of them; a share of the lse; and for the sum of keys.
_ROOM = 2.0**-13, 2.0**-21, 2.0**-11
# Keys in float64 at once.
_KEYS_AT_ONCE = 1 << 16


def fill(lse: torch.Tensor) -> None:
    """Fill slots, so that one that nothing writes shows."""
    lse.view(torch.int32).fill_(_UNTOUCHED)


def states(lse: torch.Tensor) -> torch.Tensor:
    """What slots hold that were filled beforehand: int8 of the same shape. Does not wait for the device."""
    written = lse.view(torch.int32) != _UNTOUCHED
    return written.to(torch.int8) + (written & (lse != -math.inf)).to(torch.int8)


def lse_of_parts(
    call: Call, b: int, t: int, n_kv: int, kv_head: int, cuts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """lse [parts, r] of the parts between `cuts` of row t of sequence b; how much a kernel may differ by.

    Of the query heads of one KV head, in float64, without a sink.
    """
    heads = slice(kv_head * call.shape.ratio, (kv_head + 1) * call.shape.ratio)
    slopes = None if call.alibi_slopes is None else call.alibi_slopes[heads]
    one, q = replace(call, alibi_slopes=slopes), call.q[b, t, heads].double()
    end = min(cuts[-1], n_kv)
    length = call.kv_len[b, t].view(1)
    listed = None if call.keys is None else call.keys[b, t][call.keys[b, t] >= 0]
    s, largest = [q.new_empty((len(q), 0))], q.new_zeros(())
    for first in range(0, end, _KEYS_AT_ONCE):
        positions = torch.arange(first, min(first + _KEYS_AT_ONCE, end), device=q.device)
        if listed is not None:
            positions = listed[positions].long()
        keys = _keys_at(call, b, t, positions)[:, kv_head].double()
        products = call.scale * (q @ keys.T)
        mask = None
        if call.mask is not None:
            of_row = call.mask[b if len(call.mask) > 1 else 0, :, t]
            mask = (of_row[heads] if len(of_row) > 1 else of_row)[:, positions]
        s.append(finish_logits(products[None, None], length, positions, one, mask)[0, 0])
        largest = torch.maximum(largest, call.scale * (q.abs() @ keys.abs().T).amax())
    logits = torch.cat(s, 1)  # [r, n]
    inner = torch.tensor(cuts[1:-1], device=q.device, dtype=torch.int64)
    part = torch.bucketize(torch.arange(end, device=q.device), inner, right=True).expand(len(q), -1)
    empty = q.new_full((len(q), len(cuts) - 1), -math.inf)
    top = empty.scatter_reduce(1, part, logits, "amax")
    shift = torch.where(torch.isneginf(top), 0.0, top)
    total = torch.zeros_like(empty).scatter_add(1, part, torch.exp(logits - shift.gather(1, part)))
    lse = (shift + torch.log(total)).T
    return lse, _ROOM[0] * largest + _ROOM[1] * lse.abs() + _ROOM[2]


def _keys_at(call: Call, b: int, t: int, positions: torch.Tensor) -> torch.Tensor:
    """Keys [n, Hkv, Dk] that row t of sequence b has at these places, wherever they lie."""
    sequence = b
    if call.cu_seqlens is not None:
        sequence = int((call.cu_seqlens[1:] <= t).sum())
    if call.block_table is None:
        return call.k[sequence, positions]
    page = call.k.shape[1]
    return call.k[call.block_table[sequence, positions // page].long(), positions % page]


def parts_seen(call: Call, rows: RowPlans, slots: int) -> torch.Tensor | None:
    """Of which parts a row sees any key, [B * T, slots, Hq or 1]; None where lengths and a window say it.

    slots: the most parts of a row. Waits for the device.
    """
    if call.mask is None and (call.keys is None or call.sliding_window is None):
        return None
    heads = 1 if call.mask is None else call.mask.shape[1]
    found = torch.zeros((len(rows.plans), slots, heads), dtype=torch.bool, device=call.q.device)
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, plan in enumerate(rows.plans):
        alike.setdefault(plan.cuts, []).append(row)
    places = torch.arange(call.shape.keys, device=call.q.device)
    for cuts, members in alike.items():
        bounds = torch.tensor(cuts, device=call.q.device)
        for row in members:
            b, t = divmod(row, call.shape.rows)
            at = places if call.keys is None else call.keys[b, t][call.keys[b, t] >= 0].long()
            n_kv = call.kv_len[b, t]
            seen = (at < n_kv).expand(heads, -1)
            if call.sliding_window is not None:
                seen = seen & (at >= n_kv - call.sliding_window)
            if call.mask is not None:
                mask = call.mask[b if len(call.mask) > 1 else 0, :, t][:, at]
                seen = seen & (mask if mask.dtype == torch.bool else ~torch.isneginf(mask))
            before = torch.nn.functional.pad(seen.cumsum(-1), (1, 0))
            count = before[:, bounds.clamp(max=seen.shape[-1])].diff(dim=-1)
            found[row, : len(cuts) - 1] = (count > 0).T
    return found


def mark_other_keys(state: torch.Tensor, lse: torch.Tensor, due: torch.Tensor, room: torch.Tensor) -> None:
    """Mark the slots of a row that hold the lse of other keys than the planned ones. Does not wait.

    state, lse [parts, r]: what `states` says, and what was written; due, room: as of `lse_of_parts`.
    """
    other = (lse.double() - due).abs() > room
    state.masked_fill_(other & (state == KEYS) & torch.isfinite(due), OTHER_KEYS)


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
    rows: RowPlans,
    lengths: Sequence[int],
    written: Sequence[torch.Tensor],
    sliding_window: int | None,
    seen: torch.Tensor | None = None,
) -> bool:
    """Whether every row's slots hold what its plan has them hold; waits for the device.

    lengths [B * T]: keys that each row goes through; written: of each kind of rows, `states`
    [B', T, slots, Hq] of the first sequences; seen: as of `parts_seen`.
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
        if seen is not None:
            # What a mask hides whole has no keys; the window of a list goes by places.
            its = torch.tensor([bool(mine[i]) for i in every.tolist()], device=state.device)[: len(index)]
            has = seen[: len(index), : state.shape[2]] & its[:, None, None]
            due = torch.where(has, KEYS, NO_KEYS).to(torch.int8)
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

    A head group that wrote no slot did not run. Where a row wrote other parts than the planned ones, or other
    keys, of all
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
            if bool((of_rows[kind][row] == OTHER_KEYS).any()):
                other.add(plan)
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
            parts = tuple((mine >= KEYS).all(1).nonzero()[:, 0].tolist())
            found.setdefault(parts, []).append(size)
    return found


def _bounds(parts: int, n_kv: int) -> tuple[int, ...]:
    """Bounds of so many parts, of which only the ends are known."""
    return (0, *[-1] * (parts - 1), n_kv) if parts else (0,)
