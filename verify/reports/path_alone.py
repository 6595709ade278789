"""What another form of calls changes by itself, in one sentence (`verify.ppl.evidence.path_alone`)."""

from __future__ import annotations

from verify.machine.terminal import counted
from verify.ppl.record import PathAloneRecord


def path_alone_sentence(found: PathAloneRecord) -> str:
    """For a reader who speculates, pages or batches: lossless or not, and whether what differs is a tie."""
    said = (
        f"{found.candidate}: {found.calls} instead of plain ones{' of one token' if found.n_q > 1 else ''}"
        f" change the most likely token of"
        f" {found.top1_changes} of {counted(found.tokens, 'token')}"
    )
    if found.floor_tokens:
        said += f"; one rounding of noise changes {found.floor_changes} of {found.floor_tokens}"
    drafts = f"greedy text with drafts of {found.n_q}" if found.n_q > 1 else "greedy text with such calls"
    if not found.top1_changes:
        bits = ", to the bit" if found.bitwise_equal else ", as far as this text shows"
        return f"{said}: lossless, {drafts} is the text without{bits}"
    beyond = found.top1_changes - found.ties - found.not_known
    if beyond:
        said += f"; {beyond} of them rounding alone does not explain"
        return f"{said}: not lossless, {drafts} is another text"
    if found.not_known:
        return f"{said}; of {found.not_known} it is not known what rounding alone does there"
    said += ", each a tie that any rounding decides"
    return f"{said}: lossless but for ties, {drafts} may differ there, and is as good"
