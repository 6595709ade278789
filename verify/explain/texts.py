"""Two texts of engines that part: where, how close it was there, and whether rounding explains it.

The texts are greedy. Without a model the files prove where they part, and with logprobs in them how close it
was. With a model both are walked beside exact attention (`flips`): the first difference is a tie where
rounding moves the two tokens' margin as far as it had to; and each text's later tokens, on its own prefix,
are flips that rounding explains or not. A text that the model does not explain on side A was not written by
this model greedily: then nothing is said about B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from verify.engines.token_records import Name, TokenRecord
from verify.explain.flips import (
    COMMON,
    DRAWS,
    SEEN_WITH,
    TOO_RARE,
    Answer,
    Position,
    Walked,
    answer_of,
    detectable,
    walk,
    worst,
)
from verify.explain.reference import EXACT, Pass, ReferencePasses
from verify.kernels.errors import KernelFailure
from verify.machine.errors import UsageError

# What moves a margin, beside the draws of `flips`: shown, and not counted as rounding.
CACHES = (
    Pass("a bf16 cache", "exact", attention_type="bf16"),
    Pass("a q8_0 cache", spec="flash:cache=q8_0"),
)
KINDS = {
    "noise": "one rounding of noise",
    "plan": "a change of plan",
    "f16 sums": "float16 sums",
    "bf16 P": "P in bfloat16",
}


class Tokens(NamedTuple):
    """A pair's tokens: the prompt and what came after it, by id; known: whether the prompt's end is known."""

    prompt: list[int]
    a: list[int]
    b: list[int]
    known: bool
    # Whether texts had to be cut into tokens here: an engine's own cut may have been another.
    cut_here: bool


@dataclass
class Explained:
    """One pair of texts."""

    answer: Answer  # tie, not explained, inconclusive
    sentences: list[str]  # that say why
    # Index of the first difference after the prompt; None where there is none.
    first: int | None = None
    n_kv: int | None = None  # keys seen there
    # Exact attention's margin of A's token over B's there, and what moves it.
    margin: float | None = None
    sigma: float | None = None  # what rounding moves it by, one standard deviation
    p_flip: float | None = None  # probability that two right arithmetics disagree there
    # By what was changed: how far it moves margins, nats.
    moves: dict[str, float] = field(default_factory=dict)
    # By side, A or B: tokens that are not exact's first choice.
    flips: dict[str, list[Position]] = field(default_factory=dict)
    expected_flips: dict[str, float] = field(default_factory=dict)  # by side: how many rounding makes
    # Root mean square move of margins that would have been seen.
    detectable: float | None = None

    def to_json(self) -> dict[str, Any]:
        found = {k: v for k, v in self.__dict__.items() if k != "flips"}
        return found | {"flips": {k: [f._asdict() for f in v] for k, v in self.flips.items()}}


def first_difference(a: Sequence[Name], b: Sequence[Name]) -> int | None:
    """Index of the first token that differs, or at which one text goes on alone; None for the same texts."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def from_files_alone(a: TokenRecord, b: TokenRecord) -> Explained:
    """What two records prove without a model."""
    x, y = _names(a), _names(b)
    at = first_difference(x, y)
    unit = "token" if a.names is not None and b.names is not None else "character"
    if at is None:
        return Explained("tie", [f"the texts are the same: {len(x)} {unit}s"])
    more = (
        "whether rounding explains it needs the model: verify explain --texts A B -m MODEL.gguf"
        " (and -p PROMPT where the files do not hold it)"
    )
    if at >= min(len(x), len(y)):
        longer = "A" if len(x) > len(y) else "B"
        said = f"the texts are the same for {at} {unit}s; {longer} goes on alone: it was stopped elsewhere"
        return Explained("inconclusive", [said], first=at)
    if unit == "character":
        said = (
            f"the texts part at character {at + 1}: {_around(a.text or '', at)} / {_around(b.text or '', at)}"
        )
        return Explained("inconclusive", [said, more], first=at)
    told = [f"the texts part at token {at + 1}: A has {x[at]!r}, B has {y[at]!r}"]
    margins = [_own_margin(r, at, x[at], y[at]) for r in (a, b)]
    if margins[0] is not None and margins[1] is not None:
        told.append(
            f"in A's own logprobs A's token is {margins[0]:+.3g} nats ahead, in B's {margins[1]:+.3g}: moved"
            f" by {abs(margins[0] - margins[1]):.3g}"
        )
    if a.logprobs is not None and b.logprobs is not None and at:
        same = np.array(a.logprobs[:at]) - np.array(b.logprobs[:at])
        rms = math.sqrt(float((same**2).mean()))
        told.append(f"over the {at} tokens before, the files' logprobs lie {rms:.2g} nats apart (rms)")
        if margins[0] is not None and margins[1] is not None:
            usual = abs(margins[0] - margins[1]) <= 4 * max(rms, 1e-12)
            told.append(
                "the move at the difference is as large as elsewhere: what made it is at work at every token"
                if usual
                else "the move at the difference is larger than elsewhere: something began there"
            )
    return Explained("inconclusive", [*told, more], first=at)


