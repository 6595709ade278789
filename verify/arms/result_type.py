"""`out=match`: the baseline answers in the type that the candidate returns.

What a kernel's result is rounded to is most of its error where that is float16. So unless the baseline's
specification says `out=` itself, it is given the candidate's: found by one call before any arm runs, which is
judged like any other. `out=f32`, written out, is obeyed and asks what the type costs as well.
"""

from __future__ import annotations

from typing import NamedTuple

from verify.kernels.catalogue import CATALOGUE
from verify.kernels.plans.spec import parse_spec, with_options
from verify.kernels.registry import UNTOLD

IN_WORDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


class Match(NamedTuple):
    """The baseline of one candidate: its specification, and what a reader of the verdict must know of it."""

    baseline: str
    said: str


def shows_its_type(spec: str) -> bool:
    """Whether only a call tells what type a kernel returns: one of others."""
    return parse_spec(spec).name in UNTOLD


def is_matched(baseline: str) -> bool:
    """Whether the baseline takes the type of its candidate: it has `out=`, and does not say it."""
    parsed = parse_spec(baseline)
    entry = CATALOGUE.get(parsed.name)
    return entry is not None and "out" in entry.options and "out" not in parsed.options


def matched(baseline: str, candidate: str, type_: str) -> Match:
    """The baseline for a candidate that returns `type_`."""
    if type_ == "f32" or not is_matched(baseline):
        return Match(baseline, "")
    return same_match(baseline, candidate, with_options(baseline, {"out": type_}))


def same_match(baseline: str, candidate: str, own: str) -> Match:
    """The match of a candidate whose baseline is known: `own`, for a run's `baseline`."""
    if own == baseline:
        return Match(own, "")
    return Match(
        own,
        f"{candidate} returns {IN_WORDS[parse_spec(own).options['out']]}, so it is compared with {own}"
        f" (out=match); with --baseline {with_options(baseline, {'out': 'f32'})} the type's own rounding"
        " counts too",
    )
