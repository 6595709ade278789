"""What a run of `verify ppl` computes with: a model, the windows of a text, arms with their kernels."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verify.arms.arm import Arm
from verify.arms.building import build_arms, close_kernels, kernel_notes
from verify.arms.learning import learn_arms
from verify.arms.model_facts import match_baselines, model_record, try_kernels
from verify.arms.records import OWN, TensorParallelRecord
from verify.arms.result_type import Match, same_match
from verify.arms.split_mode import check_model, tensor_parallel_record
from verify.data import Corpus, LongText, Windows, cut_windows, load_corpus, read_any_text, read_text_file
from verify.data.corpora import STANDARD_INPUT
from verify.diff.captured import parse_layers
from verify.kernels.formed import PLAIN_CALLS
from verify.kernels.kernel import Kernel
from verify.kernels.oracle_products import FLOAT64
from verify.kernels.plans.spec import parse_spec
from verify.kernels.registry import UNTOLD, build_kernel
from verify.machine.devices import chosen_device
from verify.machine.ranks import Ranks, local_device
from verify.model.architectures import architecture_of
from verify.model.architectures.architecture import Architecture
from verify.model.gguf.file import GGUFFile
from verify.model.locate import locate_model
from verify.model.text_cuts import PIECE
from verify.model.tokenizer import Tokenizer
from verify.ppl.engine_logits import LogitsFiles
from verify.ppl.escapes import expanded
from verify.ppl.listener import Listener
from verify.ppl.noise_plans import noise_specs
from verify.ppl.planted import planted_faults
from verify.ppl.record import CorpusRecord
from verify.ppl.settings import PplSettings

# Windows as short as this were hardly meant.
FEW_TOKENS = 16


class Preparation:
    """What can be refused of a run is refused here, before anything is computed."""

    def __init__(self, settings: PplSettings, listener: Listener, ranks: Ranks) -> None:
        self.device = chosen_device(settings.device)
        if ranks.size > 1 and self.device.type == "cuda":
            self.device = local_device()
        _refuse_early(settings)
        path = locate_model(settings.model)
        self.file = GGUFFile.open(path)
        self.architecture: Architecture = architecture_of(self.file)
        self.model = model_record(self.architecture)
        layers = self.architecture.sizes.layers
        self.captured = (
            parse_layers(settings.capture, layers, self.architecture.attends)
            if settings.capture
            else frozenset()
        )
        check_model(self.architecture, settings.gpus)
        self.matches = _match(settings, self.architecture, self.device)
        self.settings = settings = replace(settings, baselines=tuple(m.baseline for m in self.matches))
        self.arms = _arms_of(settings, self.architecture.sizes.ratio)
        # What was read off kernels that state nothing, in sentences.
        self.learnt: list[str] = []
        self.faults = planted_faults() if settings.power else []
        self.prompt: Arm | None = None
        if settings.score_last is not None:
            self.prompt = Arm("prompt", "prompt", "exact", "prefill", build_kernel("exact"))
        try:
            # A long text is cut into tokens while the kernels are compiled.
            with ThreadPoolExecutor(1) as beside:
                text = beside.submit(_read_text, settings, self.file)
                try_kernels(self.arms, self.architecture, settings.cache_type, self.device)
                self.learnt = learn_arms(
                    self.arms,
                    self.architecture,
                    settings.cache_type,
                    longest=settings.n_ctx,
                    rows=settings.n_ctx,
                    device=self.device,
                )
                self.corpus, self.tokenizer, ids = text.result()
            if self.corpus.notice:
                listener.notice(self.corpus.notice)
            bos = self.tokenizer.bos_id if self.tokenizer.add_bos else None
            self.windows: Windows = cut_windows(ids, n_ctx=settings.n_ctx, chunks=settings.chunks, bos_id=bos)
            if settings.score_last is not None:
                self.windows = replace(self.windows, first_scored=settings.n_ctx - 1 - settings.score_last)
            self.logits_files = LogitsFiles(
                self.windows,
                self.architecture.sizes.vocabulary,
                against={arm.name: arm.spec for arm in self.arms if arm.role == "engine"},
                save=settings.save_logits,
                expanded=lambda: self._expanded_tokens(bos),
            )
        except BaseException:
            self.close()
            raise
        if (few := settings.n_ctx) < FEW_TOKENS:
            scored = self.windows.scored_per_window
            listener.notice(
                f"-c {few} is {few} tokens a window, {scored} of them scored; {few}k are -c {few * 1024}"
            )
        if settings.n_ctx > self.architecture.sizes.context:
            listener.notice(
                f"-c {settings.n_ctx} is beyond the model's training context of"
                f" {self.architecture.sizes.context}: perplexity will rise for that reason alone"
            )

    @property
    def notes(self) -> set[str]:
        """What a reader of the verdict must know about the kernels: a fallback that ran, say."""
        notes = kernel_notes(self.arms, self.settings.cache_type) | {
            match.said for match in self.matches if match.said
        }
        notes |= set(self.learnt)
        if self.settings.oracle != FLOAT64:
            notes.add(
                f"exact attention multiplied float64 numbers in slices (--oracle {self.settings.oracle})"
            )
        if self.settings.compute == "f64":
            notes.add("everything but attention was computed in float64")
        return notes

    @property
    def tensor_parallel(self) -> TensorParallelRecord | None:
        """How the layers are shared out; None where they are not."""
        return tensor_parallel_record(self.architecture, self.settings.gpus)

    @property
    def ordering(self) -> Kernel:
        """In whose order of summation the headroom is told."""
        return next(arm.kernel for arm in self.arms if arm.role == "candidate" and arm.kernel is not None)

    def corpus_record(self, measured_windows: int) -> CorpusRecord:
        """What was read; measured_windows: on which kernels are measured."""
        corpus, windows = self.corpus, self.windows
        return CorpusRecord(
            name=corpus.name,
            source=corpus.source,
            bytes=corpus.n_bytes,
            sha256=corpus.sha256,
            notice=corpus.notice,
            tokens=windows.n_tokens_total,
            n_ctx=windows.n_ctx,
            windows=windows.n_windows,
            measured_windows=measured_windows,
            scored_per_window=windows.scored_per_window,
            first_scored=windows.first_scored,
        )

    def _expanded_tokens(self, bos: int | None) -> np.ndarray | None:
        """The windows' tokens if an engine had expanded the text's backslashes; None if it has none, or is
        too long to be held."""
        if isinstance(self.corpus, LongText):
            return None
        text = expanded(self.corpus.text)
        if text == self.corpus.text:
            return None
        n_ctx, chunks = self.settings.n_ctx, self.windows.n_windows
        try:
            return cut_windows(
                self.tokenizer.encode(text), n_ctx=n_ctx, chunks=chunks, bos_id=bos
            ).text_tokens
        except ValueError:
            return None

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on with."""
        return {
            "model": self.model.fingerprint,
            "tokens": hashlib.sha256(np.ascontiguousarray(self.windows.tokens).tobytes()).hexdigest(),
            "kernels": [_binary(arm.kernel) for arm in self.arms if arm.kernel],
        }

    def close(self) -> None:
        close_kernels(self.arms)
        if hasattr(self, "logits_files"):
            self.logits_files.close()


