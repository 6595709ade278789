"""Kernel specifications: `NAME[:option=value,...]`, the same text in the API, the commands and the reports.

A name may carry a variant before its options (`sdpa:flash`); a user's own kernel is `py:FILE.py::FUNCTION` or
`py:package.module::Class(size=64)`, options after a comma.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from verify.kernels.cache_types import KEPT_TYPES, CacheSpec, parse_cache
from verify.kernels.errors import SpecError, nearest
from verify.kernels.plans.asked import SplitMode
from verify.kernels.plans.plan import KVCuts, Plan, parse_heads
from verify.kernels.plans.policy import POLICIES, Launch, policy_named

# Kernels whose target names code: what stands before the first comma, whatever is in it.
NAMES_CODE = ("py", "hub", "hf", "merge")


class Spec(NamedTuple):
    """A specification taken apart: text as written, name, target, options as written.

    target: the variant of `sdpa:flash`, or what `py:` runs; empty where there is none.
    """

    text: str
    name: str
    target: str
    options: Mapping[str, str]


def parse_spec(text: str) -> Spec:
    """Take a specification apart. Raises SpecError on options that are not `name=value` or are doubled."""
    name, _, rest = text.strip().partition(":")
    target = ""
    pieces = at_commas(rest)
    if name in NAMES_CODE or (pieces and pieces[0] and "=" not in pieces[0]):
        target, *pieces = pieces or [""]
    options: dict[str, str] = {}
    for piece in filter(None, pieces):
        key, equals, value = piece.partition("=")
        if not equals or not key or not value:
            raise SpecError(f"kernel {text!r}: {piece!r} is not of the form option=value")
        if key in options:
            raise SpecError(f"kernel {text!r}: option {key} is given twice")
        options[key] = value
    return Spec(text, name, target, options)


def at_commas(text: str) -> list[str]:
    """Text in pieces at its commas, those inside brackets left alone.

    >>> at_commas("f.py::Attn(heads=8,size=[64,32]),acc=f32")
    ['f.py::Attn(heads=8,size=[64,32])', 'acc=f32']
    """
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces if text else []


def with_options(text: str, options: Mapping[str, str]) -> str:
    """The same specification with these options set, as `replaced` has it. Raises SpecError."""
    spec = parse_spec(text)
    written = ",".join(f"{key}={value}" for key, value in replaced(spec.options, options).items())
    head = f"{spec.name}:{spec.target}" if spec.target else spec.name
    if not written:
        return head
    return f"{head}{',' if spec.target else ':'}{written}"


def replaced(own: Mapping[str, str], options: Mapping[str, str]) -> dict[str, str]:
    """A specification's own options with these over them.

    What a policy chooses gives way to a policy, and a policy with its settings to what it would choose.
    """
    gone: tuple[str, ...] = ()
    if "policy" in options:
        gone = CHOSEN_BY_POLICY
    elif any(key in options for key in CHOSEN_BY_POLICY):
        gone = ("policy", *OF_POLICY)
    return {**{key: value for key, value in own.items() if key not in gone}, **options}


def check_options(spec: Spec, known: Mapping[str, str]) -> None:
    """Raises SpecError for an option that is not known, with the nearest one that is."""
    for key in spec.options:
        if key not in known:
            hint = nearest(key, known)
            raise SpecError(f"kernel {spec.text!r}: unknown option {key!r}{hint} (known: {', '.join(known)})")


def choice(spec: Spec, key: str, default: str, allowed: tuple[str, ...]) -> str:
    """An option that is one of a few words."""
    value = spec.options.get(key, default)
    if value not in allowed:
        raise SpecError(f"kernel {spec.text!r}: {key}={value}, expected one of {', '.join(allowed)}")
    return value


def number(spec: Spec, key: str, default: int, *, least: int = 1) -> int:
    """An option that is a whole number from `least`."""
    text = spec.options.get(key)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise SpecError(f"kernel {spec.text!r}: {key}={text}, expected a whole number from {least}")
    return int(text)


def cache_option(spec: Spec, allowed: tuple[str, ...] = KEPT_TYPES) -> CacheSpec:
    """The option `cache=`; allowed: types of K and V that the kernel has. Raises SpecError."""
    try:
        return parse_cache(spec.options.get("cache", "f16"), allowed)
    except SpecError as error:
        raise SpecError(f"kernel {spec.text!r}: {error}") from None


# Keys of a tile: more is a cache, and memory that is not there.
LONGEST_BLOCK = 1 << 16

PLAN_OPTIONS: dict[str, str] = {
    "heads": "head groups: 12, 8+4, 4+4+4, split; default one group of all heads",
    "kv": "KV parts: a number, size:KEYS, auto; default 1 (with a policy: auto)",
    "block": "keys a tile, a multiple of 16; default 64",
    "launch": "one for all head groups; or one a group, on copies of Q (each) or on views; default one",
    "policy": f"the plan an engine would choose: {', '.join(POLICIES)}",
    "threshold": "moves the policy's threshold",
    "gpus": "GPUs that the policy's split mode shares the KV heads over; default 1",
    "split_mode": "layer or graph; default layer",
}

# Options that a policy chooses, and options that only a policy has.
CHOSEN_BY_POLICY = ("heads", "launch")
OF_POLICY = ("threshold", "gpus", "split_mode")


def parse_plan(spec: Spec) -> Plan:
    """The plan that PLAN_OPTIONS describe. Raises SpecError."""
    options = spec.options
    block = number(spec, "block", 64)
    if block % 16 or block > LONGEST_BLOCK:
        raise SpecError(
            f"kernel {spec.text!r}: block={block}, expected a multiple of 16 up to {LONGEST_BLOCK}"
        )
    policy = policy_named(options["policy"]) if "policy" in options else None
    if policy is None:
        for key in OF_POLICY:
            if key in options:
                raise SpecError(f"kernel {spec.text!r}: {key} needs policy=NAME")
    else:
        for key in CHOSEN_BY_POLICY:
            if key in options:
                raise SpecError(f"kernel {spec.text!r}: {key} is chosen by the policy, leave one of them out")
        if "threshold" in options:
            policy = policy.with_threshold(number(spec, "threshold", 0, least=0))
    launches: dict[str, Launch] = {"one": "one", "each": "each", "views": "views"}
    launch = launches[choice(spec, "launch", "one", tuple(launches))]
    by_graph = choice(spec, "split_mode", "layer", ("layer", "graph")) == "graph"
    split_mode: SplitMode = "graph" if by_graph else "layer"
    try:
        return Plan(
            heads=parse_heads(options["heads"]) if "heads" in options else None,
            # Engines share the KV range out over the device's blocks: a policy's cuts move with its groups.
            kv=KVCuts.parse(options.get("kv", "1" if policy is None else "auto")),
            block=block,
            launch=launch,
            policy=policy,
            gpus=number(spec, "gpus", 1),
            split_mode=split_mode,
        )
    except SpecError as error:
        raise SpecError(f"kernel {spec.text!r}: {error}") from None
