"""One run of `verify gen`: the prompt once, then a token at a time, the same ones through every arm.

The baseline decides what is written. Every arm is given its tokens, so that each step compares all arms on
the same text; where a candidate first prefers another token, it also goes on alone, to show its own text.
The prompt but for its last token goes through the prefill path; each token after that through decode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from verify.arms.arm import Arm, ArmRunner, Findings
from verify.arms.building import build_arms, close_kernels, kernel_notes
from verify.arms.learning import learn_arms
from verify.arms.likelihood import divergence, log_probabilities
from verify.arms.model_facts import match_baselines, try_kernels
from verify.arms.split_mode import check_model
from verify.gen.checks import CheckedExact
from verify.gen.difference import Difference, difference_at, measure_floor
from verify.gen.record import ShownToken
from verify.judge.verdict import DEFAULT_MARGIN
from verify.kernels.bits import same_bits
from verify.kernels.call import AttentionPath
from verify.kernels.trace import LaunchTrace
from verify.machine.devices import chosen_device, free_memory
from verify.machine.errors import UsageError
from verify.model.architectures import architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.locate import locate_model
from verify.model.steps import Stepper, weight_bytes
from verify.model.tokenizer import Tokenizer
from verify.ppl.settings import DEFAULT_BASELINE, DEFAULT_CANDIDATE, PplSettings

DEFAULT_TOKENS = 64


@dataclass(frozen=True)
class GenSettings:
    """What the command line of `verify gen` says."""

    prompt: str  # text to go on with
    prompt_file: str | None = None  # where it was read, if it was
    model: str | None = None  # file, or None for the one that is installed
    n_predict: int = DEFAULT_TOKENS  # tokens to write
    ignore_eos: bool = False  # go on after the model has ended its text
    baseline: str = DEFAULT_BASELINE  # specification
    candidates: tuple[str, ...] = (DEFAULT_CANDIDATE,)  # specifications
    cache_type: str = "f16"  # type that q, k and v are rounded to
    device: str = "cpu"  # of torch
    min_coverage: float = 0.0  # share of steps that must run another plan
    margin: float = DEFAULT_MARGIN  # distance ratio that still is round-off
    allow_same: bool = False  # a candidate may be its baseline's specification
    seed: int = 0  # of the floor's noise
    split_mode: str = "layer"  # of the engine that is reproduced
    gpus: int = 1  # of the engine that is reproduced

    def __post_init__(self) -> None:
        if self.n_predict < 1:
            raise UsageError(f"-n {self.n_predict}: expected at least 1 token")
        # What both commands take is checked in one place.
        PplSettings(
            candidates=self.candidates,
            cache_type=self.cache_type,
            min_coverage=self.min_coverage,
            margin=self.margin,
            split_mode=self.split_mode,
            gpus=self.gpus,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class ArmStep(NamedTuple):
    """One arm at one step."""

    nll: float  # of the baseline's token
    kld_to_exact: float  # nats
    kld_to_baseline: float  # nats; NaN where there is no baseline
    top1: int  # its most likely token
    top1_margin: float  # nats between its two most likely tokens
    target_logit: float  # of the baseline's token
    margin: float  # of the baseline's two most likely tokens, with this arm's logits
    finite: bool  # whether its logits are


class Step(NamedTuple):
    """One step: n_kv keys seen, the token that went in, the baseline's choice, and every live arm."""

    n_kv: int
    token: int
    chosen: int
    arms: dict[str, ArmStep]


@dataclass
class Written:
    """All that the loop found."""

    steps: list[Step] = field(default_factory=list)
    first: dict[str, Difference] = field(default_factory=dict)
    own_tokens: dict[str, list[int]] = field(default_factory=dict)
    ended: str | None = None
    failed_in_prompt: frozenset[str] = frozenset()


