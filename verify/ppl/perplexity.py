"""Perplexity as llama-perplexity computes and prints it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Perplexity(NamedTuple):
    """ppl = exp(mean nll); se: its error bar, ppl times the standard error of the mean nll."""

    ppl: float
    se: float
    nll_mean: float
    tokens: int


def perplexity(nll: np.ndarray) -> Perplexity:
    """Perplexity of nll [tokens], in nats.

    The error takes tokens as independent: sigma = sqrt((mean(nll^2) - mean(nll)^2) / (n - 1)).
    """
    n = len(nll)
    if n == 0:
        return Perplexity(math.nan, math.nan, math.nan, 0)
    mean = float(nll.mean())
    spread = max(float((nll * nll).mean()) - mean * mean, 0.0) if np.isfinite(nll).all() else math.nan
    sigma = math.sqrt(spread / (n - 1)) if n > 1 else math.nan
    ppl = _exp(mean)
    return Perplexity(ppl, ppl * sigma, mean, n)


def running_perplexity(nll: np.ndarray) -> list[float]:
    """Perplexity over all windows so far, after each window of nll [windows, scored]."""
    scored = nll.shape[1]
    totals = np.cumsum(nll.sum(1))
    return [_exp(float(total) / (scored * (w + 1))) for w, total in enumerate(totals)]


def running_line(values: list[float], first: int) -> str:
    """`[1]12.9562,[2]21.3752,` for windows first, first + 1, ... counted from 0."""
    return "".join(f"[{first + i + 1}]{value:.4f}," for i, value in enumerate(values))


def final_line(result: Perplexity, *, n_ctx: int, windows: int) -> str:
    """The closing line of ik_llama.cpp's program."""
    return (
        f"Final estimate: PPL over {windows} chunks for n_ctx={n_ctx} = {result.ppl:.4f} +/- {result.se:.5f}"
    )


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
