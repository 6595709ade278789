"""What a kernel, or whoever wrote its specification, states, against what is seen of it."""

from __future__ import annotations

from collections.abc import Sequence

from verify.identify.regimes import Identified, path_of
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import Shape
from verify.kernels.heads import Heads
from verify.kernels.identify.reading import Reading
from verify.kernels.kernel import Kernel
from verify.kernels.plans.spec import parse_spec

WORDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "tf32": "TF32"}


def contradictions(kernel: Kernel, found: Identified, heads: Heads) -> list[str]:
    """Sentences, one a thing that is stated otherwise than it is seen, from the length on where it begins."""
    said: dict[str, str] = {}
    if any(not _arithmetic(kernel, each, heads).stated for each in found.readings) and (
        odd := acc_contradictions(kernel.spec, found.readings)
    ):
        said["acc"] = odd[0]
    for reading in sorted(found.readings, key=lambda r: (r.n_q, r.n_kv)):
        for name, sentence in _of_one(kernel, reading, heads).items():
            said.setdefault(name, sentence)
    return list(said.values())


def acc_contradictions(spec: str, readings: Sequence[Reading]) -> list[str]:
    """What a specification says of its sums, where it sums otherwise: from which length on, or at which."""
    stated = parse_spec(spec).options.get("acc")
    told = sorted((each.n_kv, each.accumulator) for each in readings if each.accumulator is not None)
    odd = [(n_kv, seen) for n_kv, seen in told if seen != stated]
    if stated is None or not odd:
        return []
    (first, seen), alike = odd[0], [n_kv for n_kv, seen in told if seen == stated]
    # Shorter ones are as they are said to be, and all others are not.
    begins = bool(alike) and max(alike) < first
    where = f"from {first} keys on" if begins else f"at {first} keys"
    return [f"says acc={stated}, sums in {WORDS.get(seen, seen)} {where}"]


def _arithmetic(kernel: Kernel, reading: Reading, heads: Heads) -> Arithmetic:
    path = path_of(reading.n_q, kernel) or "decode"
    return kernel.arithmetic(Shape(1, reading.n_q, reading.n_kv, heads), path)


def _of_one(kernel: Kernel, reading: Reading, heads: Heads) -> dict[str, str]:
    at = f" at {reading.n_kv} keys"
    options = parse_spec(kernel.spec).options
    states = _arithmetic(kernel, reading, heads)
    due: dict[str, str] = {}
    if states.stated:
        due = {"p": states.p, "acc": states.acc, "out": states.out}
    seen = {"p": reading.p, "acc": reading.accumulator, "out": reading.result}
    what = {"p": "has P in", "acc": "sums in", "out": "returns"}
    found = {
        name: f"says {name}={value}, {what[name]} {WORDS.get(seen_one, seen_one)}{at}"
        for name, value in due.items()
        if (seen_one := seen[name]) is not None and seen_one != value
    }
    if states.stated and states.cuts_at is not None:
        cuts = states.cuts_at(reading.n_kv)
        if reading.cuts != cuts:
            found["cuts"] = (
                f"says {len(cuts) - 1} parts cut at {list(cuts[1:-1])[:4]}, has {reading.parts}{at}"
            )
    if options.get("deterministic") == "yes" and not reading.deterministic:
        found["deterministic"] = f"says deterministic=yes, gives other bits{at}"
    return found
