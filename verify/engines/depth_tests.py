"""Depth tests of llama-bench (`-d 0,4096,8192`): its Markdown table, JSON, JSON lines or CSV.

A record is one test: `pp512 @ d4096` or `tg128 @ d4096`, so many tokens after that many cached ones. Records
of one build, model and setting make a log; a log that has one size of prompt and one of generation has both
in its rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

_TEST = re.compile(r"(pp|tg)(\d+)(?:\s*@\s*d(\d+))?")
_MIXED = re.compile(r"pp\d+\+tg\d+")
# Keys of a JSON record that are measured, or that say which test it was.
_MEASURED = {
    "n_prompt", "n_gen", "n_depth", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts",
    "test_time",
}  # fmt: skip


class DepthTest(NamedTuple):
    """One test. setting: what else its record says, as it is written there."""

    kind: str
    tokens: int
    depth: int
    seconds: float
    setting: tuple[tuple[str, str], ...]


def is_table(columns: Sequence[str]) -> bool:
    """Whether these are the columns of llama-bench's table."""
    return "test" in columns and "t/s" in columns


def test_of_cells(columns: Sequence[str], cells: Sequence[str]) -> DepthTest | None:
    """The test of a row of the table; None for a test of both kinds at once. Raises ValueError."""
    named = dict(zip(columns, cells, strict=True))
    name, speed = named.pop("test"), named.pop("t/s")
    if _MIXED.match(name):
        return None
    match = _TEST.fullmatch(name)
    if match is None:
        raise ValueError(f"test is {name[:20]!r}, expected such as pp512 or tg128 @ d4096")
    kind, tokens, depth = match[1], int(match[2]), int(match[3] or 0)
    written = re.split(r"±|\+/-", speed)[0].strip()
    try:
        tokens_a_second = float(written)
    except ValueError:
        tokens_a_second = 0.0
    if not 0 < tokens_a_second < float("inf"):
        raise ValueError(f"t/s is {speed[:20]!r}, expected a speed")
    return DepthTest(kind, tokens, depth, tokens / tokens_a_second, tuple(sorted(named.items())))


def is_record(found: dict[str, Any]) -> bool:
    """Whether a JSON object is a record of llama-bench."""
    return "n_prompt" in found and "n_gen" in found and "avg_ns" in found


def test_of_record(found: dict[str, Any]) -> DepthTest | None:
    """The test of a JSON record; None for a test of both kinds at once. Raises ValueError."""
    numbers = {}
    for key in ("n_prompt", "n_gen", "n_depth", "avg_ns"):
        try:
            numbers[key] = float(found.get(key, 0))
        except (TypeError, ValueError):
            raise ValueError(f"{key} is {str(found[key])[:20]!r}, expected a number") from None
    prompt, generated = int(numbers["n_prompt"]), int(numbers["n_gen"])
    if prompt and generated:
        return None
    if not 0 < numbers["avg_ns"] < float("inf") or not prompt + generated:
        raise ValueError("expected n_prompt or n_gen, and avg_ns, above 0")
    setting = tuple(sorted((k, str(v)) for k, v in found.items() if k not in _MEASURED))
    kind = "pp" if prompt else "tg"
    return DepthTest(kind, prompt or generated, int(numbers["n_depth"]), numbers["avg_ns"] / 1e9, setting)
