"""One module a command; `app` holds them all, and loads the one that was typed.

So a module of a command may import whatever its command always needs. Those whose command needs torch import
it where they run: `verify ppl --help`, and every option that is refused, answers without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from verify import __version__
from verify.commands.help_pages import GroupedCommand


class Listed(NamedTuple):
    """A command before it is loaded. module: of this package; its function `command` is the command."""

    module: str
    help: str


COMMANDS = {
    "ppl": Listed(
        "ppl", "Perplexity of a GGUF model with two kernels, paired, and a verdict with its evidence."
    ),
    "gen": Listed("gen", "Greedy text from two kernels, and why it comes to differ where it does."),
    "bench": Listed(
        "bench",
        "Decode time of kernels against n_kv, their share of memory bandwidth, and where a split starts to"
        " pay.",
    ),
    "diff": Listed(
        "diff",
        "The kernel diff report: candidates against a baseline over shapes, lengths and families of inputs.",
    ),
    "props": Listed(
        "props",
        "The laws of attention, merges and plans against a kernel; what breaks one is shrunk to a small"
        " case.",
    ),
    "run": Listed("run", "All that [tool.verify] of a pyproject.toml asks for: diff, props, judge, ppl."),
    "judge": Listed(
        "judge",
        "A kernel nobody trusts: families, probes and laws, then the ways to look right without being it.",
    ),
    "identify": Listed(
        "identify",
        "What arithmetic is this? Types, order of summation, cuts and regimes, read off a kernel by its"
        " results.",
    ),
    "tolerance": Listed(
        "tolerance",
        "How large the error of a right kernel may be, by family of inputs, and the smallest fault that gates"
        " of others still see: the number to write into a test.",
    ),
    "selftest": Listed(
        "selftest", "Runs every known fault and every clean variant past every detector: the mutation score."
    ),
    "kld": Listed(
        "kld",
        "Logits files of llama-perplexity --kl-divergence-base: its own table, and what it cannot show.",
    ),
    "explain": Listed(
        "explain",
        "An engine's output changed: bug or rounding? From two texts, logits files or logprob files, and a"
        " model.",
    ),
    "ladder": Listed(
        "ladder",
        "How far known changes (a plan, float16 sums, caches, faults) move a model, to place figures on.",
    ),
    "logits": Listed(
        "logits",
        "A GGUF model's logits on a text, with exact attention or any kernel: what a port is held against.",
    ),
    "logprobs": Listed(
        "logprobs",
        "Logprobs of the same tokens by two programs (rollout and trainer, decode and prefill, two versions):"
        " divergence with an interval, importance ratios, where they part.",
    ),
    "engines": Listed(
        "engines",
        "Two builds' llama-perplexity on the text-generation path (-b 1 -ub 1), and their logits compared."
        " Also the way for inference on CPU and GPU together (experts on the CPU), which our own runner does"
        " not model: give the engines' options with --args.",
    ),
    "sweep": Listed(
        "sweep",
        "Logs of sweep-bench or llama-bench -d: where the speed departs from the first's, and whether a"
        " policy splits there.",
    ),
    "plan": Listed(
        "plan",
        "Which attention plan each version of an engine runs, by shape, cache, GPUs, split mode and n_kv.",
    ),
    "report": Listed(
        "report", "Makes report.md and report.html again from a run's folder; several folders: side by side."
    ),
    "list": Listed("kernel_list", "The kernels that can be named, their options, and the policies."),
    "doctor": Listed("doctor", "Versions, devices, which kernels can run here and why not."),
    "help": Listed(
        "help",
        "A command's help; `help verdicts`: what each verdict and exit code means; `help words`.",
    ),
}
# Everywhere the same: plain text, and errors that `verify.__main__` puts into words.
_PLAIN: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class OnDemand(TyperGroup):
    """Commands of which only the name and the help are known until one is typed."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in COMMANDS else listed, rest

    # typer makes a silent exit code of an interrupt; one that no command has said anything of is to be said.

    def make_context(self, *args: Any, **options: Any) -> Any:
        try:
            return super().make_context(*args, **options)
        except KeyboardInterrupt:
            raise typer.Abort from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Abort from None


def load(name: str) -> Any:
    """The command of that name, its options and all."""
    listed, alone = COMMANDS[name], typer.Typer(**_PLAIN)
    of_module = import_module(f"verify.commands.{listed.module}").command
    alone.command(name, help=listed.help, cls=GroupedCommand)(of_module)
    return typer.main.get_command(alone)


def _unloaded() -> None:
    """Stands for a command in the list of commands."""


app = typer.Typer(
    cls=OnDemand,
    name="verify",
    help="Evidence that a changed attention kernel is still right. --debug, beside any command, shows where"
    " an internal error was.",
    invoke_without_command=True,
    **_PLAIN | {"add_completion": True},
)


@app.callback()
def _front(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """`verify` alone prints what there is."""
    if version:
        print(f"verify {__version__}")
        raise typer.Exit()
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


for _name, _listed in COMMANDS.items():
    app.command(_name, help=_listed.help)(_unloaded)