def tokens_of(reference: ReferencePasses, a: TokenRecord, b: TokenRecord, prompt: str | None) -> Tokens:
    """Ids of both sides. Raises UsageError where prompts do not match or ids are of another vocabulary."""
    tokenizer = reference.tokenizer
    given: list[list[int] | None] = []
    for record in (a, b):
        ids = record.prompt_ids
        text = prompt if prompt is not None else record.prompt
        if ids is None and text is not None:
            ids = tokenizer.encode(text).tolist()
            if tokenizer.add_bos and tokenizer.bos_id is not None:
                ids = [tokenizer.bos_id, *ids]
        given.append(ids)
    if given[0] is not None and given[1] is not None and given[0] != given[1]:
        at = first_difference(given[0], given[1]) or 0
        raise UsageError(
            f"{b.where}: the prompt is not that of {a.where}: its token {at} is"
            f" {str(given[1][at : at + 1])[1:-1] or 'none'}, expected"
            f" {str(given[0][at : at + 1])[1:-1] or 'none'}"
        )
    start = given[0] or given[1]
    sides, cut_here = [], False
    for record in (a, b):
        ids = record.ids
        if ids is None:
            text = record.text if record.text is not None else "".join(str(x) for x in record.names or ())
            ids, cut_here = tokenizer.encode(text).tolist(), True
        reference.check(ids, record.where)
        sides.append(ids)
    known = start is not None
    before = list(start) if start is not None else []
    if not before and tokenizer.bos_id is not None:
        before = [tokenizer.bos_id]
    reference.check(before, f"{a.where}: the prompt")
    if not before:
        # The first token has nothing before it: it is the prompt.
        if not sides[0] or sides[0][:1] != sides[1][:1]:
            raise UsageError(f"{a.where}: no prompt: expected -p, or a prompt in the files")
        before, sides = sides[0][:1], [s[1:] for s in sides]
    return Tokens(before, sides[0], sides[1], known, cut_here)


def explain_texts(reference: ReferencePasses, tokens: Tokens, *, most: int) -> Explained:
    """The pair beside the model. most: tokens of each text, from the difference on, that are looked at."""
    at = first_difference(tokens.a, tokens.b)
    if at is None:
        return Explained("tie", [f"the texts are the same: {len(tokens.a)} tokens"])
    if at >= min(len(tokens.a), len(tokens.b)):
        longer = "A" if len(tokens.a) > len(tokens.b) else "B"
        said = f"the texts are the same for {at} tokens; {longer} goes on alone: it was stopped elsewhere"
        return Explained("inconclusive", [said], first=at)
    # What comes before the difference counts as greedy text only where the prompt's end is known.
    begin = 0 if tokens.known else at
    walked = {
        side: walk(reference, tokens.prompt, ids[: at + most], first=begin)
        for side, ids in (("A", tokens.a), ("B", tokens.b))
    }
    found = Explained("inconclusive", [], first=at, n_kv=len(tokens.prompt) + at)
    found.flips = {side: w.flips for side, w in walked.items()}
    found.expected_flips = {side: w.expected for side, w in walked.items()}
    found.detectable = detectable(walked["B"])
    _measure_there(reference, tokens, at, found)
    _say_where(reference, tokens, at, found)
    _answer(found, walked, at)
    if tokens.cut_here:
        found.sentences.append(
            "the texts were cut into tokens here: the engine's own cut may have been another (ids are surer)"
        )
    return found


