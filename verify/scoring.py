"""Logits of every arm into one row a scored token and arm: nll, divergences, the most likely token.

nll  = lse(l) - l[target]                      in float64, from float32 logits
KLD(P, Q) = sum_i P_i (ln P_i - ln Q_i)        P: exact, or the baseline; Q: the arm

Logits arrive a part of the vocabulary at a time and are never kept. With m the largest logit so far, each row
keeps Z = sum_i exp(l_i - m) and, for each pair of arms, D = sum_i exp(l^P_i - m^P) (l^P_i - l^Q_i); both are
multiplied by exp(m - m') where m grows to m'. In the end

    lse = m + ln Z          KLD(P, Q) = D / Z^P - (lse^P - lse^Q)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from model.runner import GPU_LOGIT_ROWS, LogitSlice

# Rows of float64 numbers held at once on a CPU, for its caches' sake; a GPU takes whole tiles.
_CPU_ROWS = 16


class TokenScores(NamedTuple):
    """Per scored token of a group: arrays [rows]; KLDs are NaN where there is no arm to compare with."""

    nll: np.ndarray
    kld_to_exact: np.ndarray
    kld_to_baseline: np.ndarray
    top1: np.ndarray
    target_logit: np.ndarray
    top1_margin: np.ndarray


class BestTwo(NamedTuple):
    """The two most likely tokens of each row, and the logarithms of their probabilities: [rows, 2]."""

    tokens: np.ndarray
    logp: np.ndarray


@dataclass
class _Rows:
    """What is known so far of some consecutive rows: arrays [rows], of which the first `used` are wanted.

    top, second: the two largest logits; best, next: their vocabulary indices; moments: reference -> D.
    """

    used: int
    top: torch.Tensor
    second: torch.Tensor
    best: torch.Tensor
    next: torch.Tensor
    total: torch.Tensor
    target: torch.Tensor
    moments: dict[str, torch.Tensor] = field(default_factory=dict)


class Scorer:
    """Scores the logits of one group.

    exact: name of the oracle's arm; baseline_of: arm -> the arm that it is compared with; targets [rows]: the
    token after each scored position.
    """

    def __init__(self, *, exact: str | None, baseline_of: Mapping[str, str], targets: torch.Tensor) -> None:
        self.exact, self.baseline_of = exact, baseline_of
        # Tiles may reach beyond the last row.
        self.targets = torch.nn.functional.pad(targets, (0, GPU_LOGIT_ROWS))
        # By arm and first row.
        self._rows: dict[tuple[str, int], _Rows] = {}
        # Float64 numbers [rows, vocabulary] of a step, by use: allocated once, since what is allocated anew
        # for every step leaves holes between the rows kept, and they add up to gigabytes.
        self._scratch: dict[str, torch.Tensor] = {}
        self._equal: dict[str, torch.Tensor] = {}

    def add(self, piece: LogitSlice) -> None:
        """Take in some rows' logits for some of the vocabulary."""
        tile = next((len(x) for x in piece.logits.values()), 1)
        step = _CPU_ROWS if self.targets.device.type == "cpu" else tile
        for first in range(0, len(piece.rows), step):
            rows = piece.rows[first : first + step]
            self._add(rows, piece.vocabulary, {n: x[first : first + step] for n, x in piece.logits.items()})

    @property
    def logits_equal(self) -> dict[str, bool]:
        """Arm -> whether every logit has the bits of the arm that it is compared with."""
        return {name: bool(same) for name, same in self._equal.items()}

    def scores(self) -> dict[str, TokenScores]:
        """Of each arm, once the whole vocabulary was seen."""
        names = sorted({name for name, _ in self._rows})
        whole = {name: self._joined(name) for name in names}
        lse = {name: rows.top.double() + torch.log(rows.total) for name, rows in whole.items()}

        def kld(name: str, reference: str | None) -> torch.Tensor:
            if reference not in whole:
                return torch.full_like(lse[name], torch.nan)
            if reference == name:
                return torch.where(torch.isnan(lse[name]), torch.nan, 0.0)
            p = whole[reference]
            return whole[name].moments[reference] / p.total - (lse[reference] - lse[name])

        return {
            name: TokenScores(
                *(
                    x.cpu().numpy()
                    for x in (
                        lse[name] - rows.target.double(),
                        kld(name, self.exact),
                        kld(name, self.baseline_of.get(name)),
                        rows.best,
                        rows.target,
                        rows.top - rows.second,
                    )
                )
            )
            for name, rows in whole.items()
        }

    def best_two(self) -> dict[str, BestTwo]:
        """Of each arm, once the whole vocabulary was seen."""
        found = {}
        for name in sorted({name for name, _ in self._rows}):
            rows = self._joined(name)
            lse = rows.top.double() + torch.log(rows.total)
            logp = torch.stack((rows.top, rows.second), 1).double() - lse[:, None]
            tokens = torch.stack((rows.best, rows.next), 1)
            found[name] = BestTwo(tokens.cpu().numpy(), logp.cpu().numpy())
        return found

    def _add(self, rows: range, vocabulary: range, logits: Mapping[str, torch.Tensor]) -> None:
        """Logits [as many rows as a step has, len(vocabulary)]."""
        wide: dict[str, torch.Tensor] = {}
        grown: dict[str, torch.Tensor] = {}
        # References first: the others are measured against their exponentials.
        references = self._references(logits)
        for name in [*references, *(name for name in logits if name not in references)]:
            x = logits[name]
            state = self._state(name, rows, len(x))
            top, best = x.max(-1)
            # The tensor is ours until the next slice: its largest logits are taken out, and put back.
            x.scatter_(-1, best[:, None], -torch.inf)
            second, after = x.max(-1)
            x.scatter_(-1, best[:, None], top[:, None])
            new = torch.maximum(state.top, top)
            best, after = best + vocabulary.start, after + vocabulary.start
            # The second is the largest but one: of two pairs, the lesser first or the greater pair's second.
            wins = top > state.top
            lesser, its = torch.where(wins, state.top, top), torch.where(wins, state.best, best)
            rest, whose = torch.where(wins, second, state.second), torch.where(wins, after, state.next)
            state.next = torch.where(rest > lesser, whose, its)
            state.second = torch.maximum(lesser, rest)
            state.best = torch.where(wins, best, state.best)
            # Before the first part both may be -inf, and there is nothing to rescale.
            rescale = torch.where(new == state.top, 1.0, torch.exp(state.top.double() - new.double()))
            state.top = new
            e = self._wide(name if name in references else "e", x).sub_(new.double()[:, None]).exp_()
            state.total = state.total * rescale + e.sum(-1)
            if name in references:
                wide[name], grown[name] = e, rescale
            for reference in self._compared(name, logits):
                difference = self._wide("difference", logits[reference]).sub_(x)
                more = difference.mul_(wide[reference]).sum(-1)
                state.moments[reference] = state.moments.get(reference, 0.0) * grown[reference] + more
            at = self.targets[rows.start : rows.start + len(x)] - vocabulary.start
            inside = (at >= 0) & (at < len(vocabulary))
            found = x.gather(1, at.clamp(0, len(vocabulary) - 1)[:, None])[:, 0]
            state.target = torch.where(inside, found, state.target)
            other = self.baseline_of.get(name)
            if other is not None and other in logits:
                same = (x.view(torch.int32) == logits[other].view(torch.int32)).all()
                self._equal[name] = self._equal[name] & same if name in self._equal else same

    def _wide(self, use: str, x: torch.Tensor) -> torch.Tensor:
        """x in float64, in the memory kept for this use."""
        kept = self._scratch.get(use)
        if kept is None or kept.shape[1] != x.shape[1] or len(kept) < len(x):
            kept = self._scratch[use] = x.new_empty(x.shape, dtype=torch.float64)
        return kept[: len(x)].copy_(x)

    def _references(self, logits: Mapping[str, torch.Tensor]) -> list[str]:
        named = {*self.baseline_of.values(), *([self.exact] if self.exact else [])}
        return sorted(named & logits.keys(), key=lambda name: (name != self.exact, name))

    def _compared(self, name: str, logits: Mapping[str, torch.Tensor]) -> Sequence[str]:
        """The other arms that this one is measured against."""
        both = dict.fromkeys((self.exact, self.baseline_of.get(name)))
        return [other for other in both if other is not None and other != name and other in logits]

    def _state(self, name: str, rows: range, size: int) -> _Rows:
        key = name, rows.start
        if key not in self._rows:
            lowest = torch.full((size,), -torch.inf, device=self.targets.device)
            none = torch.zeros_like(lowest, dtype=torch.int64)
            self._rows[key] = _Rows(len(rows), lowest, lowest, none, none, none.double(), lowest)
        return self._rows[key]

    def _joined(self, name: str) -> _Rows:
        """All rows of an arm, without those that only fill a tile."""
        mine = [rows for (arm, _), rows in sorted(self._rows.items(), key=lambda x: x[0]) if arm == name]

        def whole(values: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([x[: rows.used] for x, rows in zip(values, mine, strict=True)])

        top, second, best, following, total, target = (
            whole([getattr(rows, kind) for rows in mine])
            for kind in ("top", "second", "best", "next", "total", "target")
        )
        moments = {other: whole([rows.moments[other] for rows in mine]) for other in mine[0].moments}
        return _Rows(len(top), top, second, best, following, total, target, moments)
