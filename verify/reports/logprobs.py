"""What `verify logprobs` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from verify.engines.conclusion import bounds_text
from verify.engines.logprobs import Departure, LogprobComparison
from verify.judge.words import VERDICTS_OF_FILES
from verify.machine.terminal import counted
from verify.reports.tables import print_table
from verify.reports.verdict_lines import print_verdict

if TYPE_CHECKING:
    from verify.engines.ladder import Placed

_KINDS = {
    "full": "the whole vocabulary",
    "top": "the most likely tokens",
    "sampled": "the tokens that came, and no others",
}


def print_logprobs(a: str, b: str, c: LogprobComparison, placed: Placed | None, to: TextIO) -> None:
    """One pair, the verdict last."""
    r = c.ratios
    sequences = counted(len(c.columns.moved), "sequence")
    print(f"A {a}\nB {b}", file=to)
    print(f"{c.tokens} tokens of {sequences}; both files know {_KINDS[c.columns.kind]}", file=to)
    print(f"KL(A, B): {c.divergence.mean:.3g} nats a token ({bounds_text(c.divergence)})", file=to)
    if c.columns.kind != "full" and c.bound is not None and c.hidden is not None:
        print(
            f"  not listed: {c.hidden:.2%} of A's probability; whatever it hides, KL is at least"
            f" {c.bound.mean:.3g} ({bounds_text(c.bound)})",
            file=to,
        )
    if c.columns.kind == "sampled":
        print(
            "  from single tokens: an estimate only where they were sampled from A at temperature 1", file=to
        )
    print(
        f"importance ratios B/A: mean {r.mean:.5g}, sd {r.sd:.3g}, {r.least:.3g} to {r.most:.3g}; effective"
        f" sample {r.effective:.2%}; beyond 1 +/- 0.2: {r.clipped:.2%} of the tokens",
        file=to,
    )
    print(
        f"  ln ratio of a whole sequence: mean {r.sequence_mean:+.3g}, sd {r.sequence_sd:.3g}",
        file=to,
    )
    print(f"logprobs moved by {c.rms:.3g} nats (rms), most {_words(c.largest)}", file=to)
    if c.first is not None:
        beyond = "beyond anything in A's repeat " if c.floor is not None else ""
        print(f"first departs {beyond}{_words(c.first)}", file=to)
    if c.floor is not None:
        f = c.floor
        print(f"floor: B over A's own repeat {f.ratio:.3g} ({f.low:.3g} to {f.high:.3g})", file=to)
    rows = [[q.name, str(q.tokens), f"{q.divergence:.2e}", f"{q.rms:.2e}"] for q in c.by_position]
    print_table(("where", "tokens", "mean KLD", "rms moved"), rows, to)
    if placed is not None:
        print(placed.sentence, file=to)
    print_verdict(c.decision.verdict, c.decision.reasons, to, words=VERDICTS_OF_FILES)


def _words(d: Departure) -> str:
    return f"at token {d.position + 1} of sequence {d.sequence + 1}, by {d.moved:+.3g}"