def _measure_there(reference: ReferencePasses, tokens: Tokens, at: int, found: Explained) -> None:
    """Exact attention's margin at the first difference, and how far each known change moves it."""
    prefix = [*tokens.prompt, *tokens.a[:at]]
    x, y = tokens.a[at], tokens.b[at]

    def margin(way: Pass) -> float:
        logits = reference.logits(prefix, way, 1)[0].double()
        return float(logits[x] - logits[y])

    exact = margin(EXACT)
    found.margin = exact
    squares: dict[str, list[float]] = {}
    for draw in DRAWS:
        squares.setdefault(KINDS[draw.name.rsplit(" ", 1)[0]], []).append((margin(draw) - exact) ** 2)
    found.moves = {kind: math.sqrt(sum(s) / len(s)) for kind, s in squares.items()}
    for cache in CACHES:
        try:
            found.moves[cache.name] = abs(margin(cache) - exact)
        except (KernelFailure, ValueError):
            continue
    of_first = [f for side in ("A", "B") for f in found.flips[side] if f.at == at]
    chosen = max(of_first, key=lambda f: f.margin, default=None)
    if chosen is not None:
        found.sigma, found.p_flip = chosen.sigma, chosen.p_flip


def _say_where(reference: ReferencePasses, tokens: Tokens, at: int, found: Explained) -> None:
    text = reference.tokenizer.token_text
    before = reference.tokenizer.decode([*tokens.prompt, *tokens.a[:at]])[-40:]
    x, y = text(tokens.a[at]), text(tokens.b[at])
    assert found.margin is not None
    ahead = x if found.margin >= 0 else y
    found.sentences.append(
        f"the texts part at token {at + 1} (n_kv {found.n_kv}): after {before!r} A has {x!r}, B {y!r}; exact"
        f" attention has {ahead!r} {abs(found.margin):.2g} nats ahead"
    )
    moves = ", ".join(f"{what} {size:.2g}" for what, size in found.moves.items())
    found.sentences.append(f"on this very prefix the margin is moved by: {moves} nats")
    if found.p_flip is not None:
        found.sentences.append(f"two right arithmetics disagree here with probability {found.p_flip:.2g}")


def _answer(found: Explained, walked: dict[str, Walked], at: int) -> None:
    """The verdict and its sentences."""
    bad = {side: worst(w) for side, w in walked.items()}
    rare = {side: 1.0 if f is None else f.p for side, f in bad.items()}
    joined = {side: w.together(at) for side, w in walked.items()}
    looked = {side: len(w.margins) for side, w in walked.items()}
    for side, w in walked.items():
        others = [f for f in w.flips if f.at != at]
        unexplained = sum(f.p < COMMON for f in others)
        found.sentences.append(
            f"{side}'s other {looked[side] - 1} tokens: {len(others)} are not exact attention's first choice"
            f" (rounding makes {w.expected:.1g}), of which rounding explains {len(others) - unexplained}"
        )
    if rare["A"] < TOO_RARE or joined["A"] < TOO_RARE:
        found.sentences.append(
            "A itself is not this model's greedy text: sampled, other weights, another prompt, or A has the"
            f" fault{_where(bad['A'])}"
        )
        return
    flips = sum(len(w.flips) for w in walked.values())
    found.answer = answer_of(min(rare.values()), min(joined.values()), flips)
    if found.answer == "not explained":
        reason = (
            f"rounding moves so far once in {1 / max(rare['B'], 1e-99):.1g} times{_where(bad['B'])}"
            if rare["B"] < TOO_RARE
            else f"rounding alone makes flips so many and so rare with probability {joined['B']:.1g}"
        )
        found.sentences.append(f"not explained by rounding: {reason}")
        return
    if found.answer == "inconclusive":
        found.sentences.append("too rare for rounding to be likely, too near for it to be excluded")
        return
    size = found.detectable
    seen = (
        f"a fault that moves such margins by {size:.2g} nats (rms; a mean KLD of about {size**2 / 4:.1g})"
        f" would have shown in these {looked['B']} tokens with {SEEN_WITH:.0%}"
        if size is not None and math.isfinite(size)
        else f"these {looked['B']} tokens would have shown no fault of any size with {SEEN_WITH:.0%}"
    )
    found.sentences.append(f"a tie: rounding explains it; {seen}")


def _where(position: Position | None) -> str:
    if position is None:
        return ""
    return (
        f" (token {position.at + 1}, {position.margin:.2g} nats behind, where rounding moves"
        f" {position.sigma:.2g})"
    )


def _names(record: TokenRecord) -> Sequence[Name]:
    return record.names if record.names is not None else list(record.text or "")


def _own_margin(record: TokenRecord, at: int, x: Name, y: Name) -> float | None:
    """How far x is ahead of y in a record's own logprobs; None where it does not have both."""
    if record.logprobs is None or at >= len(record.logprobs):
        return None
    known = dict(record.top[at]) if record.top is not None else {}
    assert record.names is not None
    known[record.names[at]] = record.logprobs[at]
    return known[x] - known[y] if x in known and y in known else None


def _around(text: str, at: int) -> str:
    return repr(text[max(at - 20, 0) : at + 12])
