"""Logits of every arm into one row a scored token and arm: nll, divergences, the most likely token.

nll  = lse(l) - l[target]                      in float64, from float32 logits
KLD(P, Q) = sum_i P_i (ln P_i - ln Q_i)        P: exact, or the baseline; Q: the arm
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

# Rows of float64 probabilities held at once.
_ROWS = 16


class TokenScores(NamedTuple):
    """Per scored token of one slice: arrays [rows]; KLDs are NaN where there is no arm to compare with."""

    nll: np.ndarray
    kld_to_exact: np.ndarray
    kld_to_baseline: np.ndarray
    top1: np.ndarray
    target_logit: np.ndarray
    top1_margin: np.ndarray


class Scorer:
    """Scores slices of logits of one vocabulary, in buffers that are kept: float64 rows are large.

    exact: name of the oracle's arm; baseline_of: arm -> the arm that it is compared with.
    """

    def __init__(self, *, exact: str | None, baseline_of: Mapping[str, str]) -> None:
        self.exact, self.baseline_of = exact, baseline_of
        self.references = sorted({*baseline_of.values(), *([exact] if exact else [])})
        self._buffers: dict[str, torch.Tensor] = {}

    def score(self, logits: Mapping[str, torch.Tensor], targets: torch.Tensor) -> dict[str, TokenScores]:
        """Scores of each arm. logits: name -> [rows, vocabulary] float32; targets [rows]."""
        found: dict[str, list[list[torch.Tensor]]] = {name: [] for name in logits}
        for first in range(0, len(targets), _ROWS):
            part = slice(first, min(first + _ROWS, len(targets)))
            live = [name for name in self.references if name in logits]
            for name in live:
                log_p = self._log_softmax(logits[name][part], f"log {name}")
                torch.exp(log_p, out=self._buffer(f"p {name}", log_p))
            for name, x in logits.items():
                raw, chosen = x[part], targets[part, None]
                own = self._buffers.get(f"log {name}")
                own = own[: len(raw)] if own is not None else self._log_softmax(raw, "own")
                top2 = raw.topk(2, -1)
                found[name].append(
                    [
                        -own.gather(1, chosen)[:, 0],
                        self._kld(self.exact, own, live),
                        self._kld(self.baseline_of.get(name), own, live),
                        top2.indices[:, 0],
                        raw.gather(1, chosen)[:, 0],
                        top2.values[:, 0] - top2.values[:, 1],
                    ]
                )
        return {
            name: TokenScores(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))
            for name, parts in found.items()
        }

    def _kld(self, reference: str | None, own: torch.Tensor, live: Sequence[str]) -> torch.Tensor:
        """sum_i P_i (ln P_i - ln Q_i) of each row, NaN without a reference."""
        if reference is None or reference not in live:
            return own.new_full(own.shape[:1], torch.nan)
        rows = len(own)
        work = self._buffer("work", own)
        torch.sub(self._buffers[f"log {reference}"][:rows], own, out=work)
        return work.mul_(self._buffers[f"p {reference}"][:rows]).sum(-1)

    def _log_softmax(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """ln softmax of float32 rows, in float64."""
        y = self._buffer(name, x).copy_(x)
        y.sub_(y.amax(-1, keepdim=True))
        work = self._buffer("work", x)
        return y.sub_(torch.exp(y, out=work).sum(-1, keepdim=True).log_())

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """float64 rows of this name, as many as `like` has."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(
                (_ROWS, like.shape[-1]), dtype=torch.float64, device=like.device
            )
        return self._buffers[name][: len(like)]
