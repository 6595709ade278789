"""What whole rows of logits say of a token that came, and how far two of them are apart: in float64, in nats.

    ln p      = l - lse(l)
    nll       = lse(l) - l[target]
    KLD(P, Q) = sum_i P_i (ln P_i - ln Q_i)

For rows that are held whole. `verify.ppl.scoring` takes the same sums of logits that arrive a part of the
vocabulary at a time; `verify.engines.divergence` has the arithmetic of files that hold ln p in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """ln p of logits [..., vocabulary], in float64."""
    return torch.log_softmax(logits.double(), -1)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KLD(P, Q) of logarithms of probabilities [..., vocabulary]: [...], nats."""
    return (p.exp() * (p - q)).sum(-1)


def losses(logits: torch.Tensor, targets: Sequence[int]) -> np.ndarray:
    """-ln p of the tokens that came, of every row of logits [n, vocabulary]: [n], nats."""
    at = torch.tensor(list(targets), device=logits.device)
    picked = logits.gather(1, at[:, None])[:, 0].double()
    return (torch.logsumexp(logits.double(), -1) - picked).cpu().numpy()
