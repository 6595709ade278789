"""What `--help` shows: options by what they are for, examples, and other ways for options of llama.cpp.

Nothing here is loaded but typer: every `--help` answers at once.
"""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

# Headings in the order in which a reader needs them; an option that is named nowhere is of `Measuring`.
GROUPS: dict[str, tuple[str, ...]] = {
    "Input": (
        "--model",
        "--file",
        "--corpus",
        "--ctx-size",
        "--chunks",
        "--prompt",
        "--tokens",
        "--texts",
        "--logits",
        "--logprobs",
        "--kld",
        "--dlnppl",
        "--flips",
        "--ladder",
        "--captured-from",
        "--only",
        "--stride",
        "--inputs",
        "--shape",
        "--n-kv",
        "--against",
    ),
    "Kernels": (
        "--baseline",
        "--candidate",
        "--cache-type",
        "-ctk",
        "-ctv",
        "--caches",
        "--strict",
        "--allow-same",
        "--arithmetic",
    ),
    "Measuring": (),
    "Reproducing engines": (
        "--split-mode",
        "--gpus",
        "--policy",
        "--arch",
        "--gpu",
        "--a",
        "--b",
        "--args",
        "--args-b",
        "--mode",
        "--ubatch",
    ),
    "Output": (
        "--out",
        "--json",
        "--junit",
        "--format",
        "--format",
        "--save-logits",
        "--capture",
        "--csv",
        "--markdown",
        "--md",
        "--work",
        "--resume",
        "--checkpoint-minutes",
        "--help",
    ),
}
_ELSE = "Measuring"

# Three command lines each, of what people do with it.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "ppl": (
        "verify ppl",
        "verify ppl -m model.gguf -f wiki.test.raw --candidate flash:heads=8+4,kv=auto",
        "verify ppl -m model.gguf -f wiki.test.raw --candidate py:mine.py::attend,acc=f32",
    ),
    "gen": (
        'verify gen -p "The history of the city begins" -n 64',
        "verify gen -m model.gguf -p Hello --candidate py:mine.py::attend",
        "verify gen -p Hello --candidate flash:cache=q8_0 --json",
    ),
    "diff": (
        "verify diff --candidate py:mine.py::attend",
        "verify diff --candidate flash:kv=auto --shape glm-4.5-air@8 --n-kv 512,8192",
        "verify diff --baseline ggml:lib=old.so --candidate ggml:lib=new.so --shape llama-3-8b",
    ),
    "props": (
        "verify props py:mine.py::attend",
        "verify props flash:kv=4 --junit laws.xml",
        "verify props ggml:lib=libggml.so --profile engine",
    ),
    "judge": (
        "verify judge kernel.py",
        "verify judge kernel.py::attend,layout=bhsd --junit judge.xml",
        "verify judge kernelbench_problem.py --json",
    ),
    "run": (
        "verify run",
        "verify run --dry-run",
        "verify run --format github --out reports",
    ),
    "bench": (
        "verify bench flash:kv=auto sdpa:cudnn --shape glm-4.5-air",
        "verify bench flash:kv=auto flash:heads=split,kv=auto --n-kv 1024,8192,131072",
        "verify bench flash:kv=auto,cache=q8_0 --out bench",
    ),
    "explain": (
        "verify explain --texts before.json after.json -m model.gguf",
        "verify explain --logits base.kld other.kld -m model.gguf",
        "verify explain --kld 4.1e-5 --ladder ladder.json",
    ),
    "engines": (
        "verify engines --a old/build --b new/build -m model.gguf -f wiki.test.raw -c 8192",
        'verify engines --a build --b build -m model.gguf -f wiki.test.raw --args-b "-fa off"',
        "verify engines --a good.kld --b build -m model.gguf -f wiki.test.raw --max-kld 1e-4",
    ),
    "kld": (
        "verify kld base.kld other.kld",
        "verify kld base.kld q8.kld q4.kld --markdown table.md",
        "verify kld base.kld other.kld --max-kld 1e-3",
    ),
    "sweep": (
        "verify sweep main.md pr.md",
        "verify sweep main.md pr.md --policy ik-1183 --arch glm4moe --gpus 2",
        "verify sweep log.txt --json",
    ),
    "plan": (
        "verify plan -m model.gguf",
        "verify plan --arch glm4moe --gpus 2 --split-mode graph",
        "verify plan -m model.gguf --policy ik-1183 --n-kv 4096,8192,32768",
    ),
    "report": (
        "verify report runs/ppl-20261124-184400",
        "verify report runs/a runs/b",
        "verify report --rejudge runs/old",
    ),
}


