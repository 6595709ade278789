"""The reports of `verify gen`, and what it shows on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

import numpy as np

from verify.gen.record import GenPairRecord, GenRun
from verify.kernels.said import visible
from verify.machine.terminal import counted
from verify.reports.colours import BASELINE, CANDIDATES, FLOOR
from verify.reports.drawing import Picture, finish, legend, new_figure, plain_powers
from verify.reports.path_alone import path_alone_sentence
from verify.reports.record import StoredGen, gen_command
from verify.reports.split_mode import shared_out
from verify.reports.templating import (
    TEMPLATES,
    figure,
    flat,
    interval,
    is_known,
    least_ratio,
    model_fact,
    model_words,
)
from verify.reports.verdict_lines import print_verdict


def print_outcome(run: GenRun, page: Path, to: TextIO) -> None:
    """Each candidate, what it writes where that is another text, the verdict, and where the report lies."""
    arms = {arm.name: arm for arm in run.arms}
    for pair in run.pairs:
        arm = arms[pair.candidate]
        print(f"{arm.name} {arm.spec}:", file=to)
        if pair.first_difference is not None:
            print(f"  writes: {visible(arm.text or '')}", file=to)
        for sentence in pair_sentences(run, pair):
            print(f"  {sentence}", file=to)
    print_verdict(run.verdict, run.reasons, to, run.notes)
    print(f"report: {visible(str(page))}", file=to, flush=True)


def gen_html(stored: StoredGen) -> str:
    """report.html: one file, everything in it."""
    sections = [{**c, "picture": _margins(stored, c["pair"])} for c in _sections(stored.run)]
    return TEMPLATES.get_template("gen.html.j2").render(**_content(stored.run), sections=sections)


def gen_markdown(stored: StoredGen) -> str:
    """report.md: short enough for a comment."""
    return TEMPLATES.get_template("gen.md.j2").render(**_content(stored.run), sections=_sections(stored.run))


def pair_sentences(run: GenRun, pair: GenPairRecord) -> list[str]:
    """What a reader needs to know about one candidate, the first difference before all else."""
    first, tokens = pair.first_difference, pair.tokens
    arm = next(arm for arm in run.arms if arm.name == pair.candidate)
    if first is not None:
        sentences = list(first.sentences)
        sentences.append(
            "given the baseline's tokens, the candidate prefers another one at"
            f" {len(pair.disagreements)} of {tokens} steps"
        )
    else:
        sentences = [f"the same {counted(tokens, 'token')}" if tokens else "no token was written with it"]
        if pair.closest is not None and is_known(pair.closest.margin):
            sentences.append(
                f"closest at token {pair.closest.step + 1}: the two top tokens were"
                f" {figure(pair.closest.margin, '%.2g')} nats apart"
            )
    sentences += [path_alone_sentence(x) for x in run.path_alone if x.candidate == pair.candidate]
    if is_known(pair.margin_moved_rms):
        sentences.append(
            f"over all steps the candidate moves the two top tokens by"
            f" {figure(pair.margin_moved_rms, '%.2g')} nats (rms); one rounding of noise moves them by"
            f" {figure(pair.margin_moved_rms_floor, '%.2g')}"
        )
    if pair.distance_ratio is not None:
        sentences.append(
            f"error of the attention output over the baseline's: {figure(pair.distance_ratio)}"
            f" (99.9 %: {interval(pair.distance_ratio_ci)}; could have seen a ratio from"
            f" {least_ratio(pair.detectable_distance_ratio)})"
        )
    calls = arm.calls or "one query token a call (T = 1)"
    went = f"{pair.coverage:.1%} of the tokens went through the changed plan"
    if pair.judged_calls is None:
        return [*sentences, went]
    of_what = "" if arm.calls else " of one query token"
    sentences += [
        f"{went}, {calls}",
        f"{counted(pair.judged_calls, 'call')}{of_what} held against exact, at least"
        f" {pair.judged_least} a layer",
    ]
    return sentences


def _sections(run: GenRun) -> list[dict[str, Any]]:
    """Each candidate: its pair, its arm, sentences, and the logits at the first difference."""
    sections = []
    for pair in run.pairs:
        first = pair.first_difference
        lines = []
        for name in ("exact", "floor", "baseline", pair.candidate) if first else ():
            if first is not None and name in first.logits:
                figures = {"logits": first.logits[name], "probabilities": first.probabilities[name]}
                lines.append({"arm": name, "margin": first.margins[name], **figures})
        arm = next(arm for arm in run.arms if arm.name == pair.candidate)
        sections.append(
            {"pair": pair, "arm": arm, "first": first, "lines": lines, "sentences": pair_sentences(run, pair)}
        )
    return sections


def _content(run: GenRun) -> dict[str, Any]:
    return {
        "run": run,
        "subject": (
            f"{model_words(run.model)}; a prompt of {run.prompt.tokens} tokens, greedy."
            f"{shared_out(run.tensor_parallel)}"
        ),
        "command": gen_command(run),
        "again": [gen_command(run)],
        "facts": [model_fact(run.model), *flat(run.environment)],
    }


@np.errstate(all="ignore")
def _margins(stored: StoredGen, pair: GenPairRecord) -> Picture | None:
    """How close the top two tokens were at each step, and where the candidate disagreed."""
    margin = stored.column("baseline", "top1_margin")
    if not margin.size:
        return None
    steps = np.arange(1, len(margin) + 1)
    drawn, axis = new_figure()
    axis.plot(steps, np.maximum(margin, 1e-7), ".-", lw=0.8, color=BASELINE, label="margin of the top two")
    at = [d.step for d in pair.disagreements]
    if at:
        axis.plot(steps[at], np.maximum(margin[at], 1e-7), "D", color=CANDIDATES[0], label="disagrees")
    for value, name, colour in (
        (pair.margin_moved_rms, "moved by the candidate", CANDIDATES[0]),
        (pair.margin_moved_rms_floor, "moved by rounding", FLOOR),
    ):
        if is_known(value) and value:
            axis.axhline(value, color=colour, ls="--", lw=1, label=name)
    axis.set(yscale="log", xlabel="token", ylabel="nats")
    plain_powers(axis)
    legend(axis, 4)
    return finish(
        pair.candidate,
        drawn,
        "Margin between the baseline's two most likely tokens, token by token. Where it lies under the dashed"
        " lines, either token was as good.",
    )
