"""One query token a call: what single tokens say of a kernel, and of a candidate beside its baseline.

Rows of every layer are the samples of a regime of n_kv, each by its error relative to its own result, so that
no layer speaks for the others by the size of its numbers.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from verify.arms.alone import alone_name, is_scored, regime_of
from verify.arms.arm import FLOOR_NOISE, Arm
from verify.arms.kernel_errors import in_place_record
from verify.judge.strata import Judgement, Stratum, judge_strata
from verify.ppl.groups import SINGLE_TOKENS, GroupResult
from verify.ppl.record import AloneRecord, AloneRegime

_KEYS = ["window", "layer", "n_kv", "keys", "head"]


def _of(table: pa.Table, arm: str) -> pa.Table:
    return table.filter(pc.equal(table["arm"], arm)).sort_by([(name, "ascending") for name in _KEYS])


class SingleTokensBeside:
    """Single tokens of a candidate beside the same rows of its baseline.

    table: alone.parquet; a_kv_head: query heads of a KV head.
    """

    def __init__(self, table: pa.Table, candidate: str, reference: str, a_kv_head: int = 1) -> None:
        self.a_kv_head = a_kv_head
        mine, theirs = _of(table, candidate), _of(table, reference)
        same = (
            np.array([mine[name].to_numpy() for name in _KEYS]),
            np.array([theirs[name].to_numpy() for name in _KEYS]),
        )
        # One of the two failed somewhere: the rows that both have.
        if same[0].shape != same[1].shape or not (same[0] == same[1]).all():
            shared = [{tuple(row) for row in x.T.tolist()} for x in same]
            both = shared[0] & shared[1]
            mine, theirs = (
                t.filter(pa.array([tuple(row) in both for row in x.T.tolist()], pa.bool_()))
                for t, x in zip((mine, theirs), same, strict=True)
            )
        self._mine, self._theirs = mine, theirs

    @property
    def asked(self) -> bool:
        """Whether either was asked single tokens."""
        return any(len(t) and bool(t["asked"].to_numpy().any()) for t in (self._mine, self._theirs))

    def __str__(self) -> str:
        """How many were asked."""
        asked = max(
            int((t["asked"].to_numpy() & (t["head"].to_numpy() == 0)).sum())
            for t in (self._mine, self._theirs)
        )
        return f"of their rows {asked} as one query token a call"

    @property
    def equal(self) -> bool:
        """Whether all results are the same, as their errors to exact tell."""
        return np.array_equal(*(t["square_error"].to_numpy() for t in (self._mine, self._theirs)))

    def judge(self, margin: float) -> Judgement | None:
        """The strata, regimes of n_kv; None where nothing was asked."""
        if not self.asked:
            return None
        figure = {
            "candidate": self._mine["square_error"].to_numpy(),
            "reference": self._theirs["square_error"].to_numpy(),
            "floor": np.minimum(*(t["floor"].to_numpy() for t in (self._mine, self._theirs))),
            "power": self._mine["power"].to_numpy(),
        }
        if not figure["reference"].any():
            # A baseline that is exact leaves its place to the floor.
            figure["reference"] = FLOOR_NOISE**2 * figure["power"]
        power = np.maximum(figure["power"], np.finfo(float).tiny)
        figure = {name: x / power for name, x in figure.items()}
        head, n_kv = (self._mine[name].to_numpy() for name in ("head", "n_kv"))
        starts = np.flatnonzero(head == 0)
        counts = np.diff([*starts, len(head)])
        # Layers of unlike heads: their mean is one.
        alike = len(set(counts.tolist())) == 1
        shaped = {
            name: x.reshape(len(starts), -1)
            if alike
            else np.add.reduceat(x, starts)[:, None] / counts[:, None]
            for name, x in figure.items()
        }
        lengths = n_kv[starts]
        regimes = [regime_of(int(n)) for n in lengths]
        strata = []
        for regime in sorted(set(regimes)):
            here = np.array([one == regime for one in regimes])
            strata.append(
                Stratum(
                    shape="",
                    n_kv=int(lengths[here].max()),
                    family="one query token",
                    heads=tuple(range(shaped["power"].shape[1])),
                    a_kv_head=self.a_kv_head,
                    **{name: x[here] for name, x in shaped.items()},
                )
            )
        return judge_strata(strata, margin)


def asked_and_other(table: pa.Table, arm: str) -> tuple[int, int]:
    """Calls of one query token of an arm, and those whose row has other bits than in the call of many."""
    rows = _of(table, arm)
    rows = rows.filter(rows["asked"])
    if not len(rows):
        return 0, 0
    calls = np.flatnonzero(rows["head"].to_numpy() == 0)
    same = np.logical_and.reduceat(rows["same_bits"].to_numpy(zero_copy_only=False), calls)
    return len(calls), int((~same).sum())


def alone_record(
    arm: Arm, result: GroupResult, judgement: Judgement | None, scored: range
) -> AloneRecord | None:
    """What single tokens say of one arm; None where it was asked none. scored: n_kv of rows that are."""
    table = _of(result.alone, arm.name)
    table = table.filter(table["asked"])
    errors = in_place_record(result.layers, alone_name(arm.name))
    if not len(table) or errors is None:
        return None
    figure = {
        name: table[name].to_numpy() for name in (*_KEYS, "square_error", "square_error_of_many", "power")
    }
    calls = np.flatnonzero(figure["head"] == 0)
    layers, lengths = figure["layer"][calls].tolist(), figure["n_kv"][calls].tolist()
    each = Counter((layer, regime_of(n)) for layer, n in zip(layers, lengths, strict=True))
    same = np.logical_and.reduceat(table["same_bits"].to_numpy(zero_copy_only=False), calls)
    own, many = (
        float((figure[n] / figure["power"].clip(1e-300)).sum())
        for n in ("square_error", "square_error_of_many")
    )
    return AloneRecord(
        arm=arm.name,
        calls=len(calls),
        rows=sum(line.rows for line in result.traces[arm.name].coverage() if line.tokens != 1),
        least=min((n for (_, regime), n in each.items() if is_scored(regime, scored)), default=0),
        left_out=result.left_out,
        n_kv_min=min(lengths),
        n_kv_max=max(lengths),
        other_bits=int((~same).sum()),
        against_many=math.sqrt(own / many) if many else math.nan,
        seconds=result.seconds.get(SINGLE_TOKENS, math.nan),
        errors=errors,
        regimes=[
            AloneRegime(
                n_kv=s.n_kv,
                heads=s.heads,
                calls=s.samples,
                ratio=s.ratio,
                ratio_ci=(s.low, s.high),
                word=s.word,
            )
            for s in (judgement.strata if judgement is not None else ())
        ],
    )
