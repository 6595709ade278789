"""`verify ppl --only`: perplexity of one kernel in one pass, of any number of models and texts.

Nothing is compared with exact attention here, so there is no verdict on a kernel. Models on the same tokens
are compared token by token with the first, as a quantised model is with the one that it was made from: a
difference of two perplexities has a paired error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from verify.arms.model_facts import model_record
from verify.arms.records import ModelRecord
from verify.data import Corpus, LongText, Windows, cut_windows, load_corpus, read_any_text, strided_windows
from verify.engines.kld_table import Estimate, mean
from verify.judge.statistics import paired_difference
from verify.kernels.call import RUN_PATHS
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel
from verify.machine.devices import chosen_device
from verify.machine.errors import UsageError
from verify.model.architectures import architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.locate import locate_model
from verify.model.runner import COMPUTE_TYPES, Progress, Runner
from verify.model.text_cuts import PIECE
from verify.model.tokenizer import Tokenizer
from verify.ppl.grouping import Grouping, group_windows, uncovered
from verify.ppl.perplexity import perplexity, running_perplexity
from verify.ppl.scoring import Scorer
from verify.reference import KernelAlone

# Parts of a window, and groups of windows, that a perplexity is told of by itself.
RANGES, MOST_WINDOWS = 8, 4096


@dataclass(frozen=True, kw_only=True)
class OnlySettings:
    """What `verify ppl --only` is asked."""

    kernel: str  # specification
    models: tuple[str | None, ...] = (None,)  # files; None is the one that is installed
    files: tuple[str, ...] = ()  # texts; none: the corpus
    corpora: tuple[str, ...] = ()  # names of texts, where no files are given
    n_ctx: int = 512  # tokens a window
    chunks: int = -1  # windows, -1 for all
    stride: int = 0  # tokens between the beginnings of windows; 0: they lie end to end
    path: str = "decode"  # decode or prefill
    cache_type: str = "f16"  # type that q, k and v are rounded to, or a cache
    device: str = "cpu"  # of torch
    memory: int | None = None  # bytes for hidden states of a group; None: a share of what is free

    def __post_init__(self) -> None:
        if self.path not in RUN_PATHS:
            raise UsageError(f"--path {self.path}: expected {' or '.join(RUN_PATHS)} beside --only")
        if self.stride < 0 or self.stride >= self.n_ctx:
            raise UsageError(
                f"--stride {self.stride}: expected 1 to {self.n_ctx - 1} tokens of -c {self.n_ctx}"
            )

    @property
    def texts(self) -> tuple[tuple[str, bool], ...]:
        """(name, whether it is a file) of each."""
        return tuple((name, True) for name in self.files) or tuple((name, False) for name in self.corpora)


class OnlyGroup(NamedTuple):
    """Windows that were finished together: nll [windows, scored] float64, top1 [windows, scored]: the most
    likely tokens."""

    nll: np.ndarray
    top1: np.ndarray


@dataclass(kw_only=True)
class OnlyPass:
    """One model on one text; what was finished of it, where it was cut short."""

    model: ModelRecord  # its file
    weights: int  # numbers in the file's tensors
    text: Corpus | LongText  # that it predicts
    windows: Windows  # all that were asked for
    groups: list[OnlyGroup] = field(default_factory=list)  # those that are finished, in order

    @property
    def finished(self) -> int:
        return sum(len(group.nll) for group in self.groups)

    @property
    def scored(self) -> np.ndarray:
        """nll [windows, scored] of what is finished."""
        return np.concatenate([group.nll for group in self.groups])

    @property
    def top1(self) -> np.ndarray:
        """The most likely tokens, the same."""
        return np.concatenate([group.top1 for group in self.groups])

    @property
    def tokens(self) -> str:
        """Which tokens were scored after which: passes with the same can be compared token by token."""
        here = self.windows
        whole = np.ascontiguousarray(here.tokens[: self.finished]).tobytes()
        return hashlib.sha256(whole + str(here.first_scored).encode()).hexdigest()


class OnlyKeeper(Protocol):
    """Where finished groups are kept, to go on from. key: of what their figures hang on."""

    def finished(self, number: int, key: str, scored: int) -> dict[int, OnlyGroup]:
        """Those of pass `number` that are there, by first window. scored: tokens a window."""
        ...

    def save(self, number: int, first: int, key: str, group: OnlyGroup) -> None:
        """One more, its windows from `first` on."""


class OnlyListener(Protocol):
    """What a screen shows meanwhile."""

    def notice(self, text: str) -> None:
        """Something that a reader must know."""

    def begins(self, one: OnlyPass, number: int, passes: int) -> None:
        """A pass, of so many."""

    def progress(self, first: int, last: int, windows: int) -> Progress:
        """As in `verify.ppl.listener`."""
        ...

    def windows_done(self, first: int, running: list[float]) -> None:
        """As there."""


def run_only(
    settings: OnlySettings, listener: OnlyListener, keeper: OnlyKeeper
) -> tuple[list[OnlyPass], bool]:
    """All passes, models outside; and whether they were interrupted: then the last is what was finished.

    What can be refused is refused before a model is fetched. Raises UsageError, SpecError, ModelError,
    CorpusError.
    """
    build_kernel(settings.kernel).close()
    device = chosen_device(settings.device)
    texts = [read_any_text(name) if is_file else load_corpus(name) for name, is_file in settings.texts]
    for text in texts:
        if text.notice:
            listener.notice(text.notice)
    passes: list[OnlyPass] = []
    total = len(settings.models) * len(texts)
    with suppress(KeyboardInterrupt):
        for named in settings.models:
            with GGUFFile.open(locate_model(named)) as file:
                for one in _passes(settings, file, texts, device):
                    passes.append(one)
                    listener.begins(one, len(passes), total)
                    _run(settings, file, one, device, listener, keeper, len(passes) - 1)
        return passes, False
    return [one for one in passes if one.finished], True


def _passes(
    settings: OnlySettings, file: GGUFFile, texts: Sequence[Corpus | LongText], device: torch.device
) -> Iterator[OnlyPass]:
    architecture, tokenizer = architecture_of(file), Tokenizer.from_gguf(file)
    weights = sum(tensor.n_elements for tensor in file.tensors.values())
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    for text in texts:
        # As far as the windows reach, where the text is not held.
        enough = (
            max(settings.chunks, 2) * settings.n_ctx
            if isinstance(text, LongText) and settings.chunks > 0
            else None
        )
        ids = tokenizer.encode_texts(text.pieces(PIECE), enough=enough)[0]
        asked: dict[str, Any] = {"n_ctx": settings.n_ctx, "chunks": settings.chunks, "bos_id": bos}
        windows = (
            strided_windows(ids, stride=settings.stride, **asked)
            if settings.stride
            else cut_windows(ids, **asked)
        )
        yield OnlyPass(model=model_record(architecture), weights=weights, text=text, windows=windows)


def _run(
    settings: OnlySettings,
    file: GGUFFile,
    one: OnlyPass,
    device: torch.device,
    listener: OnlyListener,
    keeper: OnlyKeeper,
    number: int,
) -> None:
    """Group by group, less those that the keeper has; a KeyboardInterrupt leaves those that are finished."""
    architecture, windows = architecture_of(file), one.windows
    arm = KernelAlone(build_kernel(settings.kernel), settings.path)  # type: ignore[arg-type]
    key = _key(settings, one, arm.kernel)
    runner = Runner(architecture, device=device, attention_type=settings.cache_type)
    try:
        there = keeper.finished(number, key, windows.scored_per_window)
        size = _grouping(settings, file, windows, runner).windows
        left = uncovered({first: len(group.nll) for first, group in there.items()}, windows.n_windows)
        cut = [
            range(at, min(at + size, part.stop)) for part in left for at in range(part.start, part.stop, size)
        ]
        for first, chosen in sorted([*((first, None) for first in there), *((c.start, c) for c in cut)]):
            if chosen is None:
                group = there[first]
            else:
                group = _group(one, chosen, runner, arm, listener)
                keeper.save(number, first, key, group)
            one.groups.append(group)
            listener.windows_done(first, running_perplexity(one.scored)[first:])
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--only {settings.kernel}: does not fit this model: {error}") from None
    finally:
        runner.stream.close()
        arm.kernel.close()


def _group(
    one: OnlyPass, chosen: range, runner: Runner, arm: KernelAlone, listener: OnlyListener
) -> OnlyGroup:
    windows = one.windows
    targets = torch.from_numpy(windows.targets[chosen.start : chosen.stop].astype(np.int64).ravel())
    scorer = Scorer(exact=None, baseline_of={}, targets=targets.to(runner.device))
    slices = runner.run_group(
        torch.from_numpy(windows.tokens[chosen.start : chosen.stop]),
        [arm],
        scored=windows.scored_positions,
        first_window=chosen.start,
        progress=listener.progress(chosen.start, chosen.stop, windows.n_windows),
    )
    for piece in slices:
        scorer.add(piece)
    found = scorer.scores()[arm.name]
    shape = len(chosen), windows.scored_per_window
    return OnlyGroup(found.nll.reshape(shape), found.top1.reshape(shape))


def _key(settings: OnlySettings, one: OnlyPass, kernel: Kernel) -> str:
    """Of what a group's figures hang on: model, tokens, and the kernel as its file is now."""
    windows = one.windows
    text = hashlib.sha256(np.ascontiguousarray(windows.tokens).tobytes()).hexdigest()
    kernel_now = f"{kernel.spec}@{getattr(kernel, 'binary', '')} {settings.path} {settings.cache_type}"
    return f"{one.model.fingerprint} {text} {windows.first_scored} {kernel_now}"


