"""The templates of every report, and what they share."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import jinja2

from verify.arms.records import CoverageRecord, ModelRecord
from verify.judge.words import words_of
from verify.kernels.said import visible
from verify.reports.colours import DARK, variables
from verify.reports.glossary import with_words


def is_known(x: float | None) -> TypeGuard[float]:
    """Whether a figure is there: JSON has null for NaN and infinity."""
    return x is not None and math.isfinite(x)


def figure(x: float | None, form: str = "%.3g") -> str:
    """A number as it is printed; `-` where it is not known."""
    return "-" if x is None or math.isnan(x) else form % x


def interval(limits: Sequence[float | None] | None) -> str:
    """`0.885 to 1.08`; a limit that is not known is one without end."""
    if limits is None:
        return "-"
    low, high = (figure(x) for x in limits)
    return f"{low if low != '-' else '0'} to {high if high != '-' else 'any'}"


# A run that would have seen no smaller ratio than this says nothing of ratios.
MOST_RATIO = 1e4


def says_something(least: float | None) -> TypeGuard[float]:
    """Whether the smallest ratio that a run would have seen is one that a kernel could have."""
    return is_known(least) and least < MOST_RATIO


def least_ratio(least: float | None) -> str:
    """That ratio in a cell of a table."""
    return figure(least) if least is None or says_something(least) else "none"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def seen(by: Mapping[str, bool]) -> str:
    """The detectors that saw something."""
    return ", ".join(name for name, saw in by.items() if saw) or "nothing"


def calls(line: CoverageRecord) -> str:
    """The T of a line of what ran, or that it does not enter; sequences and pages, where calls had them."""
    said = str(line.tokens_a_call or "as if alone")
    said += f", {line.sequences} sequences" if line.sequences > 1 else ""
    return said + (f", pages of {line.page}" if line.page else "")


def cell(text: object) -> str:
    """Text within a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def flat(environment: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything that is known, nested names joined by a blank."""
    for key, value in environment.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key} ")
        elif value is not None:
            yield f"{prefix}{key}", value


def model_words(model: ModelRecord) -> str:
    """The model of a run, as a sentence about its run begins."""
    return (
        f"Model {model.name or model.path} ({model.architecture}, {model.layers} layers, {model.heads} query"
        f" heads over {model.kv_heads} KV heads, r = {model.ratio})"
    )


def model_fact(model: ModelRecord) -> tuple[str, str]:
    """The line of a report's facts that tells this model from any other."""
    return "model", f"{model.path} ({model.bytes} bytes, fingerprint {model.fingerprint[:16]})"


# A person's folder, wherever a report was made from a run.
_HOMES = re.compile(r"(?:/home/|/Users/|[A-Za-z]:[\\/]Users[\\/])[^/\\\s'\"<>:]+|(?<![\w.~/-])/root\b")


def without_home(text: str) -> str:
    """The text without home folders (`~` is there in their place) and without the user's name in a path."""
    home = os.environ.get("HOME", "").rstrip("/")
    if home:
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    text = _HOMES.sub("~", text)
    user = os.environ.get("USER") or Path(home).name
    return re.sub(rf"(?<=/){re.escape(user)}(?=/)", "$USER", text) if user else text


def _is_page(name: str | None) -> bool:
    return name is not None and name.endswith(".html.j2")


def _shown(value: object) -> object:
    """What a model or a kernel said, without control characters and homes; markup stays markup."""
    return type(value)(without_home(visible(value))) if isinstance(value, str) else value


# Values are escaped in pages, and only there.
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("verify.reports"),
    autoescape=_is_page,
    finalize=_shown,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=False,
)
TEMPLATES.globals |= {"dark": variables(DARK), "words_of": words_of}
TEMPLATES.filters |= {
    f.__name__: f for f in (figure, interval, percent, seen, cell, calls, with_words, least_ratio)
}
