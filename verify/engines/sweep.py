"""Speed logs compared: ratios by depth, a line a file, and whether and where the ratio changes.

The line is T = a + b N_KV by Theil and Sen: b the median of the slopes of all pairs, with the interval of
Kendall's test (Sen 1968); a the median of T - b N_KV, its interval from the ends of b's.

The change point is the depth k that minimises the squares of a ratio that is constant before k and a line
from k on, with at least two depths on either side. It is believed if three things hold:

    chance     of 20,000 series of normal noise at these depths, fewer than 1 in 100 reach its F statistic
    not drift  one straight line through all depths fits worse, by a difference of BIC of more than 6
    it stays   every ratio after it lies on the same side of every ratio before it

Repeats of a depth count as their median.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from verify.engines.plans import Setting, Stretch, stretches
from verify.engines.sweep_log import SweepLog
from verify.judge.chances import normal_quantile, student_quantile
from verify.kernels.plans.policy import Policy
from verify.machine.errors import UsageError

Column = Literal["t_tg", "t_pp"]
COLUMNS: dict[Column, str] = {"t_tg": "T_TG", "t_pp": "T_PP"}
LINE_CONFIDENCE = 0.95
FEWEST_EACH_SIDE = 2
SERIES, MOST_BY_CHANCE = 20000, 0.01
BIC_NEEDED = 6.0
# A slowdown below this is not worth an exit code.
SLOWDOWN = 1.01
SLOWDOWN_CONFIDENCE = 0.99


class FittedLine(NamedTuple):
    """T = a + b N_KV, with intervals."""

    a: float  # seconds
    a_low: float  # of its interval
    a_high: float  # of its interval
    b: float  # seconds a cached token
    b_low: float  # of its interval
    b_high: float  # of its interval


class ChangePoint(NamedTuple):
    """The best candidate for a change of the ratio, and whether it is believed."""

    n_kv: int  # depth from which it holds
    before: float  # mean ratio before it
    first: float  # ratio at it
    last: float  # ratio at the end
    by_chance: float  # share of series of noise with as large a statistic
    bic: float  # how much better it is than one straight line
    stays: bool  # every ratio from it on lies on one side of every ratio before

    @property
    def reasons(self) -> list[str]:
        found = []
        if self.by_chance > MOST_BY_CHANCE:
            found.append(f"{self.by_chance:.1%} of noise shows as much")
        if self.bic <= BIC_NEEDED:
            found.append("one straight line explains it as well")
        if not self.stays:
            found.append("ratios after it fall back among those before it")
        return found

    @property
    def believed(self) -> bool:
        return not self.reasons


class ColumnComparison(NamedTuple):
    """One column of one log against that of another of the same work."""

    label: str  # of the log
    # The log that it is compared with.
    against: str
    column: Column  # of both logs
    depths: list[int]  # cached tokens
    # Times over the other's, at each depth.
    ratios: list[float]
    change: ChangePoint | None  # None: no candidate for one
    # Of the ratio over the depths, with its interval at SLOWDOWN_CONFIDENCE.
    mean: float
    mean_low: float  # of its interval
    mean_high: float  # of its interval

    @property
    def slower(self) -> bool:
        """A significant slowdown: from a change point on, or all over."""
        later = self.change is not None and self.change.believed and self.change.last > SLOWDOWN
        return (later and self.change.last > self.change.before) or self.mean_low > SLOWDOWN  # type: ignore[union-attr]

    @property
    def peak(self) -> tuple[int, float]:
        """The depth whose ratio is farthest from 1, and that ratio."""
        return max(zip(self.depths, self.ratios, strict=True), key=lambda x: abs(x[1] - 1))


class SplitStart(NamedTuple):
    """Where a policy changes its plan, and the first row of the logs that runs the new one."""

    stretch: Stretch
    before: Stretch
    row: int | None


def medians(log: SweepLog, column: Column) -> dict[int, float]:
    """Depth -> the median of its repeats; empty where the log has no such times."""
    found: dict[int, list[float]] = {}
    for row in log.rows:
        if (seconds := getattr(row, column)) is not None:
            found.setdefault(row.n_kv, []).append(seconds)
    return {n_kv: float(np.median(times)) for n_kv, times in found.items()}


def pairs_of(logs: Sequence[SweepLog]) -> list[tuple[SweepLog, SweepLog]]:
    """Every log with the first before it that did the same work at some of the same depths.

    Raises UsageError where a file has no log that can be compared, though there are several files.
    """
    pairs = []
    for i, log in enumerate(logs):
        found = next((first for first in logs[:i] if not _unlike(first, log)), None)
        if found is not None:
            pairs.append((found, log))
    first = logs[0]
    for path in dict.fromkeys(log.path for log in logs):
        mine = [log for log in logs if log.path == path]
        if path != first.path and not any(log in pair for pair in pairs for log in mine):
            raise UsageError(f"{path}: {_unlike(first, mine[0])} as in {first.path}")
    return pairs


def _unlike(first: SweepLog, other: SweepLog) -> str:
    """Why two logs cannot be compared; empty where they can."""
    for name, a, b in zip(("PP", "TG"), first.work, other.work, strict=True):
        if a and b and a != b:
            (pp, tg), (other_pp, other_tg) = first.work, other.work
            return f"{name} {b}: PP {other_pp} and TG {other_tg}, expected {pp} and {tg}"
    shared = any(medians(first, c).keys() & medians(other, c).keys() for c in COLUMNS)
    return "" if shared else "N_KV: no depth in common, expected some"


def theil_sen(x: np.ndarray, y: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """The median of the slopes of all pairs at different x, and its limits by Kendall's test (Sen 1968).

    Under no slope the pairs' signs add up to a sum whose variance, with ties, is that of Sen's equation 2.6;
    the limits are the slopes that lie as many ranks from the middle as that sum reaches by chance.
    """
    i, j = np.triu_indices(len(x), 1)
    apart = x[i] != x[j]
    slopes = np.sort((y[j] - y[i])[apart] / (x[j] - x[i])[apart])
    n, pairs = len(y), len(slopes)
    tied = [count for of in (x, y) for count in np.unique(of, return_counts=True)[1]]
    variance = (_kendall(n) - sum(_kendall(count) for count in tied)) / 18
    reach = normal_quantile((1 + confidence) / 2) * math.sqrt(max(variance, 0.0))
    low, high = round((pairs - reach) / 2) - 1, round((pairs + reach) / 2)
    return float(np.median(slopes)), float(slopes[max(low, 0)]), float(slopes[min(high, pairs - 1)])


def _kendall(n: int) -> int:
    return n * (n - 1) * (2 * n + 5)


def fit_line(depths: Sequence[int], times: Sequence[float]) -> FittedLine | None:
    """None for fewer than three depths."""
    if len(depths) < 3:
        return None
    x, y = np.array(depths, float), np.array(times)
    b, low, high = theil_sen(x, y, LINE_CONFIDENCE)
    a = float(np.median(y - b * x))
    ends = sorted(float(np.median(y - slope * x)) for slope in (low, high))
    return FittedLine(a=a, a_low=ends[0], a_high=ends[1], b=b, b_low=low, b_high=high)


def compare(main: SweepLog, other: SweepLog, column: Column) -> ColumnComparison | None:
    """Ratios of the times of `other` to those of `main`, at the depths that both have; None without any."""
    base, theirs = medians(main, column), medians(other, column)
    depths = sorted(base.keys() & theirs.keys())
    if not depths:
        return None
    ratios = [theirs[n] / base[n] for n in depths]
    mean = float(np.mean(ratios))
    reach = math.inf
    if len(ratios) > 1:
        t = float(student_quantile((1 + SLOWDOWN_CONFIDENCE) / 2, len(ratios) - 1))
        reach = t * float(np.std(ratios, ddof=1)) / math.sqrt(len(ratios))
    return ColumnComparison(
        label=other.label,
        against=main.label,
        column=column,
        depths=depths,
        ratios=ratios,
        change=change_point(depths, ratios),
        mean=mean,
        mean_low=mean - reach,
        mean_high=mean + reach,
    )


def change_point(depths: Sequence[int], ratios: Sequence[float], seed: int = 0) -> ChangePoint | None:
    """None where there are too few depths for one, or all ratios are the same."""
    x, y = np.array(depths, float), np.array(ratios)
    n = len(x)
    if n < 2 * FEWEST_EACH_SIDE + 1 or np.ptp(y) == 0:
        return None
    cuts = range(FEWEST_EACH_SIDE, n - FEWEST_EACH_SIDE + 1)
    # Residuals of the two-piece model are linear in y: one projection a cut, for all series at once.
    residual = [_residual_maker(x, k) for k in cuts]
    total = float(((y - y.mean()) ** 2).sum())
    squares = np.array([float((r @ y) @ y) for r in residual])
    best = int(squares.argmin())
    k = cuts[best]
    noise = np.random.default_rng(seed).standard_normal((SERIES, n))
    noise -= noise.mean(1, keepdims=True)
    least = np.min([((noise @ r) * noise).sum(1) for r in residual], axis=0)
    # F grows as the share of the squares that is left falls: that share is the statistic.
    reached = int((least / (noise**2).sum(1) <= squares[best] / total).sum())
    straight = float((_line_residual(x) @ y) @ y)
    floor = 1e-12 * total
    bic = n * math.log(max(straight, floor) / max(squares[best], floor)) - 2 * math.log(n)
    before, after = y[:k], y[k:]
    stays = bool(after.min() > before.max() or after.max() < before.min())
    return ChangePoint(
        n_kv=int(depths[k]),
        before=float(before.mean()),
        first=float(after[0]),
        last=float(after[-1]),
        by_chance=(reached + 1) / (SERIES + 1),
        bic=bic,
        stays=stays,
    )


def split_starts(policy: Policy, setting: Setting, log: SweepLog) -> list[SplitStart]:
    """Every change of a policy's plan, with the first row whose generation runs the new one."""
    plans = stretches(policy, setting)
    rows = sorted({(row.n_kv, row.tg) for row in log.rows if row.tg})
    found = []
    for before, stretch in pairwise(plans):
        # A row generates with N_KV + 1 ... N_KV + TG visible keys.
        row = next((n for n, tg in rows if n + tg >= stretch.from_n_kv), None)
        found.append(SplitStart(stretch, before, row))
    return found


