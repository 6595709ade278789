"""One query token a call: what a decode step asks a kernel, and a call of many rows does not.

Kernels choose by the number of tokens: every engine's wrapper has one for T = 1. Rows of a kernel of ours are
computed as if alone, by how it is built; any other kernel is asked single tokens as well. Such a call has
T = 1 and B = 1, tensors of its own, and every other time no more keys than its row sees. Regimes are octaves
of n_kv, (256, 512] say: where engines change their kernels, they do at powers of two.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from verify.arms.arm import Arm
from verify.kernels.call import Call
from verify.kernels.kernel import Kernel
from verify.kernels.plans.spec import parse_spec

# Calls of each layer (or cell) and regime, at least; and of regimes whose rows are computed and not scored.
CALLS, CALLS_BESIDE = 8, 2
# Of the time of a run, unless it is too short to speak of.
MOST_OF_TIME, UNCOUNTED_S = 0.2, 1.0
# n_kv of the last row of the first regime.
FIRST_REGIME = 16
ONE_TOKEN = "asked one query token a call (T = 1, B = 1)"
# Ends the name that an arm's single tokens go under.
ALONE_SUFFIX = "/alone"


def alone_name(arm: str) -> str:
    """The name of an arm's single tokens in layers.parquet."""
    return arm + ALONE_SUFFIX


def is_asked_alone(kernel: Kernel | None, path: str) -> bool:
    """Whether a kernel is asked single tokens beside calls of many rows."""
    return kernel is not None and path == "decode" and not kernel.as_if_alone


def is_asked(arm: Arm) -> bool:
    """The same of an arm."""
    return is_asked_alone(arm.kernel, arm.path)


def broken_promise(spec: str, called: str, calls: int, other_bits: int) -> list[str]:
    """That a kernel whose specification promises it does not give a row alone the bits that it has among
    others, a sentence that begins with `called`; none where it does, or promises nothing."""
    if not other_bits or "row_alone" not in parse_spec(spec).options:
        return []
    return [
        f"{called} promises row_alone=bits: {other_bits} of {calls} rows have other bits than in a call of"
        f" many, {ONE_TOKEN}"
    ]


def regime_of(n_kv: int) -> tuple[int, int]:
    """Least and largest n_kv of the regime that a row lies in."""
    least, most = 1, FIRST_REGIME
    while n_kv > most:
        least, most = most + 1, 2 * most
    return least, most


def is_scored(regime: tuple[int, int], scored: range) -> bool:
    """Whether a regime holds rows that are scored, which have these n_kv."""
    return scored.start <= regime[1] and regime[0] < scored.stop


class AskedRow(NamedTuple):
    """A row that is asked alone."""

    sequence: int  # of the call
    row: int  # of the call
    spare: bool  # with all the keys that the call holds, or those alone that the row sees


def asked_rows(
    lengths: Sequence[int],
    *,
    scored: range,
    seed: int,
    layer: int,
    part: int = 0,
    parts: int = 1,
    batch: int = 1,
) -> list[AskedRow]:
    """Rows of one layer's call that are asked alone: of each regime the first, the last, and others drawn.

    lengths: n_kv of the rows; scored: n_kv of those that are; part of parts: over all calls of this layer
    there are CALLS or CALLS_BESIDE, or as many as its rows allow; this is one of them. batch: sequences of
    the call, which take turns.
    """
    rows: dict[tuple[int, int], list[int]] = {}
    for row, n_kv in enumerate(lengths):
        if n_kv > 0:
            rows.setdefault(regime_of(n_kv), []).append(row)
    # Calls of a layer take turns too, so that no window is the first of every one.
    turn = (part + layer) % parts
    found = []
    for regime, inside in rows.items():
        calls = CALLS if is_scored(regime, scored) else CALLS_BESIDE
        chosen = range(turn * calls // parts, (turn + 1) * calls // parts)
        key = zlib.crc32(f"alone/{seed}/{layer}/{regime[0]}".encode())
        drawn = torch.randperm(len(inside), generator=torch.Generator().manual_seed(key)).tolist()
        order = [0, len(inside) - 1, *(i for i in drawn if 0 < i < len(inside) - 1)]
        for at in chosen:
            found.append(AskedRow(at % batch, inside[order[at % len(order)]], spare=at % 4 in (1, 2)))
    return list(dict.fromkeys(found))


def of_sequence(call: Call, sequence: int, rows: Sequence[int], keys: int | None = None) -> Call:
    """Some rows of one sequence of a call whose sequences lie side by side; keys: the first so many alone."""
    one, at = slice(sequence, sequence + 1), list(rows)
    mask, listed = call.mask, call.keys
    if mask is not None:
        mask = mask[one if mask.shape[0] > 1 else slice(None), :, at, :keys]
    return replace(
        call,
        q=call.q[one, at],
        k=call.k[one, :keys],
        v=call.v[one, :keys],
        kv_len=call.kv_len[one, at],
        mask=mask,
        keys=None if listed is None else listed[one, at],
    )


def single_call(call: Call, asked: AskedRow) -> Call:
    """The row as a call of its own, on tensors of its own. V that is columns of K stays that."""
    keys = None if asked.spare else int(call.kv_len[asked.sequence, asked.row])
    one = of_sequence(call, asked.sequence, [asked.row], keys)

    def own(x: torch.Tensor) -> torch.Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    k, columns = own(one.k), one.v_in_k
    return replace(
        one,
        q=own(one.q),
        k=k,
        v=own(one.v) if columns is None else k[..., slice(*columns)],
        kv_len=own(one.kv_len),
        mask=None if one.mask is None else own(one.mask),
        keys=None if one.keys is None else own(one.keys),
    )


def rows_as_sequences(call: Call) -> Call:
    """The rows of a call of one sequence as sequences of one query token each, all on its keys."""
    rows = call.shape.rows
    mask, listed = call.mask, call.keys
    k, columns = call.k.expand(rows, *call.k.shape[1:]), call.v_in_k
    return replace(
        call,
        q=call.q.transpose(0, 1),
        k=k,
        v=call.v.expand(rows, *call.v.shape[1:]) if columns is None else k[..., slice(*columns)],
        kv_len=call.kv_len.transpose(0, 1),
        mask=None if mask is None else mask.expand(-1, -1, rows, -1).transpose(0, 2),
        keys=None if listed is None else listed.transpose(0, 1),
    )


class TimeShare:
    """Whether single tokens may still be asked: at most MOST_OF_TIME of a run's time goes into them.

    left_out: calls that were not asked for that.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.spent, self.left_out = 0.0, 0

    def allows(self) -> bool:
        return self.spent < max(UNCOUNTED_S, MOST_OF_TIME * (time.monotonic() - self._began))

    @property
    def share(self) -> float:
        """Of the time so far."""
        return self.spent / max(time.monotonic() - self._began, 1e-9)

    def add(self, seconds: float) -> None:
        self.spent += seconds
