"""Logits of every arm into one row a scored token and arm: nll, divergences, the most likely token.

nll  = lse(l) - l[target]                      in float64, from float32 logits
KLD(P, Q) = sum_i P_i (ln P_i - ln Q_i)        P: exact, or the baseline; Q: the arm
"""

from __future__ import annotations

from collections.abc import Mapping
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


def score_slice(
    logits: Mapping[str, torch.Tensor],
    targets: torch.Tensor,
    *,
    exact: str | None,
    baseline_of: Mapping[str, str],
) -> dict[str, TokenScores]:
    """Scores of each arm. logits: name -> [rows, vocabulary] float32; targets [rows].

    exact: name of the oracle's arm; baseline_of: arm -> the arm that it is compared with.
    """
    rows = len(targets)
    found: dict[str, list[list[torch.Tensor]]] = {name: [] for name in logits}
    for first in range(0, rows, _ROWS):
        part = slice(first, min(first + _ROWS, rows))
        log_p = {name: torch.log_softmax(x[part].double(), -1) for name, x in logits.items()}
        p = {name: log_p[name].exp() for name in {exact, *baseline_of.values()} & log_p.keys() if name}
        for name, own in log_p.items():
            raw = logits[name][part]
            chosen = targets[part, None]
            top2 = raw.topk(2, -1)
            found[name].append(
                [
                    -own.gather(1, chosen)[:, 0],
                    _kld(p, log_p, exact, own),
                    _kld(p, log_p, baseline_of.get(name), own),
                    top2.indices[:, 0],
                    raw.gather(1, chosen)[:, 0],
                    top2.values[:, 0] - top2.values[:, 1],
                ]
            )
    return {
        name: TokenScores(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))
        for name, parts in found.items()
    }


def _kld(
    p: Mapping[str, torch.Tensor],
    log_p: Mapping[str, torch.Tensor],
    reference: str | None,
    own: torch.Tensor,
) -> torch.Tensor:
    if reference is None or reference not in p:
        return own.new_full(own.shape[:1], torch.nan)
    return (p[reference] * (log_p[reference] - own)).sum(-1)
