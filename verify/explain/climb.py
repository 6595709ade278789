"""Measuring a ladder (`verify.engines.ladder`): every step on the same windows of the same text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from verify.arms.likelihood import losses
from verify.data import cut_windows, load_corpus, read_text_file
from verify.data.windows import ScoredRows, Windows
from verify.engines.ladder import Ladder, LadderStep, StepKind
from verify.explain.reference import (
    BASELINE,
    EXACT,
    Pass,
    ReferencePasses,
    divergences,
    unseen_key,
    wrong_head,
)
from verify.judge.statistics import paired_difference, window_interval
from verify.kernels.errors import KernelFailure
from verify.machine.errors import UsageError
from verify.machine.terminal import Progress


class Rung(NamedTuple):
    """A step before it is measured. against: the pass that it is a change of."""

    way: Pass
    what: str
    kind: StepKind
    against: Literal["baseline", "exact"] = "baseline"


UNCHANGED = Pass("baseline", spec=BASELINE)
ROTATED = "+rotate=mainline,q=q8_0"
RUNGS = (
    Rung(Pass("floor", "floor"), "one rounding of noise", "rounding", "exact"),
    Rung(Pass("plan", spec="flash:kv=4"), "a change of KV parts", "rounding"),
    Rung(Pass("f16-sums", spec="flash:acc=f16"), "float16 accumulators", "rounding"),
    Rung(Pass("f16-output", spec="flash:out=f16"), "a float16 output", "rounding"),
    Rung(Pass("bf16-P", spec="flash:p=bf16"), "P in bfloat16", "rounding"),
    Rung(Pass("bf16-cache", spec=BASELINE, attention_type="bf16"), "a bfloat16 cache", "cache"),
    Rung(Pass("q8_0", spec="flash:cache=q8_0"), "a q8_0 cache", "cache"),
    Rung(Pass("q4_0", spec="flash:cache=q4_0"), "a q4_0 cache", "cache"),
    # As llama.cpp has had them since 2026: K and V rotated, queries rounded as the cache is.
    Rung(Pass("q8_0-rotated", spec=f"flash:cache=q8_0{ROTATED}"), "a rotated q8_0 cache", "cache"),
    Rung(Pass("q4_0-rotated", spec=f"flash:cache=q4_0{ROTATED}"), "a rotated q4_0 cache", "cache"),
    Rung(Pass("off-by-one", spec="fault", build=unseen_key), "a dropped key", "fault"),
    Rung(Pass("wrong-head", spec="fault", build=wrong_head), "a wrong KV head", "fault"),
)


def measure(
    reference: ReferencePasses,
    windows: Windows,
    rungs: tuple[Rung, ...] = RUNGS,
    progress: Progress | None = None,
) -> Ladder:
    """The ladder of a model on windows of a text. A step that cannot run is left out, and named."""
    scored = windows.scored_per_window
    kld: dict[str, list[np.ndarray]] = {r.way.name: [] for r in rungs}
    nll: dict[str, list[np.ndarray]] = {r.way.name: [] for r in rungs}
    base_nll: dict[str, list[np.ndarray]] = {"baseline": [], "exact": []}
    flips: dict[str, list[np.ndarray]] = {r.way.name: [] for r in rungs}
    left_out: dict[str, str] = {}
    total, done = windows.n_windows * (len(rungs) + 2), 0
    for window, targets in zip(windows.tokens.tolist(), windows.targets.tolist(), strict=True):
        # The last token is only a target.
        tokens = window[:-1]
        unchanged = {
            "baseline": reference.logits(tokens, UNCHANGED, scored),
            "exact": reference.logits(tokens, EXACT, scored),
        }
        for name, logits in unchanged.items():
            base_nll[name].append(losses(logits, targets))
        done += len(unchanged)
        for rung in rungs:
            name = rung.way.name
            if name in left_out:
                continue
            try:
                logits = reference.logits(tokens, rung.way, scored)
            except (KernelFailure, ValueError) as error:
                left_out[name] = f"{rung.what}: {' '.join(str(error).split())[:160]}"
                continue
            base = unchanged[rung.against]
            kld[name].append(divergences(logits, base))
            nll[name].append(losses(logits, targets))
            flips[name].append((logits.argmax(-1) != base.argmax(-1)).cpu().numpy())
            done += 1
            if progress:
                progress(done, total)
    steps = []
    for rung in rungs:
        name = rung.way.name
        if name in left_out:
            continue
        interval = window_interval(np.stack(kld[name]))
        moved = paired_difference(np.stack(nll[name]), np.stack(base_nll[rung.against]))
        steps.append(
            LadderStep(
                name=name,
                what=rung.what,
                kind=rung.kind,
                spec=rung.way.spec,
                kld=interval.mean,
                kld_low=max(interval.low, 0.0),
                kld_high=interval.high,
                dlnppl=abs(moved.mean),
                dlnppl_se=moved.se,
                flips=float(np.stack(flips[name]).mean()),
            )
        )
    return Ladder(
        model=reference.name,
        n_ctx=windows.n_ctx,
        windows=windows.n_windows,
        tokens=windows.n_windows * scored,
        text=hashlib.sha256(np.ascontiguousarray(windows.tokens).tobytes()).hexdigest(),
        cache_type="f16",
        device=str(reference.device),
        steps=tuple(steps),
        left_out=tuple(left_out.values()),
    )


def ladder_of_text(
    model: str | None,
    file: Path | None,
    n_ctx: int,
    chunks: int,
    device: str | None,
    bar: Callable[[str], AbstractContextManager[Progress | None]],
) -> Ladder:
    """The ladder of a model on a text (None: the corpus of ppl). bar: shows progress of work of a name."""
    reference = ReferencePasses(model, device)
    try:
        corpus = read_text_file(str(file)) if file is not None else load_corpus()
        tokenizer = reference.tokenizer
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        windows = cut_windows(tokenizer.encode(corpus.text), n_ctx=n_ctx, chunks=chunks, bos_id=bos)
        with bar(f"ladder of {reference.name}") as progress:
            return measure(reference, windows, progress=progress)
    finally:
        reference.close()


def ladder_of_windows(model: str | None, windows: np.ndarray, n_vocab: int, device: str | None) -> Ladder:
    """A ladder on windows [W, n_ctx] of logits files themselves, BOS put where the engine puts it.

    n_vocab: of the files. Raises UsageError where the model has another.
    """
    reference = ReferencePasses(model, device)
    try:
        own = reference.architecture.sizes.vocabulary
        if own != n_vocab:
            called = "default" if model is None else model
            raise UsageError(f"-m {called}: a vocabulary of {own}, expected {n_vocab} as in the logits files")
        tokens = np.array(windows)
        tokenizer, first = reference.tokenizer, tokens[:, 0].copy()
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            tokens[:, 0] = tokenizer.bos_id
        n_ctx = tokens.shape[1]
        cut = Windows(
            tokens=tokens,
            n_ctx=n_ctx,
            first_scored=ScoredRows.second_half(n_ctx).first,
            n_tokens_total=tokens.size,
            overwritten=first if tokenizer.add_bos else None,
        )
        return measure(reference, cut)
    finally:
        reference.close()
