"""`verify ppl`: from a model file and a text to a verdict, a group of windows at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from verify.arms.arm import Arm, void_reasons
from verify.arms.building import build_arms, close_kernels, kernel_notes
from verify.arms.kernel_errors import in_place_record, said_in_common
from verify.arms.learning import learn_arms
from verify.arms.model_facts import any_call, match_baselines, model_record, try_kernels
from verify.arms.records import OWN, SCHEMA, TensorParallelRecord, coverage_records
from verify.arms.result_type import Match, same_match
from verify.arms.sample import Sample
from verify.arms.split_mode import check_model, tensor_parallel_record
from verify.data import Corpus, LongText, Windows, cut_windows, load_corpus, read_any_text, read_text_file
from verify.data.corpora import STANDARD_INPUT
from verify.diff.captured import capture_to, parse_layers
from verify.judge.run_verdict import run_verdict
from verify.judge.verdict import Decision
from verify.kernels.formed import PLAIN_CALLS
from verify.kernels.kernel import Kernel
from verify.kernels.oracle_products import FLOAT64, multiplying
from verify.kernels.plans.spec import parse_spec
from verify.kernels.registry import UNTOLD, build_kernel
from verify.machine import environment
from verify.machine.devices import chosen_device
from verify.machine.errors import UsageError
from verify.machine.ranks import Ranks, local_device
from verify.model.architectures import architecture_of
from verify.model.architectures.architecture import Architecture
from verify.model.gguf.file import GGUFFile
from verify.model.layer_call import LayerCall
from verify.model.locate import locate_model
from verify.model.runner import COMPUTE_TYPES, Runner
from verify.model.text_cuts import PIECE
from verify.model.tokenizer import Tokenizer
from verify.ppl.drift import drift_record
from verify.ppl.engine_logits import LogitsFiles, engine_records
from verify.ppl.escapes import expanded
from verify.ppl.evidence import (
    Scores,
    arm_record,
    by_n_kv,
    changed_plan,
    changed_token_records,
    detectable_record,
    noise_notes,
    noise_records,
    pair_record,
    power_record,
)
from verify.ppl.evidence.alone import SingleTokensBeside, alone_record
from verify.ppl.evidence.caches import cache_proofs, cache_records
from verify.ppl.evidence.foresight import deviation_so_far, foresight
from verify.ppl.evidence.path_alone import path_alone_record
from verify.ppl.evidence.steadiness import NOISE_ARMS, Unexplained, unexplained
from verify.ppl.grouping import Grouping, group_windows
from verify.ppl.groups import GroupJob, GroupResult, join_groups
from verify.ppl.headroom import headroom_notes, headroom_record, headroom_to
from verify.ppl.listener import Listener
from verify.ppl.measuring import is_measured
from verify.ppl.noise_plans import noise_specs
from verify.ppl.perplexity import running_perplexity
from verify.ppl.planted import planted_faults
from verify.ppl.reasking import NOISE_WINDOWS, noise_levels, reask
from verify.ppl.record import CorpusRecord, FreeLevel, PplRun, SpeedRecord
from verify.ppl.rounds import Rounds
from verify.ppl.runfolder import RunFolder
from verify.ppl.settings import PplSettings

# Windows as short as this were hardly meant.
FEW_TOKENS = 16


class Outcome(NamedTuple):
    """All that a run found: its record, and the tables of its folder."""

    run: PplRun
    joined: GroupResult


class Experiment:
    """One run of `verify ppl`. What can be refused is refused here, before anything is computed."""

    def __init__(self, settings: PplSettings, listener: Listener, ranks: Ranks | None = None) -> None:
        self.settings, self.listener, self.ranks = settings, listener, ranks or Ranks()
        # Seconds of the wall, from the start of the process, at which stages ended.
        self.ended = {"loading": environment.process_seconds()}
        self.device = chosen_device(settings.device)
        if self.ranks.size > 1 and self.device.type == "cuda":
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
        # The folder that holds what was seen of the headroom.
        self._rooms: Path | None = None
        self.faults = planted_faults() if settings.power else []
        self.prompt: Arm | None = None
        if settings.score_last is not None:
            self.prompt = Arm("prompt", "prompt", "exact", "prefill", build_kernel("exact"))
        self._nll: list[np.ndarray] = []
        self._corrected = False
        # Of a candidate whose free-running pass nothing explains: that, in words.
        self._unsteady: dict[str, str] = {}
        self._free_noise: list[FreeLevel] = []
        self.sample = Sample(0)
        self.grouping = Grouping(1, 0)
        # Shapes of products that depend on where a row lies.
        self._moved: list[tuple[int, ...]] = []
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
    def notes(self) -> list[str]:
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
        if len(self.sample) < self.windows.n_windows:
            notes.add(
                f"kernels were measured on {len(self.sample)} of {self.windows.n_windows} windows:"
                " distance, casts frozen and floor are theirs"
            )
        if self._moved:
            notes.add(
                f"products of {len(self._moved)} shapes give a row other bits in another place here: results"
                " may depend on the size of the groups"
            )
        return sorted(notes)

    @property
    def tensor_parallel(self) -> TensorParallelRecord | None:
        """How the layers are shared out; None where they are not."""
        return tensor_parallel_record(self.architecture, self.settings.gpus)

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

    def close(self) -> None:
        close_kernels(self.arms)
        if hasattr(self, "logits_files"):
            self.logits_files.close()

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on with."""
        return {
            "model": self.model.fingerprint,
            "tokens": hashlib.sha256(np.ascontiguousarray(self.windows.tokens).tobytes()).hexdigest(),
            "kernels": [_binary(arm.kernel) for arm in self.arms if arm.kernel],
        }

    def run(self, folder: RunFolder | None) -> Outcome | None:
        """Run every group that the folder does not hold, and draw the conclusions.

        Ranks other than 0 have no folder, and draw none. A KeyboardInterrupt passes through; finished groups
        are in the folder then.
        """
        with multiplying(self.device, self.settings.oracle):
            return self._run(folder)

    def _run(self, folder: RunFolder | None) -> Outcome | None:
        leads = self.ranks.leads
        hooks = [capture_to(folder.path, self.captured)] if self.captured and folder else []
        if self.settings.headroom and folder is not None:
            self._rooms = folder.path
            hooks.append(headroom_to(folder.path, self._ordering))
        runner = Runner(
            self.architecture,
            device=self.device,
            attention_type=self.settings.cache_type,
            share=self.ranks.share(),
            compute=self.settings.compute,
            gpus=self.settings.gpus,
            side_by_side=self.settings.sequences if self.settings.sequences > 1 else 0,
        )
        grouping = min(self.ranks.everyones(self._grouping(runner)))
        if self.logits_files and self.ranks.size > 1:
            raise UsageError("--save-logits, --against: expected one process, logits are written in order")
        self.sample = Sample(
            self.windows.n_windows,
            measured=self.settings.measured,
            at_once=runner.tiling(self.settings.n_ctx, self.settings.score_last).windows,
        )
        self.ended["preparing"] = environment.process_seconds()
        self.logits_files.begin(resume=bool(folder and folder.finished_groups()))
        self.listener.started(self.model, self._corpus_record(), self.tensor_parallel, self.notes)
        job = GroupJob(
            runner=runner,
            windows=self.windows,
            arms=self.arms,
            seed=self.settings.seed,
            prompt=self.prompt,
            faults={fault.name: fault.fault for fault in self.faults},
            capture=_each_of(hooks) if hooks else None,
            logits_files=self.logits_files or None,
            measured=self.settings.measured,
        )
        rounds = Rounds(
            job,
            grouping,
            folder=folder,
            ranks=self.ranks,
            listener=self.listener,
            group_done=self._group_done,
            checkpoint_seconds=60 * self.settings.checkpoint_minutes,
        )
        results = rounds.run()
        joined = join_groups(results) if leads else None
        if joined is not None:
            self._ask_again(runner, joined)
        runner.stream.close()
        self.ended["groups"] = environment.process_seconds()
        self.grouping = rounds.grouping
        self._moved = [shape for shape, same in runner.products.checked.items() if not same]
        return self._conclude(joined) if joined is not None else None

    def _ask_again(self, runner: Runner, joined: GroupResult) -> None:
        """Find candidates whose free-running divergence nothing explains, and ask their calls again."""
        scores = Scores(joined, self.windows.scored_per_window)
        floor = next((arm.name for arm in self.arms if arm.role == "floor"), None)
        for arm in self.arms:
            of_arm = joined.findings[arm.name]
            if arm.role != "candidate" or not arm.reference or of_arm.failed:
                continue
            found = unexplained(scores, arm.name, arm.reference, floor)
            if found is None:
                continue
            if self.ranks.size == 1:
                found = self._beyond_noise(runner, scores, arm, found, floor)
                if found is None:
                    continue
            self._unsteady[arm.name] = str(found)
            if self.ranks.size > 1 or of_arm.unsteady is not None:
                continue
            self.listener.notice(f"{arm.spec} is {found}: window {found.window + 1} is asked again")
            asked = reask(runner, self.windows, found.window, arm, self.prompt)
            joined.findings[arm.name] = replace(of_arm, unsteady=asked.unsteady)
            self._unsteady[arm.name] += (
                f"; {asked.calls} calls of window {found.window + 1}, asked again, were steady"
            )

    def _beyond_noise(
        self, runner: Runner, scores: Scores, arm: Arm, found: Unexplained, floor: str | None
    ) -> Unexplained | None:
        """What is left of it beside arms with noise, which run for the first candidate that needs them."""
        if not self._free_noise:
            self.listener.notice(f"{arm.spec} is {found}: {NOISE_ARMS} arms with noise are run beside it")
            measured = [w for w in range(self.windows.n_windows) if w in self.sample]
            self._free_noise = noise_levels(
                runner,
                self.windows,
                measured[:: -(-len(measured) // NOISE_WINDOWS)],
                exact=next(one for one in self.arms if one.role == "exact"),
                prompt=self.prompt,
                arms=NOISE_ARMS,
                seed=self.settings.seed,
            )
        left = unexplained(scores, arm.name, arm.reference or "", floor, self._free_noise)
        if left is None:
            self.listener.notice(f"{arm.spec}: arms with noise explain what it is running freely")
        return left

    def _correct_foresight(self, result: GroupResult) -> None:
        """Say once what the first group's spread makes of it, where more groups follow."""
        pair = next((arm for arm in self.arms if arm.role == "candidate" and arm.reference), None)
        if self._corrected or pair is None or len(result.windows) == self.windows.n_windows:
            return
        scores = Scores(result, self.windows.scored_per_window)
        deviation = deviation_so_far(scores, pair.name, pair.reference or "")
        if deviation is not None:
            self._corrected = True
            corrected = foresight(len(self.sample), self.windows.scored_per_window, deviation)
            self.listener.notice(f"by the first group, {corrected}")

    def _grouping(self, runner: Runner) -> Grouping:
        n_ctx, width = self.settings.n_ctx, self.architecture.sizes.width
        return group_windows(
            windows=self.windows.n_windows,
            at_once=runner.tiling(n_ctx, self.settings.score_last).windows,
            n_ctx=n_ctx,
            state_bytes=(len(self.arms) + sum(map(is_measured, self.arms)) + len(self.faults))
            * n_ctx
            * width
            * COMPUTE_TYPES[self.settings.compute].itemsize,
            model_bytes=self.file.n_bytes,
            memory=self.settings.memory,
            device=self.device,
        )

    def _group_done(self, first: int, result: GroupResult) -> None:
        """A finished group's part of the running perplexity, if all before it is there."""
        baseline = next(arm.name for arm in self.arms if arm.role == "baseline")
        nll = Scores(result, self.windows.scored_per_window).column(baseline, "nll")
        self._correct_foresight(result)
        if first == sum(map(len, self._nll)) and len(nll):
            self._nll.append(nll)
            self.listener.windows_done(first, running_perplexity(np.concatenate(self._nll))[first:])

    def _conclude(self, joined: GroupResult) -> Outcome:
        settings = self.settings
        scores = Scores(joined, self.windows.scored_per_window)
        arms = [arm_record(arm, joined.findings[arm.name], scores) for arm in self.arms]
        by_name = {arm.name: arm for arm in self.arms}
        floor = next((arm.name for arm in self.arms if arm.role == "floor"), None)
        positions = self.windows.scored_positions
        scored_n_kv = range(positions.start + 1, positions.stop + 1)
        proofs = cache_proofs(self.arms, self.architecture, settings.cache_type, self.device)
        ratio = self.architecture.sizes.ratio
        beside = {
            arm.name: SingleTokensBeside(joined.alone, arm.name, arm.reference, ratio)
            for arm in self.arms
            if arm.reference is not None
        }
        pairs, lengths, path_alone = [], [], []
        exact = next(arm.name for arm in self.arms if arm.role == "exact")
        for arm in self.arms:
            if arm.role != "candidate":
                continue
            reference = by_name[arm.reference or ""]
            changed = changed_plan(joined.traces[arm.name], joined.traces[reference.name], scored_n_kv)
            pairs.append(
                pair_record(
                    arm,
                    reference,
                    joined,
                    scores,
                    changed=changed,
                    floor=floor,
                    min_coverage=settings.min_coverage,
                    margin=settings.margin,
                    allow_same=settings.allow_same,
                    rows=settings.score_last or settings.n_ctx,
                    unsteady=self._unsteady.get(arm.name, ""),
                    cache_faults=[
                        f"{called}: {fault}"
                        for one, called in ((arm.name, "candidate"), (reference.name, "baseline"))
                        for fault in (proofs[one].faults[:1] if one in proofs else [])
                    ],
                    single_tokens=beside[arm.name],
                )
            )
            path_alone.append(path_alone_record(arm, reference, joined, scores, exact=exact, floor=floor))
            lengths += by_n_kv(
                arm.name,
                reference.name,
                scores,
                scored_n_kv=scored_n_kv,
                changed_n_kv=changed.n_kv,
                floor=floor,
            )
        verdict, exit_code, reasons = run_verdict(
            [(f"{by_name[p.candidate].spec} ({p.path})", Decision(p.verdict, p.reasons)) for p in pairs],
            void_reasons(self.arms, joined.findings),
        )
        baseline = next(arm.name for arm in self.arms if arm.role == "baseline")
        engines = engine_records(
            self.logits_files,
            {arm.name: arm.kld_to_exact_mean for arm in arms},
            baseline,
            [tensor.type_name for tensor in self.file.tensors.values()],
        )
        power = power_record(self.faults, pairs, baseline, joined, scores, settings.margin)
        noise = noise_records(self.arms, pairs, joined, scores)
        launching = [*self.arms, *([self.prompt] if self.prompt else [])]
        in_place = [in_place_record(joined.layers, arm.name) for arm in self.arms]
        alone = [
            alone_record(
                arm,
                joined,
                beside[arm.name].judge(settings.margin) if arm.role == "candidate" else None,
                scored_n_kv,
            )
            for arm in self.arms
            if arm.kernel is not None
        ]
        room = None if self._rooms is None else headroom_record(self._rooms, self._ordering)
        run = PplRun(
            schema=SCHEMA,
            command="ppl",
            verdict=verdict,
            exit_code=exit_code,
            reasons=reasons,
            notes=[
                *self.notes,
                *said_in_common(joined.layers, self.arms, any_call(self.architecture)),
                *noise_notes(noise),
                *headroom_notes(room, self._ordering, settings.cache_type),
                *(engine.said for engine in engines),
            ],
            engines=engines,
            settings=settings.to_json(),
            environment=environment.describe(str(self.device)),
            model=self.model,
            tensor_parallel=self.tensor_parallel,
            corpus=self._corpus_record(),
            arms=arms,
            pairs=pairs,
            coverage=coverage_records(launching, joined.traces),
            in_place=[record for record in in_place if record is not None],
            headroom=room,
            caches=cache_records(self.arms, self.architecture, proofs, joined.layers),
            alone=[record for record in alone if record is not None],
            path_alone=[record for record in path_alone if record is not None],
            by_n_kv=lengths,
            drift=drift_record(joined.drift),
            top1_changes=changed_token_records(joined.top1, self.windows, self.tokenizer),
            noise=noise,
            free_noise=self._free_noise,
            power=power,
            detectable={pair.candidate: detectable_record(pair, joined, power) for pair in pairs},
            speed=self._speed_record(joined),
        )
        return Outcome(run, joined)

    @property
    def _ordering(self) -> Kernel:
        """In whose order of summation the headroom is told."""
        return next(arm.kernel for arm in self.arms if arm.role == "candidate" and arm.kernel is not None)

    def _corpus_record(self) -> CorpusRecord:
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
            measured_windows=len(self.sample),
            scored_per_window=windows.scored_per_window,
            first_scored=windows.first_scored,
        )

    def _speed_record(self, joined: GroupResult) -> SpeedRecord:
        """Of everything up to now: the last thing that is recorded."""
        products = joined.seconds.get("products", 0.0)
        self.ended["conclusions"] = environment.process_seconds()
        return SpeedRecord(
            seconds=joined.seconds,
            product_flop=joined.product_flop,
            product_flop_per_s=joined.product_flop / products if products else None,
            anonymous_bytes=joined.anonymous_bytes,
            group_windows=self.grouping.windows,
            stages_ended_at_s=self.ended,
            groups=joined.groups,
            read_bytes=joined.read_bytes.total(),
        )


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


def _each_of(hooks: Sequence[Callable[[LayerCall], None]]) -> Callable[[LayerCall], None]:
    def call_each(call: LayerCall) -> None:
        for hook in hooks:
            hook(call)

    return call_each


def _binary(kernel: Kernel) -> str:
    return f"{kernel.spec}@{getattr(kernel, 'binary', '')}"
