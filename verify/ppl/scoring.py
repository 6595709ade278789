"""Logits of every arm into one row a scored token and arm: nll, divergences, the most likely token.

nll  = lse(l) - l[target]                      in float64, from float32 logits
KLD(P, Q) = sum_i P_i (ln P_i - ln Q_i)        P: exact, or the baseline; Q: the arm

Logits arrive a part of the vocabulary at a time and are never kept. With m the largest logit so far, each row
keeps Z = sum_i exp(l_i - m) and, for each pair of arms, D = sum_i exp(l^P_i - m^P) (l^P_i - l^Q_i); both are
multiplied by exp(m - m') where m grows to m'. In the end

    lse = m + ln Z          KLD(P, Q) = D / Z^P - (lse^P - lse^Q)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from verify.kernels.bits import different
from verify.model.logits import GPU_LOGIT_ROWS, LogitSlice

# Rows of float64 numbers held at once on a CPU, for its caches' sake; a GPU takes whole tiles.
_CPU_ROWS = 16


class TokenScores(NamedTuple):
    """Per scored token of a group: arrays [rows]."""

    ran: np.ndarray  # the rows that the arm ran; all others are NaN, or -1 in top1

    nll: np.ndarray  # of the token that came
    kld_to_exact: np.ndarray  # NaN where there is no such arm
    kld_to_baseline: np.ndarray  # NaN where there is no such arm
    top1: np.ndarray  # the most likely token
    target_logit: np.ndarray  # of the token that came
    top1_margin: np.ndarray  # between the two largest logits


class BestTwo(NamedTuple):
    """The two most likely tokens of each row, and the logarithms of their probabilities: [rows, 2]."""

    tokens: np.ndarray
    logp: np.ndarray


@dataclass
class _ScoredRows:
    """What is known so far of some consecutive rows: arrays [rows]. Arms that share logits share these."""

    used: int  # the first of the rows, that are wanted
    top: torch.Tensor  # the largest logit
    second: torch.Tensor  # the second largest
    best: torch.Tensor  # vocabulary index of the largest
    next: torch.Tensor  # vocabulary index of the second
    total: torch.Tensor  # Z, see above
    target: torch.Tensor  # logit of the token that came
    moments: dict[str, torch.Tensor] = field(default_factory=dict)  # reference -> D, see above


class Scorer:
    """Scores the logits of one group.

    exact: name of the oracle's arm; baseline_of: arm -> the arm that it is compared with; targets [rows]: the
    token after each scored position.
    """

    def __init__(self, *, exact: str | None, baseline_of: Mapping[str, str], targets: torch.Tensor) -> None:
        self.exact, self.baseline_of = exact, baseline_of
        self.rows = len(targets)
        # Tiles may reach beyond the last row.
        self.targets = torch.nn.functional.pad(targets, (0, GPU_LOGIT_ROWS))
        # By arm and first row.
        self._rows: dict[tuple[str, int], _ScoredRows] = {}
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
        whole = {name: self._joined(name) for name in self._names()}
        lse = {name: rows.top.double() + torch.log(rows.total) for name, rows in whole.items()}

        def kld(name: str, reference: str | None) -> torch.Tensor:
            if reference not in whole:
                return torch.full_like(lse[name], torch.nan)
            p, moments = whole[reference], whole[name].moments
            if reference not in moments:  # the same logits in both
                return torch.where(torch.isnan(lse[name] - lse[reference]), torch.nan, 0.0)
            return moments[reference] / p.total - (lse[reference] - lse[name])

        return {
            name: TokenScores(
                ran=_array(rows.best >= 0),
                nll=_array(lse[name] - rows.target.double()),
                kld_to_exact=_array(kld(name, self.exact)),
                kld_to_baseline=_array(kld(name, self.baseline_of.get(name))),
                top1=_array(rows.best),
                target_logit=_array(rows.target),
                top1_margin=_array(rows.top - rows.second),
            )
            for name, rows in whole.items()
        }

    def best_two(self) -> dict[str, BestTwo]:
        """Of each arm, once the whole vocabulary was seen; rows that it did not run have tokens -1."""
        found = {}
        for name in self._names():
            rows = self._joined(name)
            lse = rows.top.double() + torch.log(rows.total)
            logp = torch.stack((rows.top, rows.second), 1).double() - lse[:, None]
            tokens = torch.stack((rows.best, rows.next), 1)
            found[name] = BestTwo(tokens.cpu().numpy(), logp.cpu().numpy())
        return found

    def _names(self) -> list[str]:
        return sorted({name for name, _ in self._rows})

    def _add(self, rows: range, vocabulary: range, logits: Mapping[str, torch.Tensor]) -> None:
        """Logits [as many rows as a step has, len(vocabulary)]; arms that share theirs share a tensor."""
        sharing: dict[int, list[str]] = {}
        for name, x in logits.items():
            sharing.setdefault(x.data_ptr(), []).append(name)
        references = {other for other in (self.exact, *self.baseline_of.values()) if other in logits}
        # Exponentials of references, by where the logits lie: the others are measured against them.
        wide: dict[int, torch.Tensor] = {}
        grown: dict[int, torch.Tensor] = {}
        for place, names in sharing.items():
            x, state = logits[names[0]], self._state(names, rows, len(logits[names[0]]))
            rescale = _take_in(state, x, vocabulary)
            needed = not references.isdisjoint(names)
            e = self._wide(f"e of {names[0]}" if needed else "e", x).sub_(state.top.double()[:, None]).exp_()
            state.total = state.total * rescale + e.sum(-1)
            if needed:
                wide[place], grown[place] = e, rescale
            at = self.targets[rows.start : rows.start + len(x)] - vocabulary.start
            inside = (at >= 0) & (at < len(vocabulary))
            found = x.gather(1, at.clamp(0, len(vocabulary) - 1)[:, None])[:, 0]
            state.target = torch.where(inside, found, state.target)
        for names in sharing.values():
            x, moments = logits[names[0]], self._rows[names[0], rows.start].moments
            for reference in dict.fromkeys(
                [self.exact or "", *(self.baseline_of.get(name, "") for name in names)]
            ):
                if reference in logits and reference not in names:
                    its_place = logits[reference].data_ptr()
                    difference = self._wide("difference", logits[reference]).sub_(x)
                    more = difference.mul_(wide[its_place]).sum(-1)
                    moments[reference] = moments.get(reference, 0.0) * grown[its_place] + more
            for name in names:
                if (other := self.baseline_of.get(name, "")) in logits:
                    self._compare(name, x, logits[other])

    def _compare(self, name: str, x: torch.Tensor, other: torch.Tensor) -> None:
        """Note whether the logits have the same bits. On a GPU nothing waits for the answer."""
        known = self._equal.setdefault(name, torch.ones((), dtype=torch.bool, device=x.device))
        if x.data_ptr() != other.data_ptr() and (x.is_cuda or known):
            self._equal[name] = known & ~different(x, other).any()

    def _wide(self, use: str, x: torch.Tensor) -> torch.Tensor:
        """x in float64, in the memory kept for this use."""
        kept = self._scratch.get(use)
        if kept is None or kept.shape[1] != x.shape[1] or len(kept) < len(x):
            kept = self._scratch[use] = x.new_empty(x.shape, dtype=torch.float64)
        return kept[: len(x)].copy_(x)

    def _state(self, names: Sequence[str], rows: range, size: int) -> _ScoredRows:
        key = names[0], rows.start
        if key not in self._rows:
            lowest = torch.full((size,), -torch.inf, device=self.targets.device)
            none = torch.zeros_like(lowest, dtype=torch.int64)
            self._rows[key] = _ScoredRows(
                used=len(rows),
                top=lowest,
                second=lowest,
                best=none,
                next=none,
                total=none.double(),
                target=lowest,
            )
            for name in names[1:]:
                self._rows[name, rows.start] = self._rows[key]
        return self._rows[key]

    def _joined(self, name: str) -> _ScoredRows:
        """All rows of the group, as the arm has them."""
        mine = [(start, self._rows[of, start]) for of, start in sorted(self._rows) if of == name]
        at = torch.cat([torch.arange(start, start + rows.used) for start, rows in mine])
        at = at.to(self.targets.device)

        def whole(values: Iterable[torch.Tensor], missing: float = torch.nan) -> torch.Tensor:
            found = torch.cat([x[: rows.used] for x, (_, rows) in zip(values, mine, strict=True)])
            return found.new_full((self.rows,), missing).index_copy_(0, at, found)

        top, second, total, target = (
            whole(getattr(rows, kind) for _, rows in mine) for kind in ("top", "second", "total", "target")
        )
        best, following = (whole((getattr(rows, kind) for _, rows in mine), -1) for kind in ("best", "next"))
        # Where an arm and its reference share their logits there is no difference to add up.
        moments = {
            other: whole(rows.moments.get(other, torch.zeros_like(rows.total)) for _, rows in mine)
            for other in dict.fromkeys(other for _, rows in mine for other in rows.moments)
        }
        return _ScoredRows(
            used=self.rows,
            top=top,
            second=second,
            best=best,
            next=following,
            total=total,
            target=target,
            moments=moments,
        )


def _array(x: torch.Tensor) -> np.ndarray:
    return x.cpu().numpy()


def _take_in(state: _ScoredRows, x: torch.Tensor, vocabulary: range) -> torch.Tensor:
    """Enter the two largest of further logits x [rows, len(vocabulary)]; exp(m - m') of each row.

    x is written to, and put back.
    """
    top, best = x.max(-1)
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
    return rescale