def to_json(
    logs: Sequence[SweepLog],
    lines: dict[tuple[str, Column], FittedLine | None],
    compared: Sequence[ColumnComparison],
    starts: Sequence[SplitStart],
    exit_code: int,
) -> dict[str, Any]:
    """Everything, as `verify sweep --json` prints it."""
    return {
        "schema": 1,
        "command": "sweep",
        "exit_code": exit_code,
        "logs": [
            {
                "label": log.label,
                "path": str(log.path),
                "rows": [row._asdict() for row in log.rows],
                "notes": list(log.notes),
                "lines": {c: line._asdict() if (line := lines[log.label, c]) else None for c in COLUMNS},
            }
            for log in logs
        ],
        "compared": [
            {
                **c._asdict(),
                "change": {**c.change._asdict(), "believed": c.change.believed, "reasons": c.change.reasons}
                if c.change
                else None,
                "slower": c.slower,
            }
            for c in compared
        ],
        "split_starts": [
            {
                "from_n_kv": s.stretch.from_n_kv,
                "padded": s.stretch.padded,
                "plan": s.stretch.name,
                "row": s.row,
            }
            for s in starts
        ],
    }


def _residual_maker(x: np.ndarray, k: int) -> np.ndarray:
    """[n, n] projection on what a constant before index k and a line from k on leave of y."""
    before = (np.arange(len(x)) < k).astype(float)
    return _residual(np.stack([before, 1 - before, (1 - before) * (x - x[k])], 1))


def _line_residual(x: np.ndarray) -> np.ndarray:
    return _residual(np.stack([np.ones_like(x), x - x.mean()], 1))


def _residual(design: np.ndarray) -> np.ndarray:
    return np.eye(len(design)) - design @ np.linalg.pinv(design)
