"""The verdict as a person meets it: a box on a terminal, a line a reason in a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TextIO

from verify.judge.words import VERDICTS, VerdictWord, next_line
from verify.machine.terminal import console_on, on_terminal, say

# By exit code: as it should be, not so, and what cannot be told.
_COLOURS = {0: "green", 1: "red"}


def verdict_lines(
    verdict: str,
    reasons: Sequence[str],
    notes: Sequence[str] = (),
    words: Mapping[str, VerdictWord] = VERDICTS,
) -> list[str]:
    """`verdict: WORD: first reason`, a line for each further reason and note, and what to do next."""
    first = f": {reasons[0]}" if reasons else ""
    lines = [f"verdict: {verdict}{first}"]
    lines += [f"  and: {reason}" for reason in reasons[1:]]
    lines += [f"  note: {note}" for note in notes]
    return [*lines, next_line(words[verdict])] if verdict in words else lines


def print_verdict(
    verdict: str,
    reasons: Sequence[str],
    to: TextIO,
    notes: Sequence[str] = (),
    words: Mapping[str, VerdictWord] = VERDICTS,
) -> None:
    """Reasons and notes, then the verdict's next step; words: what a verdict means there.

    Colours follow NO_COLOR and TERM, as rich has them.
    """
    console = console_on(to)
    if not on_terminal(to) or verdict not in words:
        for line in verdict_lines(verdict, reasons, notes, words):
            console.print(line, soft_wrap=True)
        return
    from rich.panel import Panel
    from rich.text import Text

    # Above the box: there may be many, and the verdict is to be in sight at the end.
    say(*(f"note: {note}" for note in notes), to=to)
    word = words[verdict]
    body = Text("; and ".join(reasons))
    body.append(f"\n\n{verdict} means: {word.means}", style="dim")
    body.append(f"\nnext: {word.next_step} (verify help verdicts)")
    console.print(
        Panel(
            body,
            title=f"verdict: {verdict}",
            title_align="left",
            border_style=_COLOURS.get(word.code, "yellow"),
        )
    )
