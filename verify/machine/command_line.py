"""Command lines: lengths as they are written, and the command that makes a result again, for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from verify.machine.errors import UsageError

# Options that are written with a letter, or not as their setting is called.
_OPTIONS = {
    "model": "-m",
    "file": "-f",
    "prompt": "-p",
    "prompt_file": "-f",
    "n_ctx": "-c",
    "n_predict": "-n",
    "candidates": "--candidate",
}


def parse_lengths(text: str, option: str = "--n-kv") -> list[int]:
    """`512,8192` ascending, each once; option: that says them. Raises UsageError."""
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = [0]
    if lengths[0] < 1:
        raise UsageError(f"{option} {text}: expected lengths from 1, comma between")
    return lengths


def command_line(
    words: Iterable[str], settings: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None
) -> str:
    """`verify`, words, and an option for each setting: several times for a list, alone for True.

    Settings that are None or False are left out, and those that have their default where one is given.
    """
    line = ["verify", *words]
    for name, value in settings.items():
        option = _OPTIONS.get(name, "--" + name.replace("_", "-"))
        several = _several(value)
        if defaults and name in defaults and several == _several(defaults[name]):
            continue
        for one in several:
            if one is True:
                line.append(option)
            elif one is not None and one is not False:
                line += [option, str(one)]
    return shlex.join(line)


# Where results go is no part of what was asked.
_OUTPUTS = ("out", "json_", "junit", "format_", "markdown", "csv")


def typed_again(context: Any) -> str:
    """The command line of a click context: what was typed, but for where its results go."""
    words, options = ["verify", context.info_name], []
    for param in context.command.params:
        source = context.get_parameter_source(param.name)
        if source is None or source.name != "COMMANDLINE" or param.name in _OUTPUTS:
            continue
        given = [str(one) for one in _several(context.params[param.name])]
        if param.param_type_name == "argument":
            words += given
        elif getattr(param, "is_flag", False):
            options.append(max(param.opts, key=len))
        else:
            options += [word for one in given for word in (max(param.opts, key=len), one)]
    return shlex.join(words + options)


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
