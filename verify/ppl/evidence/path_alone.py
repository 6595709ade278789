"""What another form of calls changes by itself: a kernel beside itself in plain calls of one query token.

Who speculates computes some tokens a call, and takes what that gives for what single tokens would have: the
most likely token is all that greedy text knows of it. It changes where two tokens are nearly as likely; what
that says is known only beside what one rounding of noise changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from verify.arms.arm import Arm
from verify.judge.ties import is_tie
from verify.ppl.evidence.changed_tokens import floor_at
from verify.ppl.evidence.pairs import both
from verify.ppl.evidence.scores import Scores
from verify.ppl.groups import GroupResult
from verify.ppl.record import PathAloneRecord


def path_alone_record(
    candidate: Arm, reference: Arm, result: GroupResult, scores: Scores, *, exact: str, floor: str | None
) -> PathAloneRecord | None:
    """None unless the reference is the candidate's own kernel in other calls, and both ran."""
    top1, theirs = both(scores, candidate.name, reference.name, "top1")
    if candidate.spec != reference.spec or candidate.form == reference.form or not top1.size:
        return None
    floor_changes = floor_tokens = 0
    if floor is not None:
        noisy, exactly = both(scores, floor, exact, "top1")
        floor_changes, floor_tokens = int((noisy != exactly).sum()), int(noisy.size)
    rows = result.top1.filter(pc.equal(result.top1["candidate"], candidate.name)).to_pylist()
    return path_alone_of(
        candidate,
        [is_tied_row(row) for row in rows],
        tokens=int(top1.size),
        top1_changes=int(np.not_equal(top1, theirs).sum()),
        floor_changes=floor_changes,
        floor_tokens=floor_tokens,
        bitwise_equal=result.findings[candidate.name].kept_all_bits,
    )


def path_alone_of(
    candidate: Arm,
    tied: Sequence[bool | None],
    *,
    tokens: int,
    top1_changes: int,
    floor_changes: int,
    floor_tokens: int,
    bitwise_equal: bool,
) -> PathAloneRecord:
    """The record of `candidate`'s form of calls. tied: of each changed token, whether it is a tie (None: not
    known); the rest are the record's own fields."""
    form = candidate.form
    return PathAloneRecord(
        candidate=candidate.name,
        calls=str(form),
        n_q=form.n_q,
        page=form.page,
        sequences=form.sequences,
        tokens=tokens,
        top1_changes=top1_changes,
        floor_changes=floor_changes,
        floor_tokens=floor_tokens,
        ties=tied.count(True),
        not_known=tied.count(None),
        bitwise_equal=bitwise_equal,
    )


def is_tied_row(row: Mapping[str, Any]) -> bool | None:
    """Whether a changed token, a row of top1.parquet, is a tie. A token that is not among the two most likely
    of both is none. None where the floor did not run."""
    margins = [
        row[f"logp_{arm}_reference"] - row[f"logp_{arm}_candidate"] for arm in ("reference", "candidate")
    ]
    return is_tie(abs(margins[1] - margins[0]), floor_at(row))
