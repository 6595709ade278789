"""The reports of `verify ppl`: a page with pictures, and a comment for a pull request, with one verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verify.ppl.record import DetectableRecord, PplRun
from verify.reports.caches import COLUMNS, cache_rows
from verify.reports.drawing import PERPLEXITY_CAPTIONS
from verify.reports.path_alone import path_alone_sentence
from verify.reports.pictures import pictures
from verify.reports.record import StoredPpl, ppl_command
from verify.reports.single_tokens import changed_words, single_token_sentences
from verify.reports.split_mode import shared_out
from verify.reports.templating import (
    TEMPLATES,
    figure,
    flat,
    is_known,
    model_fact,
    model_words,
    says_something,
)


def report_html(stored: StoredPpl) -> str:
    """report.html: one file, everything in it."""
    missing = dict.fromkeys(
        ("distance", "drift", "drift by position", "own error", "nll", "kld", "noise", *PERPLEXITY_CAPTIONS)
    )
    drawn = {**missing, **pictures(stored)}
    return TEMPLATES.get_template("ppl.html.j2").render(**_content(stored.run), pictures=drawn)


def report_markdown(stored: StoredPpl) -> str:
    """report.md: short enough for a comment."""
    return TEMPLATES.get_template("report.md.j2").render(**_content(stored.run))


def _content(run: PplRun) -> dict[str, Any]:
    return {
        "run": run,
        "seen": list(_coverage_sentences(run)),
        "detectable": list(_detectable_sentences(run)),
        "subject": _subject(run),
        "kind": run.pairs[0].distance_kind if run.pairs else "free-running",
        "several_paths": len({arm.path for arm in run.arms}) > 1,
        "most_tokens": max((arm.tokens for arm in run.arms), default=0),
        "any_frozen": any(arm.frozen for arm in run.arms),
        "controls": [arm.name for arm in run.arms if arm.role == "control"],
        "repeats": [arm.name for arm in run.arms if arm.role in ("control", "noise")],
        "pair_of": {pair.candidate: pair for pair in run.pairs},
        "command": ppl_command(run),
        "again": [ppl_command(run)],
        "cache_columns": COLUMNS,
        "caches": cache_rows(run),
        "facts": _facts(run),
    }


def _subject(run: PplRun) -> str:
    corpus = run.corpus
    return (
        f"{model_words(run.model)}; text {corpus.name}, {corpus.windows} windows of {corpus.n_ctx} tokens,"
        f" {corpus.scored_per_window} scored in each.{shared_out(run.tensor_parallel)}"
    )


def _coverage_sentences(run: PplRun) -> Iterator[str]:
    """How much of the run the changed path was, for each candidate."""
    for pair in run.pairs:
        whose = f" of {pair.candidate}" if len(run.pairs) > 1 else ""
        at = pair.changed_n_kv
        where = f", at n_kv {at[0]} to {at[1]}" if at else ""
        yield changed_words(run, pair, f"the scored tokens{whose}", where) + "."
    for said in single_token_sentences(run):
        yield f"{said}."
    for found in run.path_alone:
        yield f"{path_alone_sentence(found)}."


def _detectable_sentences(run: PplRun) -> Iterator[str]:
    """The smallest effects that this run would have shown; what it could not have shown, too."""
    for pair in run.pairs:
        least = run.detectable.get(pair.candidate, DetectableRecord())
        whose = f"{pair.candidate}: " if len(run.pairs) > 1 else ""
        scope = f", about {pair.distance_scope}" if pair.distance_scope else ""
        if is_known(least.distance_ratio):
            tokens = pair.tokens if pair.measured_tokens is None else pair.measured_tokens
            what = (
                f"a distance ratio from {least.distance_ratio:.3g}"
                if says_something(least.distance_ratio)
                else "no distance ratio"
            )
            yield f"{whose}could have seen {what}, on {tokens} tokens{scope}"
        if is_known(least.scale_by_gain):
            yield (
                f"{whose}could have seen a scale error of the attention output from"
                f" {least.scale_by_gain:.1e}, by its gain"
            )
        if is_known(least.dnll):
            meant, file = least.scale_by_nll, least.logits_file_nats
            same = f", which takes a scale error of at least {meant:.0e}" if is_known(meant) else ""
            coarse = (
                f"; the 16-bit logits file of llama-perplexity resolves {file:.0e} nats a token"
                if is_known(file)
                else ""
            )
            yield (
                f"{whose}perplexity alone would have shown a difference from {least.dnll:.1e} nats a"
                f" token{same}{coarse}"
            )
    smallest = run.power.smallest if run.power else {}
    if smallest:
        seen = ", ".join(f"{name} from {figure(size, '%.0e')}" for name, size in smallest.items() if size)
        blind = ", ".join(name for name, size in smallest.items() if not size)
        none = f"; seen at no size by {blind}" if blind else ""
        yield f"scale errors planted in the baseline were seen by {seen or 'no detector'}{none}"


def _facts(run: PplRun) -> list[tuple[str, Any]]:
    """What the run ran on: hashes, versions, device, seed."""
    corpus = run.corpus
    return [
        model_fact(run.model),
        ("text", f"{corpus.source} ({corpus.bytes} bytes, sha256 {corpus.sha256[:16]})"),
        ("seed", run.settings.get("seed")),
        *flat(run.environment),
    ]
