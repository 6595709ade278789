"""What people ask of `verify explain`: of texts, logits, logprobs or figures; and what is answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from verify.data import read_text_file
from verify.engines.conclusion import compare, comparison_json
from verify.engines.divergence import check_same_text, score_pair
from verify.engines.ladder import MEASURES, Ladder, Measure, Placed, read_ladder
from verify.engines.logits_file import LogitsFile
from verify.engines.logprob_files import check_same_tokens, columns_of, open_logprobs
from verify.engines.logprobs import LogprobComparison, compare_logprobs
from verify.engines.logprobs import comparison_json as logprobs_json
from verify.engines.token_records import check_same_prompt, read_records, with_same_line_ends
from verify.machine.environment import prepare_torch
from verify.machine.errors import UsageError
from verify.machine.terminal import Progress

if TYPE_CHECKING:
    # Only texts and a model need torch.
    from verify.explain.flips import Answer

DEFAULT_TOKENS = 256
# Of several pairs the gravest is the command's answer.
GRAVITY: tuple[Literal["not explained", "inconclusive", "tie"], ...] = (
    "not explained",
    "inconclusive",
    "tie",
)
# A bar for work of this name, as `verify.reports.progress.progress_of`.
Bar = Callable[[str], AbstractContextManager[Progress | None]]


class ComparedLogprobs(NamedTuple):
    """Two logprob files, what they amount to, and where that lies on a ladder."""

    paths: tuple[str, str]
    comparison: LogprobComparison
    placed: Placed | None


class Explanation(NamedTuple):
    """answers: of each pair, with the sentences that say why; found: for JSON; measured: a ladder that was
    measured for it; logprobs: where they were asked about."""

    answers: Sequence[tuple[Answer, Sequence[str]]]
    found: dict[str, Any]
    measured: Ladder | None = None
    logprobs: ComparedLogprobs | None = None

    @property
    def answer(self) -> Answer:
        return min((answer for answer, _ in self.answers), key=GRAVITY.index)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the command line says: one of texts, logits, logprobs and figures. Raises UsageError."""

    texts: tuple[str, str] | None  # two texts, token lists or JSON answers of engines
    logits: tuple[str, str] | None  # two logits files
    logprobs: tuple[str, str] | None  # two logprob files
    figures: dict[Measure, float]  # that somebody measured
    model: str | None  # GGUF file that wrote them, or `default`
    ladder: Path | None  # file of verify ladder
    prompt: str | None  # of both texts
    file: Path | None  # that holds the prompt
    tokens: int  # of a text, from the difference on, to look at
    chunks: int  # windows of the logits files for the ladder
    device: str | None  # None: the one there is

    def __post_init__(self) -> None:
        given = [pair for pair in (self.texts, self.logits, self.logprobs) if pair is not None]
        if len(given) + bool(self.figures) != 1:
            raise UsageError(
                "--texts, --logits, --logprobs: expected two files, in one of these three ways, or a figure"
                " (--kld, --dlnppl, --flips)"
            )
        for name, value in self.figures.items():
            negative = name != "dlnppl" and value < 0
            if not math.isfinite(value) or negative or (name == "flips" and value > 1):
                raise UsageError(f"--{name} {value:g}: expected a {MEASURES[name]}")
        if self.tokens < 1:
            raise UsageError(f"-n {self.tokens}: expected tokens from 1")
        if self.chunks < 1:
            raise UsageError(f"--chunks {self.chunks}: expected windows from 1")
        if self.prompt is not None and self.file is not None:
            raise UsageError("-p, -f: expected a prompt in one of these two ways")

    def answer(self, bar: Bar) -> Explanation:
        """Raises UsageError where a file cannot be read, or is none of what it should be."""
        prompt = self.prompt if self.file is None else read_text_file(str(self.file)).text
        steps = read_ladder(self.ladder) if self.ladder is not None else None
        if self.figures:
            return self._figures(steps, bar)
        if self.texts is not None:
            return self._texts(self.texts, prompt)
        if self.logits is not None:
            return self._logits(self.logits, steps)
        assert self.logprobs is not None
        return _logprobs(self.logprobs, steps)

    @property
    def _model(self) -> str | None:
        """As it is located."""
        return None if self.model == "default" else self.model

    def _texts(self, paths: tuple[str, str], prompt: str | None) -> Explanation:
        a, b = (read_records(path) for path in paths)
        if len(a) != len(b):
            raise UsageError(f"{paths[1]}: {len(b)} records, expected {len(a)} as in {paths[0]}")
        for x, y in zip(a, b, strict=True):
            check_same_prompt(x, y)
        line_ends = [with_same_line_ends(x, y) for x, y in zip(a, b, strict=True)]
        if self.model is None:
            from verify.explain.texts import from_files_alone

            found = [from_files_alone(x, y) for x, y in zip(a, b, strict=True)]
        else:
            from verify.explain.reference import ReferencePasses
            from verify.explain.texts import explain_texts, tokens_of

            prepare_torch()
            reference = ReferencePasses(self._model, self.device)
            try:
                pairs = [tokens_of(reference, x, y, prompt) for x, y in zip(a, b, strict=True)]
                found = [explain_texts(reference, pair, most=self.tokens) for pair in pairs]
            finally:
                reference.close()
        for one, said in zip(found, line_ends, strict=True):
            one.sentences.extend([said] if said else [])
        answers = [(one.answer, one.sentences) for one in found]
        return Explanation(answers, {"pairs": [one.to_json() for one in found]})

    def _logits(self, paths: tuple[str, str], steps: Ladder | None) -> Explanation:
        with LogitsFile(paths[0]) as base, LogitsFile(paths[1]) as other:
            check_same_text(base, other)
            layout, text = base.layout, base.tokens
            pair = score_pair(base, other)
        c = compare(pair, first_scored=layout.first_scored)
        sentences = [*c.decision.reasons]
        found: dict[str, Any] = {"pairs": [comparison_json(paths[1], c)]}
        if c.table is None or c.resolution is None:
            if not pair.base.finite.all():
                sentences.append("what A should have been is not known, so nothing is said of B")
                return Explanation([("inconclusive", sentences)], found)
            return Explanation([("not explained", sentences)], found)
        if c.decision.verdict == "identical":
            # A ladder would say nothing of it, and costs minutes.
            return Explanation([("tie", sentences)], found)
        measured = None
        if steps is None and self.model is not None:
            from verify.explain.climb import ladder_of_windows

            prepare_torch()
            steps = measured = ladder_of_windows(
                self._model, text[: self.chunks], layout.n_vocab, self.device
            )
        if c.decision.verdict == "round-off":
            sentences.append("no more than the files themselves hold")
            return Explanation([("tie", sentences)], found, measured)
        if steps is None:
            more = "a ladder answers: verify explain --logits A B -m MODEL.gguf, or --ladder FILE"
            return Explanation([("inconclusive", [*sentences, more])], found)
        placed = [
            steps.place("kld", c.table.kld.value),
            steps.place("dlnppl", c.table.ln_ratio.value),
            steps.place("flips", 1 - c.table.same_top.value),
        ]
        sentences += [*(p.sentence for p in placed), _verdict_words(placed[0])]
        found |= {"placed": [p._asdict() for p in placed], "ladder": steps.to_json()}
        return Explanation([(placed[0].answer, sentences)], found, measured)

    def _figures(self, steps: Ladder | None, bar: Bar) -> Explanation:
        """Figures on a stored ladder, or on one of the model and the corpus of ppl."""
        measured = None
        if steps is None and self.model is None:
            raise UsageError("--kld, --dlnppl, --flips: expected -m MODEL.gguf or --ladder FILE beside them")
        if steps is None:
            from verify.explain.climb import ladder_of_text

            prepare_torch()
            steps = measured = ladder_of_text(self._model, None, 512, self.chunks, self.device, bar)
        placed = [steps.place(measure, value) for measure, value in self.figures.items()]
        gravest = min(placed, key=lambda p: GRAVITY.index(p.answer))
        sentences = [*(p.sentence for p in placed), _verdict_words(gravest)]
        found = {"placed": [p._asdict() for p in placed], "ladder": steps.to_json()}
        return Explanation([(gravest.answer, sentences)], found, measured)


