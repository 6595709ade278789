"""What a kernel, or whoever wrote its specification, states, against what is seen of it."""

from __future__ import annotations

from verify.identify.regimes import Identified, path_of
from verify.kernels.call import Shape
from verify.kernels.heads import Heads
from verify.kernels.identify.reading import Reading
from verify.kernels.kernel import Kernel
from verify.kernels.plans.spec import parse_spec

WORDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "tf32": "TF32"}


def contradictions(kernel: Kernel, found: Identified, heads: Heads) -> list[str]:
    """Sentences, one a thing that is stated otherwise than it is seen, from the length on where it begins."""
    said: dict[str, str] = {}
    for reading in sorted(found.readings, key=lambda r: (r.n_q, r.n_kv)):
        for name, sentence in _of_one(kernel, reading, heads).items():
            said.setdefault(name, sentence)
    return list(said.values())


def acc_contradiction(spec: str, reading: Reading) -> str | None:
    """What a specification says of its sums, if it sums otherwise."""
    stated, seen = parse_spec(spec).options.get("acc"), reading.accumulator
    if stated is None or seen is None or seen == stated:
        return None
    return f"says acc={stated}, sums in {WORDS.get(seen, seen)} at {reading.n_kv} keys"


def _of_one(kernel: Kernel, reading: Reading, heads: Heads) -> dict[str, str]:
    at = f" at {reading.n_kv} keys"
    options = parse_spec(kernel.spec).options
    states = kernel.arithmetic(Shape(1, reading.n_q, reading.n_kv, heads), path_of(reading.n_q))
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
    if not states.stated and (odd := acc_contradiction(kernel.spec, reading)) is not None:
        found["acc"] = odd
    if states.stated and states.cuts_at is not None:
        cuts = states.cuts_at(reading.n_kv)
        if reading.cuts != cuts:
            found["cuts"] = (
                f"says {len(cuts) - 1} parts cut at {list(cuts[1:-1])[:4]}, has {reading.parts}{at}"
            )
    if options.get("deterministic") == "yes" and not reading.deterministic:
        found["deterministic"] = f"says deterministic=yes, gives other bits{at}"
    return found
