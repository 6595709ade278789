"""Exact attention's logprobs of the tokens that two programs scored: which of the two is nearer."""

from __future__ import annotations

import numpy as np

from verify.arms.likelihood import losses
from verify.engines.logprob_files import LogprobFile
from verify.explain.reference import EXACT, ReferencePasses
from verify.machine.errors import UsageError


def exact_logprobs(reference: ReferencePasses, file: LogprobFile) -> list[np.ndarray]:
    """ln p of every token of a file under exact attention, by sequence.

    Raises UsageError for tokens that are no ids, are of another vocabulary, or have no prompt before them.
    """
    found = []
    for i, names in enumerate(file.names):
        record = file.records[i] if file.records is not None else None
        where = record.where if record is not None else f"{file.path}, sequence {i + 1}"
        ids, kept = [x for x in names if isinstance(x, int)], list(range(len(names)))
        if record is not None:
            # What a mask leaves out was there all the same when the rest was written.
            known, kept = (record.ids, kept) if record.before_mask is None else record.before_mask
            ids = known or []
        if not ids or len(ids) < len(kept):
            raise UsageError(f"{where}: has texts of tokens, expected ids beside a model (-m)")
        before = _before(reference, file, i, where)
        reference.check(before, f"{where}: the prompt")
        reference.check(ids, where)
        logits = reference.logits([*before, *ids][:-1], EXACT, len(ids))
        found.append(-losses(logits, ids)[kept])
    return found


def _before(reference: ReferencePasses, file: LogprobFile, i: int, where: str) -> list[int]:
    """The tokens before a sequence's first scored one, as they were evaluated."""
    tokenizer = reference.tokenizer
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    if file.logits is not None:
        first = file.logits.layout.first_scored + 1
        before = [int(x) for x in file.logits.tokens[i, :first]]
        # Engines overwrite a window's first token.
        return [bos, *before[1:]] if bos is not None else before
    record = file.records[i] if file.records is not None else None
    if record is not None and record.prompt_ids:
        return record.prompt_ids
    if record is not None and record.prompt is not None:
        ids = [int(x) for x in tokenizer.encode(record.prompt)]
        return [bos, *ids] if bos is not None else ids
    if bos is not None and record is None:
        return [bos]
    raise UsageError(f"{where}: has no prompt, expected prompt_token_ids or a prompt beside a model (-m)")
