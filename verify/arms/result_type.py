"""`out=match`: the baseline answers in the type that the candidate returns.

What a kernel's result is rounded to is most of its error where that is float16. So unless the baseline's
specification says `out=` itself, it is given the candidate's: found by one call before any arm runs, which is
judged like any other. `out=f32`, written out, is obeyed and asks what the type costs as well.
"""

from __future__ import annotations

from typing import NamedTuple

from verify.kernels.catalogue import CATALOGUE
from verify.kernels.plans.spec import parse_spec, with_options
from verify.kernels.registry import IN_OWN_PROCESS

IN_WORDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


class Match(NamedTuple):
    """The baseline of one candidate: its specification, and what a reader of the verdict must know of it."""

    baseline: str
    said: str


def shows_its_type(spec: str) -> bool:
    """Whether only a call tells what type a kernel returns: one that runs in a process of its own."""
    return parse_spec(spec).name in IN_OWN_PROCESS


def matched(baseline: str, candidate: str, type_: str) -> Match:
    """The baseline for a candidate that returns `type_`."""
    parsed = parse_spec(baseline)
    if "out" not in CATALOGUE[parsed.name].options or "out" in parsed.options:
        return Match(baseline, "")
    if type_ == "f32":
        return Match(baseline, "")
    own = with_options(baseline, {"out": type_})
    return Match(
        own,
        f"{candidate} returns {IN_WORDS[type_]}, so it is compared with {own} (out=match);"
        f" with --baseline {with_options(baseline, {'out': 'f32'})} the type's own rounding counts too",
    )
