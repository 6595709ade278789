"""`verify help`: a command's help, or a page: verdicts and exit codes, words."""

from __future__ import annotations

from typing import Annotated

import typer

from verify.judge.words import verdict_page
from verify.machine.errors import UsageError
from verify.reports.glossary import glossary_screen


def command(
    topic: Annotated[
        str | None, typer.Argument(help="a command, `verdicts` or `words`; none: all commands")
    ] = None,
) -> int:
    """Print what is known of a topic."""
    from verify.commands import COMMANDS, app

    if topic == "verdicts":
        print(verdict_page())
        return 0
    if topic == "words":
        print(glossary_screen())
        return 0
    if topic is not None and topic not in COMMANDS:
        raise UsageError(
            f"help {topic}: expected a command, `verdicts` or `words` (commands: {', '.join(COMMANDS)})"
        )
    app(args=[*([topic] if topic else []), "--help"], standalone_mode=False)
    return 0