def _refuse_early(settings: PplSettings) -> None:
    """What can be refused before a model is fetched. Raises UsageError, SpecError, CorpusError."""
    for text in (settings.baseline, *settings.candidates):
        # Those that run somebody's code are built once, when there is a model for them.
        if text != OWN and parse_spec(text).name not in UNTOLD:
            build_kernel(text).close()
    if settings.file is not None and settings.file != STANDARD_INPUT and not Path(settings.file).is_file():
        read_text_file(settings.file)


def _read_text(settings: PplSettings, file: GGUFFile) -> tuple[Corpus | LongText, Tokenizer, np.ndarray]:
    """The text, the model's tokenizer, and the ids of the text's tokens."""
    corpus = read_any_text(settings.file) if settings.file else load_corpus(settings.corpus)
    tokenizer = Tokenizer.from_gguf(file)
    # A text that is held is counted to its end, a longer one is cut as far as the windows reach.
    enough = None
    if isinstance(corpus, LongText) and settings.chunks > 0:
        enough = max(settings.chunks, 2) * settings.n_ctx
    return corpus, tokenizer, tokenizer.encode_texts(corpus.pieces(PIECE), enough=enough)[0]


def _match(settings: PplSettings, architecture: Architecture, device: torch.device) -> list[Match]:
    """The baseline of each candidate. A run that goes on has those that it began with."""
    if settings.baselines and settings.baseline != OWN:
        return [
            same_match(settings.baseline, spec, own)
            for spec, own in zip(settings.candidates, settings.baselines, strict=True)
        ]
    return match_baselines(
        settings.baseline,
        settings.candidates,
        architecture,
        cache_type=settings.cache_type,
        device=device,
        path=settings.paths[0],
    )


def _arms_of(settings: PplSettings, ratio: int) -> list[Arm]:
    noise: list[str] = []
    if settings.noise:
        noise = noise_specs(
            settings.baselines[0], settings.noise, ratio=ratio, n_ctx=settings.n_ctx, seed=settings.seed
        )
    return build_arms(
        settings.baselines,
        settings.candidates,
        paths=settings.paths,
        gpus=settings.gpus,
        noise=noise,
        engines=settings.against,
        form=settings.form,
        baseline_form=PLAIN_CALLS if settings.baseline == OWN else None,
    )


def _binary(kernel: Kernel) -> str:
    return f"{kernel.spec}@{getattr(kernel, 'binary', '')}"