# What is measured: a second one is no correction of the first, as a second `-c` is.
ONCE = ("--model", "--file")
# Options of llama.cpp's programs that have another way here.
ENGINE_OPTIONS: dict[str, str] = {
    "-ngl": "every layer runs on --device, as many at a time as its memory holds",
    "--n-gpu-layers": "every layer runs on --device, as many at a time as its memory holds",
    "-fa": "attention is what is measured: name it with --baseline and --candidate",
    "--flash-attn": "attention is what is measured: name it with --baseline and --candidate",
    "-t": "threads are set by OMP_NUM_THREADS",
    "--threads": "threads are set by OMP_NUM_THREADS",
    "-b": "--path decode is one query token a call, several --n-q of them, prefill a whole prompt",
    "-ub": "--path decode is one query token a call, several --n-q of them, prefill a whole prompt",
    "--draft-max": "--path several --n-q N scores drafts' calls of N tokens, verify gen --draft N writes so",
    "-np": "--sequences N has N windows in a call, each at another place",
    "-hf": "-m hf:ORG/REPO/FILE.gguf",
    "-ts": "--split-mode graph --gpus N shares a layer's heads out as an engine does",
    "--kl-divergence": "verify kld BASE OTHER, or verify ppl --against FILE",
    "--kl-divergence-base": "verify ppl --save-logits FILE writes one, --against FILE reads one",
    "--ppl-stride": "--only SPEC --stride N cuts the same windows",
    "--no-mmap": "weights are read a layer at a time",
    "--mlock": "weights are read a layer at a time",
}


def group_of(option: Any) -> str:
    """Under which heading of GROUPS an option stands."""
    return next((title for title, names in GROUPS.items() if set(names) & set(option.opts)), _ELSE)


class GroupedCommand(TyperCommand):
    """A command whose help has options by group and examples; it takes no model or text twice."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        by: dict[str, list[Any]] = {title: [] for title in GROUPS}
        arguments = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if getattr(param, "param_type_name", "") == "argument":
                arguments.append(record)
            else:
                by[group_of(param)].append(record)
        for title, records in ({"Arguments": arguments} | by).items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
        if self.name in EXAMPLES:
            with formatter.section("Examples"):
                for line in EXAMPLES[self.name]:
                    # Never folded: a command line is copied whole.
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        twice = _given_twice(self, ctx, args)
        if twice:
            ctx.fail(f"{twice}: given more than once; it takes one value")
        return super().parse_args(ctx, args)


def _given_twice(command: TyperCommand, ctx: Any, args: list[str]) -> str | None:
    """The one of ONCE that is there more than once: the first value would be lost without a word."""
    parser = command.make_parser(ctx)
    # A wrong option is for the real parsing to refuse.
    parser.ignore_unknown_options = True
    try:
        order = parser.parse_args(args=list(args))[2]
    except Exception:
        return None
    for option in ONCE:
        if sum(option in param.opts and not param.multiple for param in order) > 1:
            return option
    return None


def instead_of(arguments: list[str]) -> str | None:
    """What there is here for the first option of llama.cpp's programs in a command line, if one is there."""
    for word in arguments:
        name = word.split("=")[0]
        if name in ENGINE_OPTIONS:
            return f"{name} is an option of llama.cpp's programs; here: {ENGINE_OPTIONS[name]}"
    return None


def likelier(message: str) -> str:
    """A refusal with what was likely meant, where that can be guessed."""
    extra = re.search(r"unexpected extra argument\w*(?:\(s\))? \((\S+\.gguf)\)", message)
    if extra:
        return f"{message}: a model is given with -m {extra[1]}"
    size = re.search(r"'-c' / '--ctx-size'.*got '(\d+)[kK]'", message)
    return f"{message}: {size[1]}k are -c {int(size[1]) * 1024}" if size else message


def with_value(message: str, arguments: list[str]) -> str:
    """A message that refuses an option's value, with the value where it does not quote it."""
    named = re.search(r"Invalid value for '(?:[^']*/ )?(-[-\w]+)", message)
    if named is None or named[1] not in arguments[:-1]:
        return message
    value = arguments[arguments.index(named[1]) + 1]
    return message if value in message else f"{message}, got {value!r}"