def _grouping(settings: OnlySettings, file: GGUFFile, windows: Windows, runner: Runner) -> Grouping:
    n_ctx, width = windows.n_ctx, runner.architecture.sizes.width
    return group_windows(
        windows=windows.n_windows,
        at_once=runner.tiling(n_ctx).windows,
        n_ctx=n_ctx,
        state_bytes=n_ctx * width * COMPUTE_TYPES["f32"].itemsize,
        model_bytes=file.n_bytes,
        memory=settings.memory,
        device=runner.device,
    )


def only_rows(passes: Sequence[OnlyPass]) -> list[dict[str, Any]]:
    """A row a pass, as `--json` prints them; each beside the first pass on its text, where the tokens are the
    same ones."""
    first: dict[str, OnlyPass] = {}
    rows = []
    for one in passes:
        base = first.setdefault(one.text.sha256, one)
        nll = one.scored
        found = perplexity(nll.ravel())
        rows.append(
            {
                "model": one.model.path,
                "bytes": one.model.bytes,
                "bits_per_weight": 8 * one.model.bytes / one.weights,
                "fingerprint": one.model.fingerprint,
                "text": one.text.name,
                "text_sha256": one.text.sha256,
                "n_ctx": one.windows.n_ctx,
                "windows": one.finished,
                "windows_asked": one.windows.n_windows,
                "scored_per_window": one.windows.scored_per_window,
                "ppl": found.ppl,
                "ppl_se": found.se,
                "nll_mean": found.nll_mean,
                "against": _against(one, base) if one is not base and one.tokens == base.tokens else None,
                "by_window": [math.exp(x) for x in nll.mean(1)[:MOST_WINDOWS]],
                "by_position": _by_position(nll, one.windows.first_scored),
            }
        )
    return rows


