"""The command that makes a result again, as one line that a shell takes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

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


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
