"""What became slower between two results of the same benchmark, by more than their noise.

    python benchmarks/compare.py benchmarks/results/h200-decode.json new.json [--noise 0.15]

Times (`us`, `ms`, `seconds`, `..._s`) and rates (`gb_s`, `tflop_s`, `..._per_s`) that both files hold are
laid side by side, entries of a list by what they are of (kernel, shape, n_kv, ...). The noise of a figure is
what it says itself, `low_us` to `high_us` or the repeats of a list, of both files together; of a figure that
was measured once it is --noise of it. Exits with 1 where something is slower, 2 where nothing is in both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Measured once: `verify ppl` on the same quiet machine moves by a tenth.
NOISE = 0.15
# Below this nothing is called slower, however little the repeats spread: clocks move.
LEAST = 0.03
_RATES = ("gb_s", "tflop_s", "tflop_s_with_padding", "gweights_s", "_per_s", "_per_second", "flop_per_s")
_TIMES = ("us", "ms", "seconds", "wall_s", "_us", "_ms", "_seconds", "_s")
# Numbers that say what an entry is of; texts always do.
_OF = {
    "n_kv",
    "n_ctx",
    "page",
    "parts",
    "rows",
    "sequences",
    "tokens",
    "kv_heads",
    "q_heads",
    "windows",
    "gpus",
}
# Texts that say how it was measured.
_ABOUT = {"command", "commit", "verdict", "device", "torch", "triton", "said", "note"}
# Of the machine, or of the whole run: not what is compared.
_ASIDE = {"environment", "profiles", "load_average", "stages_ended_at_s", "bandwidth_gb_s", "limits_s"}


class Figure(NamedTuple):
    """value: a time, or a rate where more is better; spread: how far it moves, as a part of it, or None."""

    value: float
    rate: bool
    spread: float | None


class Change(NamedTuple):
    """times: how many times slower (below 1: faster); noise: from which on that says something."""

    name: str
    old: float
    new: float
    times: float
    noise: float

    @property
    def slower(self) -> bool:
        return self.times > 1 + self.noise

    def __str__(self) -> str:
        return f"{self.name}: {self.old:g} -> {self.new:g}, {self.times:.2f} times (noise {self.noise:.0%})"


def kind_of(name: str) -> str:
    """`rate`, `time` or nothing, by the name of a figure."""
    if name.endswith(_RATES):
        return "rate"
    if name.startswith(("low_", "high_")):
        return ""
    return "time" if name.endswith(_TIMES[4:]) or name in _TIMES else ""


def figures(tree: Any, at: str = "", kind: str = "") -> Iterator[tuple[str, Figure]]:
    """Every time and rate of a result, under a name that says what it is of."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name not in _ASIDE:
                own = kind_of(name) or kind
                low, high = tree.get(f"low_{name}"), tree.get(f"high_{name}")
                given = (high - low) / 2 / value if low is not None and high is not None and value else None
                for below, figure in figures(value, f"{at}/{name}" if at else name, own):
                    yield below, figure if given is None else figure._replace(spread=given)
    elif isinstance(tree, list) and tree and all(_is_number(x) for x in tree):
        if kind and (mean := sum(tree) / len(tree)) > 0:
            spread = (max(tree) - min(tree)) / 2 / mean if len(tree) > 1 else None
            yield at, Figure(mean, kind == "rate", spread)
    elif isinstance(tree, list):
        for value in tree:
            yield from figures(value, f"{at}[{_of(value)}]", kind)
    elif kind and _is_number(tree) and tree > 0:
        yield at, Figure(float(tree), kind == "rate", None)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _of(entry: Any) -> str:
    if not isinstance(entry, dict):
        return ""
    told = {n: x for n, x in entry.items() if (isinstance(x, str) and n not in _ABOUT) or n in _OF}
    return ", ".join(f"{n} {x}" for n, x in told.items())


def changes(old: Any, new: Any, noise: float = NOISE) -> list[Change]:
    """Every figure that both have once, the slowest first."""
    of_old, of_new = _once(old), _once(new)
    found = []
    for name in of_old.keys() & of_new.keys():
        a, b = of_old[name], of_new[name]
        times = a.value / b.value if a.rate else b.value / a.value
        spreads = [noise / 2 if x.spread is None else x.spread for x in (a, b)]
        found.append(Change(name, a.value, b.value, times, max(sum(spreads), LEAST)))
    return sorted(found, key=lambda c: (-c.times, c.name))


def _once(tree: Any) -> dict[str, Figure]:
    """By name; several under one name cannot be told apart, and are left out."""
    found: dict[str, Figure] = {}
    twice = set()
    for name, figure in figures(tree):
        if name in found:
            twice.add(name)
        found[name] = figure
    return {name: figure for name, figure in found.items() if name not in twice}


def machine_of(result: dict[str, Any]) -> str:
    """The processor that measured, or nothing where the file does not say."""
    environment = result.get("environment") or {}
    told = environment if isinstance(environment, dict) else {}
    return str(told.get("gpu") or result.get("device") or told.get("cpu") or "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--noise", type=float, default=NOISE, help="of a figure that was measured once")
    known = parser.parse_args()
    old, new = (json.loads(path.read_text()) for path in (known.old, known.new))
    machines = machine_of(old), machine_of(new)
    if machines[0] != machines[1]:
        print(f"not the same machine: {machines[0] or 'not said'}, then {machines[1] or 'not said'}")
    found = changes(old, new, known.noise)
    if not found:
        print("no time and no rate is in both files", file=sys.stderr)
        return 2
    slower = [change for change in found if change.slower]
    for change in slower:
        print(f"slower: {change}")
    print(f"{len(slower)} of {len(found)} figures slower than their noise")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
