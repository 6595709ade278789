"""Scores of logits that come in parts, against the formulas on whole rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verify.model.logits import LogitSlice
from verify.ppl.scoring import Scorer, TokenScores

ROWS, VOCABULARY = 23, 50
NAMES = ("exact", "baseline", "control", "candidate")
BASELINE_OF = {"control": "baseline", "candidate": "baseline"}


def logits() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    exact = 3 * torch.randn(ROWS, VOCABULARY, generator=generator)
    found = {"exact": exact, "baseline": exact + 1e-3 * torch.randn(exact.shape, generator=generator)}
    found["control"] = found["baseline"].clone()
    found["candidate"] = exact + 1e-2 * torch.randn(exact.shape, generator=generator)
    return found


TARGETS = torch.arange(ROWS) * 2


def scored(given: dict[str, torch.Tensor], part: int, tile: int) -> tuple[dict[str, TokenScores], Scorer]:
    scorer = Scorer(exact="exact", baseline_of=BASELINE_OF, targets=TARGETS)
    for first in range(0, VOCABULARY, part):
        vocabulary = range(first, min(first + part, VOCABULARY))
        for start in range(0, ROWS, tile):
            rows = range(start, min(start + tile, ROWS))
            pieces = {
                name: torch.nn.functional.pad(
                    x[rows.start : rows.stop, vocabulary.start : vocabulary.stop], (0, 0, 0, tile - len(rows))
                )
                for name, x in given.items()
            }
            scorer.add(LogitSlice(rows, vocabulary, pieces))
    return scorer.scores(), scorer


@pytest.mark.parametrize(("part", "tile"), [(50, 32), (50, 16), (16, 16), (7, 32), (1, 16)])
def test_parts_of_the_vocabulary_add_up(part: int, tile: int) -> None:
    given = logits()
    found, scorer = scored(given, part, tile)
    log = {name: x.double().log_softmax(-1) for name, x in given.items()}
    for name, x in given.items():
        scores = found[name]
        nll = -log[name].gather(1, TARGETS[:, None])[:, 0]
        assert np.allclose(scores.nll, nll, rtol=1e-13)
        kld = (log["exact"].exp() * (log["exact"] - log[name])).sum(-1)
        assert np.allclose(scores.kld_to_exact, kld, rtol=1e-8, atol=1e-14)
        top2 = x.topk(2)
        assert np.array_equal(scores.top1, top2.indices[:, 0])
        assert np.array_equal(scores.top1_margin, top2.values[:, 0] - top2.values[:, 1])
        assert np.array_equal(scores.target_logit, x.gather(1, TARGETS[:, None])[:, 0])
    kld = (log["baseline"].exp() * (log["baseline"] - log["candidate"])).sum(-1)
    assert np.allclose(found["candidate"].kld_to_baseline, kld, rtol=1e-8, atol=1e-14)
    assert not found["exact"].kld_to_exact.any()
    assert not found["control"].kld_to_baseline.any()
    assert np.isnan(found["baseline"].kld_to_baseline).all()
    assert scorer.logits_equal == {"control": True, "candidate": False}


def test_what_is_not_finite_stays_so() -> None:
    given = logits()
    given["candidate"][5, 7] = torch.nan
    given["candidate"][6, 8] = torch.inf
    found, _ = scored(given, 16, 16)
    bad = ~np.isfinite(found["candidate"].nll)
    assert bad.nonzero()[0].tolist() == [5, 6]
    assert np.isfinite(found["baseline"].nll).all()


def test_of_equal_logits_the_first_is_the_top() -> None:
    given = {"exact": torch.zeros(ROWS, VOCABULARY)}
    found, _ = scored(given, 16, 16)
    assert not found["exact"].top1.any()
    assert not found["exact"].top1_margin.any()
