"""Divergences against the context length: where along a window two arms differ."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

import numpy as np

from verify.judge.statistics import paired_difference
from verify.ppl.evidence.pairs import both
from verify.ppl.evidence.scores import Scores
from verify.ppl.record import LengthRecord, frozen_name

# Ranges of n_kv, and scored positions that each has at least.
MOST_RANGES, FEWEST_POSITIONS = 16, 8


def by_n_kv(
    candidate: str,
    reference: str,
    scores: Scores,
    *,
    scored_n_kv: range,
    changed_n_kv: Collection[int],
    floor: str | None,
) -> list[LengthRecord]:
    """A candidate's entries of `by_n_kv`.

    scored_n_kv: visible keys of the scored positions of a window; changed_n_kv: those at which another plan
    ran; floor: name of the floor's arm.
    """
    nll = both(scores, candidate, reference, "nll")
    frozen_nll = both(scores, frozen_name(candidate), frozen_name(reference), "nll")
    kld = both(scores, frozen_name(candidate), frozen_name(reference), "kld_to_exact")
    between = scores.column(candidate, "kld_to_baseline")
    floor_kld = scores.column(floor, "kld_to_exact") if floor else np.empty((0, len(scored_n_kv)))
    if not nll[0].size or not kld[0].size:
        return []
    ranges = max(min(MOST_RANGES, len(scored_n_kv) // FEWEST_POSITIONS), 1)
    edges = [len(scored_n_kv) * i // ranges for i in range(ranges + 1)]
    records = []
    for first, last in pairwise(edges):
        part = slice(first, last)
        difference = paired_difference(*(x[:, part] for x in nll))
        inside = scored_n_kv[part]
        records.append(
            LengthRecord(
                candidate=candidate,
                reference=reference,
                n_kv_min=inside[0],
                n_kv_max=inside[-1],
                tokens=int(nll[0][:, part].size),
                changed=sum(n in changed_n_kv for n in inside) / len(inside),
                frozen_kld=float(kld[0][:, part].mean()),
                frozen_kld_reference=float(kld[1][:, part].mean()),
                floor_kld=float(floor_kld[:, part].mean()) if floor_kld.size else None,
                kld_mean=float(between[:, part].mean()),
                dnll=difference.mean,
                dnll_se=difference.se,
                cost_nats=float((frozen_nll[0] - frozen_nll[1])[:, part].mean()),
            )
        )
    return records
