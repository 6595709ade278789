"""One module a command; `app` holds them all."""

from __future__ import annotations

import typer

from verify.commands import (
    bench,
    diff,
    doctor,
    engines,
    gen,
    kernel_list,
    kld,
    plan,
    ppl,
    props,
    report,
    selftest,
    sweep,
)

app = typer.Typer(
    name="verify",
    help="Evidence that a changed attention kernel is still right. --debug, beside any command, shows where"
    " an internal error was.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("ppl", help=ppl.HELP)(ppl.command)
app.command("gen", help=gen.HELP)(gen.command)
app.command("bench", help=bench.HELP)(bench.command)
app.command("diff", help=diff.HELP)(diff.command)
app.command("props", help=props.HELP)(props.command)
app.command("selftest", help=selftest.HELP)(selftest.command)
app.command("kld", help=kld.HELP)(kld.command)
app.command("engines", help=engines.HELP)(engines.command)
app.command("sweep", help=sweep.HELP)(sweep.command)
app.command("plan", help=plan.HELP)(plan.command)
app.command("report", help=report.HELP)(report.command)
app.command("list", help=kernel_list.HELP)(kernel_list.command)
app.command("doctor", help=doctor.HELP)(doctor.command)
