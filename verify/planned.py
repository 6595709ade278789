"""`[tool.verify]` of a pyproject.toml: which kernels are checked, over what, by which commands.

[tool.verify]
margin = 1.25                       # of all that follows, where it says nothing else
n_kv = [65, 300]

[[tool.verify.kernels]]
spec = "py:mypkg.ops::attend"
shapes = ["8/2x64"]
commands = ["diff", "props"]        # and judge, ppl; default diff

[tool.verify.text]                  # for ppl
file = "texts/wiki.test.raw"
model = "models/small.gguf"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verify.kernels.errors import nearest
from verify.machine.errors import UsageError

COMMANDS = ("diff", "props", "judge", "ppl")
# Keys of a kernel, and their types; all but spec may stand above, for every kernel.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "spec": str,
    "commands": list,
    "baseline": str,
    "shapes": list,
    "n_kv": list,
    "inputs": list,
    "dtype": str,
    "margin": (int, float),
    "rows": int,
    "seeds": int,
    "examples": int,
    "device": str,
}
_TEXT_KEYS: dict[str, type | tuple[type, ...]] = {
    "file": str, "model": str, "n_ctx": int, "chunks": int, "path": str,
}  # fmt: skip


@dataclass(frozen=True)
class PlannedRun:
    """One command of `verify run`. name: of its folder and files; words: behind `verify`."""

    name: str
    command: str
    words: tuple[str, ...]


def find_project(start: Path) -> Path:
    """The nearest pyproject.toml upwards that has [tool.verify]. Raises UsageError."""
    for folder in (start, *start.resolve().parents):
        file = folder / "pyproject.toml"
        if file.is_file() and "verify" in _read(file).get("tool", {}):
            return file
    raise UsageError(f"{start}: no pyproject.toml with [tool.verify] here or above (docs/ci.md shows one)")


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: {error}") from None


def planned_runs(file: Path) -> list[PlannedRun]:
    """What a pyproject.toml asks for, in its order. Raises UsageError naming the key."""
    table = _read(file).get("tool", {}).get("verify")
    if not isinstance(table, dict):
        raise UsageError(f"{file}: [tool.verify]: expected a table")
    common = {name: x for name, x in table.items() if name not in ("kernels", "text")}
    _check(common, {name: kind for name, kind in _KEYS.items() if name != "spec"}, f"{file}: [tool.verify]")
    text = table.get("text", {})
    if not isinstance(text, dict):
        raise UsageError(f"{file}: [tool.verify.text]: expected a table")
    _check(text, _TEXT_KEYS, f"{file}: [tool.verify.text]")
    kernels = table.get("kernels")
    if not isinstance(kernels, list) or not kernels:
        raise UsageError(f"{file}: [[tool.verify.kernels]]: expected at least one, each with a spec")
    runs = []
    for number, each in enumerate(kernels):
        where = f"{file}: [[tool.verify.kernels]] {number + 1}"
        if not isinstance(each, dict) or "spec" not in each:
            raise UsageError(f"{where}: expected a table with a spec")
        _check(each, _KEYS, where)
        kernel = {**common, **each}
        for command in kernel.get("commands", ["diff"]):
            if command not in COMMANDS:
                hint = nearest(str(command), COMMANDS)
                raise UsageError(
                    f"{where}: commands: {command!r}{hint}: expected any of {', '.join(COMMANDS)}"
                )
            runs.append(PlannedRun(f"{number + 1}-{command}", command, _words(command, kernel, text)))
    return runs


def _check(table: Mapping[str, Any], keys: Mapping[str, Any], where: str) -> None:
    for name, value in table.items():
        if name not in keys:
            raise UsageError(f"{where}: unknown key {name!r}{nearest(name, keys)} (known: {', '.join(keys)})")
        kind = keys[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            said = {str: "text", list: "a list", int: "a whole number"}.get(kind, "a number")
            raise UsageError(f"{where}: {name} = {value!r}: expected {said}")


def _words(command: str, kernel: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[str, ...]:
    """The command line of one kernel."""
    spec = str(kernel["spec"])
    words: list[str] = [command]

    def add(option: str, value: Any) -> None:
        if value is not None:
            several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            words.extend((option, ",".join(map(str, several))))

    if command in ("diff", "ppl"):
        add("--candidate", spec)
        add("--baseline", kernel.get("baseline"))
        add("--margin", kernel.get("margin"))
    if command == "diff":
        for option, name in (("--shape", "shapes"), ("--n-kv", "n_kv"), ("--inputs", "inputs"),
                             ("--dtype", "dtype"), ("--rows", "rows"), ("--seeds", "seeds")):  # fmt: skip
            add(option, kernel.get(name))
    if command == "props":
        words.append(spec)
        add("--examples", kernel.get("examples"))
    if command == "judge":
        words.append(spec.removeprefix("py:"))
        add("--shape", (kernel.get("shapes") or [None])[0])
        add("--n-kv", kernel.get("n_kv"))
        add("--dtype", kernel.get("dtype"))
        add("--examples", kernel.get("examples"))
    if command == "ppl":
        for option, name in (("-f", "file"), ("-m", "model"), ("-c", "n_ctx"), ("--chunks", "chunks"),
                             ("--path", "path")):  # fmt: skip
            add(option, text.get(name))
    add("--device", kernel.get("device"))
    return tuple(words)
