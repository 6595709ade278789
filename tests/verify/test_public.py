"""What is public: listed, loaded when it is asked for, told of with an example, and as it was.

`public_names.json` is what there is at `verify.API_VERSION`. What is new is added there when it is meant to
stay; a name or a parameter that goes or changes makes another version.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import verify

KEPT = Path(__file__).with_name("public_names.json")
FUNCTIONS = [name for name in verify.__all__ if inspect.isfunction(getattr(verify, name))]
CLASSES = [name for name in verify.__all__ if inspect.isclass(getattr(verify, name))]


def described() -> dict[str, Any]:
    """Parameters of every public function, fields and methods of every public record."""
    found: dict[str, Any] = {}
    for name in verify.__all__:
        x = getattr(verify, name)
        if inspect.isfunction(x):
            found[name] = parameters(x)
        elif inspect.isclass(x):
            found[name] = sorted(n for n in members(x) if not n.startswith("_"))
        elif inspect.ismodule(x):
            for inner, function in vars(x).items():
                own = inspect.isfunction(function) and function.__module__.startswith(x.__name__)
                if own and not inner.startswith("_"):
                    found[f"{name}.{inner}"] = parameters(function)
        else:
            found[name] = type(x).__name__
    return found


def members(kind: type) -> set[str]:
    """Its own and its fields, not what every exception and tuple has."""
    mro = [c for c in kind.__mro__ if c.__module__.startswith("verify")]
    return {n for c in mro for n in (*vars(c), *getattr(c, "__annotations__", {}))}


def parameters(function: Any) -> list[str]:
    """Each with its kind and default, as a call sees it; keywords that a record of options names, by name."""
    found = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            assert "CallOptions" in str(p.annotation), f"{function.__name__}: {p}"
            found += [f"keyword {name}" for name in sorted(verify.CallOptions.__annotations__)]
            continue
        mark = {p.KEYWORD_ONLY: "keyword ", p.VAR_POSITIONAL: "*"}.get(p.kind, "")
        default = "" if p.default is p.empty else f" = {p.default!r}"
        found.append(f"{mark}{p.name}{default}")
    return found


def test_what_is_public_is_what_it_was() -> None:
    kept = json.loads(KEPT.read_text())
    assert kept["version"] == verify.API_VERSION
    now = described()
    for name, had in kept["names"].items():
        assert name in now, f"{name} is gone: that needs a new API_VERSION"
        assert not set(had) - set(now[name]), f"{name} has not what it had: that needs a new API_VERSION"
        added = [x for x in now[name] if x not in had]
        if name in FUNCTIONS:
            own = [x for x in added if x.removeprefix("keyword ") not in verify.CallOptions.__annotations__]
            assert all(" = " in x for x in own), f"{name}: what is added needs a default: {own}"
    assert set(now) == set(kept["names"]), "add what is new to public_names.json"


def test_every_public_name_is_there_and_listed() -> None:
    assert dir(verify) == sorted(verify.__all__)
    for name in verify.__all__:
        assert getattr(verify, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'chek_attention'"):
        verify.chek_attention  # noqa: B018


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "reference_logits"])
def test_each_function_says_all_of_itself_with_an_example(name: str) -> None:
    function = getattr(verify, name)
    said = inspect.getdoc(function) or ""
    assert ">>> " in said and "Raises" in said
    elsewhere = set()
    if "rest as of `exact_attention`" in said:
        elsewhere = {*inspect.signature(verify.exact_attention).parameters}
        elsewhere |= set(verify.CallOptions.__annotations__)
    for p in parameters(function):
        word = p.removeprefix("keyword ").split(" = ")[0].lstrip("*")
        assert word in said or word in elsewhere, f"{name}: {word} is not told of"
    # They are run with those of every module (tests/test_house.py).
    assert function.__module__ in sys.modules


def test_classes_say_what_they_are() -> None:
    assert {"Report", "WorstCase", "AttentionMismatch", "UsageError"} <= set(CLASSES)
    for name in CLASSES:
        assert len(inspect.getdoc(getattr(verify, name)) or "") > 40, name


def test_importing_it_loads_nothing_that_is_slow(tmp_path: Path) -> None:
    """In modules, not in seconds, which depend on the machine: 20 ms here."""
    ask = (
        "import sys, verify\n"
        "slow = ('torch', 'numpy', 'hypothesis', 'typer', 'rich', 'scipy', 'pyarrow', 'jinja2')\n"
        "print(sorted(n for n in slow if n in sys.modules), len(sys.modules), len(dir(verify)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    loaded, count, public = done.stdout.rsplit(" ", 2)
    assert loaded == "[]" and int(count) < 150 and int(public) == len(verify.__all__)