def _against(one: OnlyPass, base: OnlyPass) -> dict[str, Any]:
    """Paired with the first model; means and errors of p of the token that came are llama-perplexity's."""
    nll, reference = one.scored, base.scored
    found = paired_difference(nll, reference)
    change = (np.exp(-nll) - np.exp(-reference)).ravel()
    square = mean(change * change)
    rms = math.sqrt(max(square.value, 0.0))
    same = float((one.top1 == base.top1).mean())
    n = nll.size
    return {
        "model": base.model.path,
        "ln_ratio": Estimate(found.mean, found.se)._asdict(),
        "dp": mean(change)._asdict(),
        "dp_rms": Estimate(rms, 0.5 / rms * square.error if rms else 0.0)._asdict(),
        "same_top": Estimate(same, math.sqrt(same * (1 - same) / max(n - 1, 1)))._asdict(),
    }


def _by_position(nll: np.ndarray, first: int) -> list[dict[str, Any]]:
    """Perplexity by the number of visible keys, in ranges with as many tokens each."""
    parts = np.array_split(np.arange(nll.shape[1]), min(RANGES, nll.shape[1]))
    return [
        {
            "n_kv_min": first + int(part[0]) + 1,
            "n_kv_max": first + int(part[-1]) + 1,
            "tokens": int(nll[:, part].size),
            "ppl": (found := perplexity(nll[:, part].ravel())).ppl,
            "ppl_se": found.se,
        }
        for part in parts
    ]