def _logprobs(paths: tuple[str, str], steps: Ladder | None) -> Explanation:
    a, b = (open_logprobs(path) for path in paths)
    check_same_tokens(a, b)
    c = compare_logprobs(a, columns_of(a, b))
    placed = steps.place("kld", c.divergence.mean) if steps is not None else None
    compared = ComparedLogprobs(paths, c, placed)
    found: dict[str, Any] = {"pairs": [logprobs_json(c)]}
    answer: tuple[Answer, list[str]]
    if c.decision.verdict == "identical":
        answer = "tie", ["the logprobs are the same"]
    elif c.decision.verdict == "round-off":
        answer = "tie", ["no more than the files themselves hold"]
    elif placed is None:
        more = "a ladder answers: verify ladder -m MODEL.gguf --out ladder.json, then --ladder ladder.json"
        answer = "inconclusive", [more]
    else:
        answer = placed.answer, [_verdict_words(placed)]
        found["placed"] = [placed._asdict()]
    return Explanation([answer], found, logprobs=compared)


def _verdict_words(placed: Placed) -> str:
    if placed.answer == "tie":
        return f"rounding explains it: right arithmetics differ by up to {placed.rounding:.1e} here"
    if placed.answer == "inconclusive":
        return f"at the edge of rounding, which makes up to {placed.rounding:.1e} here"
    return (
        f"not explained by another rounding, which makes up to {placed.rounding:.1e} here: what was changed"
        " must be of the size of the steps beside it (a cache's type, quantised products), or it is a bug"
    )