class Generation:
    """One run. What can be refused is refused here, before anything is computed."""

    def __init__(self, settings: GenSettings, notice: Callable[[str], None]) -> None:
        self.settings = settings
        self.device = chosen_device(settings.device)
        self.architecture = architecture_of(GGUFFile.open(locate_model(settings.model)))
        self.tokenizer = Tokenizer.from_gguf(self.architecture.file)
        ids = self.tokenizer.encode(settings.prompt).tolist()
        if self.tokenizer.add_bos and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id, *ids]
        if not ids:
            raise UsageError("-p: the prompt has no tokens, expected at least one")
        self.prompt: list[int] = ids
        check_model(self.architecture, settings.gpus)
        self.matches = match_baselines(
            settings.baseline,
            settings.candidates,
            self.architecture,
            cache_type=settings.cache_type,
            device=self.device,
            path="decode",
        )
        baselines = [match.baseline for match in self.matches]
        self.arms = build_arms(baselines, settings.candidates, gpus=settings.gpus)
        try:
            try_kernels(self.arms, self.architecture, settings.cache_type, self.device)
            self.learnt = learn_arms(
                self.arms,
                self.architecture,
                settings.cache_type,
                longest=len(ids) + settings.n_predict,
                rows=1,
                # Its last token is decoded.
                prompt=len(ids) - 1,
                device=self.device,
            )
        except BaseException:
            self.close()
            raise
        sizes = self.architecture.sizes
        length = len(ids) + settings.n_predict
        if length > sizes.context:
            notice(f"{length} tokens are beyond the model's training context of {sizes.context}")
        self.resident = weight_bytes(self.architecture) < free_memory(self.device) // 2
        if not self.resident:
            notice("the weights do not fit into memory: they are decoded again for every token")
        outputs: dict[str, torch.Tensor] = {}
        self._runners = {arm.name: ArmRunner(arm, outputs, seed=settings.seed) for arm in self.arms}
        self._logits_equal = dict.fromkeys(self._runners, True)
        self.exact = CheckedExact(
            self._runners["exact"], self._runners.values(), sizes.layers, settings.n_predict
        )
        self.stepper = Stepper(
            self.architecture,
            [self.exact, *(r for name, r in self._runners.items() if name != "exact")],
            device=self.device,
            attention_type=settings.cache_type,
            keep_weights=self.resident,
            gpus=settings.gpus,
        )

    @property
    def notes(self) -> list[str]:
        """What a reader of the verdict must know about the kernels: a fallback that ran, say."""
        return sorted(
            kernel_notes(self.arms, self.settings.cache_type)
            | {match.said for match in self.matches if match.said}
            | set(self.learnt)
        )

    def launched(self, arm: str) -> LaunchTrace:
        """What an arm's kernel ran for it: the prompt, and every step of the text that all arms share."""
        return self._runners[arm].launched

    def findings(self) -> dict[str, Findings]:
        """What came to light of every arm so far, by name."""
        return {
            name: replace(one.findings, logits_equal=self._logits_equal[name])
            for name, one in self._runners.items()
        }

    @property
    def candidates(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.role == "candidate"]

    def close(self) -> None:
        close_kernels(self.arms)
        if hasattr(self, "stepper"):
            self.stepper.close()

    def run(self, wrote: Callable[[int], None]) -> Written:
        """Write the text; `wrote` is called with each token of the baseline.

        KeyboardInterrupt ends the text early: what was written by then is the result.
        """
        found = Written()
        try:
            self._run(found, wrote)
        except KeyboardInterrupt:
            found.ended = "interrupted"
        return found

    def _run(self, found: Written, wrote: Callable[[int], None]) -> None:
        self._take("prefill")
        if len(self.prompt) > 1:
            self.stepper.step(torch.tensor(self.prompt[:-1]), scored=0)
        found.failed_in_prompt = frozenset(name for name, one in self._runners.items() if one.failed)
        self._take("decode")
        sequence = list(self.prompt)
        for i in range(self.settings.n_predict):
            self.exact.step = i
            # Otherwise the noise would be the same at every step.
            self._runners["floor"].seed = self.settings.seed + 104729 * (i + 1)
            logits = {
                name: x[0] for name, x in self.stepper.step(torch.tensor(sequence[-1:]), scored=1).items()
            }
            if "baseline" not in logits:
                found.ended = "the baseline failed"
                return
            self._compare_bits(logits)
            self.architecture.file.check_unchanged()
            step = _step(len(sequence), sequence[-1], logits, self._reference_of)
            found.steps.append(step)
            wrote(step.chosen)
            for arm in self.candidates:
                own = step.arms.get(arm.name)
                if own is not None and own.top1 != step.chosen and arm.name not in found.first:
                    found.first[arm.name] = self._difference(arm, i, sequence, step, logits)
                    found.own_tokens[arm.name] = self._alone(arm, own.top1, i)
            if not step.arms["baseline"].finite:
                found.ended = "the baseline's logits are not finite"
                return
            if step.chosen == self.tokenizer.eos_id and not self.settings.ignore_eos:
                found.ended = "the model ended its text"
                return
            sequence.append(step.chosen)

    def _take(self, path: AttentionPath) -> None:
        for one in self._runners.values():
            one.path = path

    @property
    def _reference_of(self) -> dict[str, str]:
        return {arm.name: arm.reference for arm in self.arms if arm.reference is not None}

    def _compare_bits(self, logits: dict[str, torch.Tensor]) -> None:
        for arm in self.arms:
            if arm.reference in logits and arm.name in logits:
                equal = same_bits(logits[arm.name], logits[arm.reference])
                self._logits_equal[arm.name] &= equal

    def _difference(
        self, arm: Arm, i: int, sequence: list[int], step: Step, logits: dict[str, torch.Tensor]
    ) -> Difference:
        theirs = step.arms[arm.name].top1
        tokens = tuple(ShownToken(id=t, text=self.tokenizer.token_text(t)) for t in (step.chosen, theirs))
        found = difference_at(
            arm.name,
            (tokens[0], tokens[1]),
            logits,
            step=i,
            n_kv=step.n_kv,
            before=self.tokenizer.decode(sequence),
        )
        measure_floor(found, self.stepper, sequence, seed=self.settings.seed)
        return found

    def _alone(self, arm: Arm, token: int, i: int) -> list[int]:
        """What the candidate writes from here on by itself, `token` first."""
        assert arm.kernel is not None
        written = [token]
        branch = self.stepper.branch(ArmRunner(replace(arm, reference=None), {}), after=arm.name)
        while len(written) < self.settings.n_predict - i:
            if written[-1] == self.tokenizer.eos_id and not self.settings.ignore_eos:
                break
            logits = branch.step(torch.tensor(written[-1:]), scored=1).get(arm.name)
            if logits is None:
                break
            written.append(int(logits[0].argmax()))
        return written


def _step(n_kv: int, token: int, logits: dict[str, torch.Tensor], reference_of: dict[str, str]) -> Step:
    """The scores of every arm; logits [vocabulary] each, float32. Divergences in float64."""
    logs = {name: log_probabilities(x) for name, x in logits.items()}
    first, second = logits["baseline"].topk(2).indices.tolist()

    def kld(of: str, to: str | None) -> float:
        if to not in logs:
            return float("nan")
        return float(divergence(logs[to], logs[of]))

    arms = {}
    for name, x in logits.items():
        top = x.topk(2)
        arms[name] = ArmStep(
            nll=-float(logs[name][first]),
            kld_to_exact=kld(name, "exact"),
            kld_to_baseline=kld(name, reference_of.get(name)),
            top1=int(top.indices[0]),
            top1_margin=float(top.values[0] - top.values[1]),
            target_logit=float(x[first]),
            margin=float(x[first]) - float(x[second]),
            finite=bool(np.isfinite(float(x.sum()))),
        )
    return Step(n_kv, token, first, arms)
