"""What `verify ladder` and `verify explain` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from verify.engines.ladder import Ladder, rows_of
from verify.explain.questions import Explanation
from verify.reports.logprobs import print_logprobs
from verify.reports.tables import print_table


def print_ladder(ladder: Ladder, to: TextIO) -> None:
    """A row a step, from the smallest divergence to the largest."""
    print(
        f"ladder of {ladder.model}: {ladder.windows} windows of {ladder.n_ctx}, {ladder.tokens} scored"
        f" tokens, {ladder.cache_type} cache, {ladder.device}",
        file=to,
    )
    rows = [
        [
            s.what,
            s.kind,
            f"{s.kld:.2e}",
            f"{s.kld_low:.1e} to {s.kld_high:.1e}",
            f"{s.dlnppl:.1e} +/- {s.dlnppl_se:.1e}",
            f"{s.flips:.2%}",
        ]
        for s in rows_of(ladder.steps)
    ]
    print_table(("step", "kind", "mean KLD", "99.9 %", "|ln PPL change|", "flips"), rows, to, words=2)
    for said in ladder.left_out:
        print(f"left out: {said}", file=to)


def print_answer(answer: str, sentences: Sequence[str], to: TextIO) -> None:
    """Sentences, and the verdict last."""
    for sentence in sentences:
        print(sentence, file=to)
    print(f"verdict: {answer}", file=to)


def print_explanation(found: Explanation, to: TextIO) -> None:
    """What was measured for it, then each pair's answer, and the gravest where there are several."""
    if found.measured is not None:
        print_ladder(found.measured, to)
    if found.logprobs is not None:
        print_logprobs(*found.logprobs.paths, found.logprobs.comparison, found.logprobs.placed, to)
    several = len(found.answers) > 1
    for i, (answer, sentences) in enumerate(found.answers, 1):
        if several:
            print(f"pair {i}:", file=to)
        print_answer(answer, sentences, to)
    if several:
        print(f"verdict: {found.answer} ({len(found.answers)} pairs)", file=to)
