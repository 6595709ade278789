"""One run of `verify gen`: the prompt once, then a token at a time, the same ones through every arm.

The baseline decides what is written. Every arm is given its tokens, so that each step compares all arms on
the same text; where a candidate first prefers another token, it also goes on alone, to show its own text.
The prompt but for its last token goes through the prefill path; each token after that through decode.

With drafts the baseline writes the whole text first, a token a call. Then all arms are given it some tokens
at a time, as an engine checks a draft that turns out right: candidates in calls of so many, the baseline a
call a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from verify.arms.arm import Arm, ArmRunner, Findings
from verify.arms.building import build_arms, close_kernels, kernel_notes
from verify.arms.learning import learn_arms
from verify.arms.likelihood import divergence, log_probabilities
from verify.arms.model_facts import match_baselines, try_kernels
from verify.arms.records import OWN
from verify.arms.result_type import Match
from verify.arms.split_mode import check_model
from verify.gen.checks import CheckedExact
from verify.gen.difference import Difference, difference_at, measure_floor
from verify.gen.record import ShownToken
from verify.judge.verdict import DEFAULT_MARGIN
from verify.kernels.bits import same_bits
from verify.kernels.formed import ONE_BY_ONE, PLAIN_CALLS, CallForm
from verify.kernels.plans.asked import MOST_SEVERAL
from verify.kernels.trace import LaunchTrace
from verify.machine.devices import chosen_device, free_memory
from verify.machine.errors import UsageError
from verify.model.architectures import architecture_of
from verify.model.architectures.architecture import Architecture
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
    draft: int = 0  # tokens a call of the candidates, the drafted ones and the one before them; 0: no drafts

    def __post_init__(self) -> None:
        if self.n_predict < 1:
            raise UsageError(f"-n {self.n_predict}: expected at least 1 token")
        if self.draft and not 2 <= self.draft <= MOST_SEVERAL:
            raise UsageError(f"--draft {self.draft}: expected 2 to {MOST_SEVERAL} tokens a call")
        if self.draft > self.n_predict:
            raise UsageError(
                f"--draft {self.draft}: expected a text of as many tokens at least, -n is {self.n_predict}"
            )
        if self.baseline == OWN and not self.draft:
            raise UsageError(
                f"--baseline {OWN}: is the candidate's own kernel in calls of one token, expected --draft"
                " beside it"
            )
        if self.baseline == OWN and len(self.candidates) > 1:
            raise UsageError(
                f"--draft {self.draft}: expected one --candidate, whose own kernel writes the text, or a"
                " --baseline for all of them"
            )
        # What both commands take is checked in one place.
        PplSettings(
            candidates=self.candidates,
            cache_type=self.cache_type,
            min_coverage=self.min_coverage,
            margin=self.margin,
            split_mode=self.split_mode,
            gpus=self.gpus,
        )

    @property
    def form(self) -> CallForm:
        """Of the candidates' calls."""
        return CallForm(n_q=self.draft) if self.draft else PLAIN_CALLS

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
    # Nats by which it moves the baseline's token and its own apart, beside the baseline; 0: they are one.
    moved: float = 0.0


class Step(NamedTuple):
    """One step: n_kv keys seen, the token that went in, the baseline's choice, and every live arm."""

    n_kv: int
    token: int
    chosen: int
    arms: dict[str, ArmStep]


@dataclass
class Written:
    """All that the loop found."""

    steps: list[Step] = field(default_factory=list)  # in the order of the text
    text: list[int] = field(default_factory=list)  # tokens, as they were given to all arms
    first: dict[str, Difference] = field(default_factory=dict)  # candidate -> its first
    own_tokens: dict[str, list[int]] = field(default_factory=dict)  # candidate -> what it writes from there
    ended: str | None = None  # why before all tokens were written
    failed_in_prompt: frozenset[str] = frozenset()  # arms
    failed_after: int | None = None  # tokens that the baseline wrote before it failed, where it wrote first


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
        if settings.draft:
            _check_cut(self.architecture, settings.draft)
        self.matches = _match(settings, self.architecture, self.device)
        self.arms = build_arms(
            [match.baseline for match in self.matches],
            settings.candidates,
            paths=("several",) if settings.draft else ("decode",),
            gpus=settings.gpus,
            form=settings.form,
            baseline_form=ONE_BY_ONE if settings.draft else None,
        )
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
            self._runners["exact"],
            self._runners.values(),
            layers=sizes.layers,
            calls=-(-settings.n_predict // max(settings.draft, 1)),
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
        text = None
        if self.settings.draft:
            text = self._write_first(found, wrote)
            if text is None:
                return
        self._read_prompt(self.stepper, list(self._runners.values()))
        found.failed_in_prompt = frozenset(name for name, one in self._runners.items() if one.failed)
        while len(found.text) < (self.settings.n_predict if text is None else len(text)):
            first = len(found.text)
            sequence = [*self.prompt, *found.text]
            block = sequence[-1:]
            if text is not None:
                # Tokens that are left over come first: all later calls are whole.
                block += text[first : first + (len(text) - first - 1) % self.settings.draft]
            self.exact.step, self.exact.number = first, self.exact.number + 1
            # Otherwise the noise would be the same at every step.
            self._runners["floor"].seed = self.settings.seed + 104729 * (first + 1)
            logits = self.stepper.step(torch.tensor(block), scored=len(block))
            if "baseline" not in logits:
                found.ended = "the baseline failed"
                return
            self._compare_bits(logits)
            self.architecture.file.check_unchanged()
            for i, token in enumerate(block):
                of_row = {name: x[i] for name, x in logits.items()}
                step = _step(len(sequence) + i, token, of_row, self._reference_of)
                if self._ends(found, step, of_row, text, wrote):
                    return

    def _ends(
        self,
        found: Written,
        step: Step,
        logits: dict[str, torch.Tensor],
        text: list[int] | None,
        wrote: Callable[[int], None],
    ) -> bool:
        """Take a step in; whether the text ends with it. text: where it is written already."""
        i = len(found.steps)
        found.steps.append(step)
        for arm in self.candidates:
            own = step.arms.get(arm.name)
            if own is not None and own.top1 != step.chosen and arm.name not in found.first:
                sequence = [*self.prompt, *found.text]
                found.first[arm.name] = self._difference(arm, i, sequence, step, logits)
                found.own_tokens[arm.name] = self._alone(arm, own.top1, i, text or [])
        found.text.append(step.chosen if text is None else text[i])
        if text is None:
            wrote(step.chosen)
        if not step.arms["baseline"].finite:
            found.ended = "the baseline's logits are not finite"
        elif self._is_end(found.text[-1]):
            found.ended = "the model ended its text"
        return found.ended is not None

    def _write_first(self, found: Written, wrote: Callable[[int], None]) -> list[int] | None:
        """The baseline's text, a token a call; None where it failed."""
        arm = next(arm for arm in self.arms if arm.role == "baseline")
        writer = ArmRunner(replace(arm, reference=None), {})
        stepper = self.stepper.beside([writer])
        self._read_prompt(stepper, [writer])
        found.failed_in_prompt = frozenset([arm.name] if writer.failed else [])
        text: list[int] = []
        while len(text) < self.settings.n_predict and not (text and self._is_end(text[-1])):
            logits = stepper.step(torch.tensor((self.prompt + text)[-1:]), scored=1).get(arm.name)
            if logits is None:
                found.ended, found.failed_after = "the baseline failed", len(text)
                self._runners[arm.name].findings = writer.findings.of_failure()
                return None
            text.append(int(logits[0].argmax()))
            wrote(text[-1])
            if not bool(torch.isfinite(logits).all()):
                break
        return text

    def _read_prompt(self, stepper: Stepper, runners: Sequence[ArmRunner]) -> None:
        """All of the prompt but its last token; what comes after takes each arm's own path."""
        for one in runners:
            one.path = "prefill"
        if len(self.prompt) > 1:
            stepper.step(torch.tensor(self.prompt[:-1]), scored=0)
        for one in runners:
            one.path = one.arm.path

    def _is_end(self, token: int) -> bool:
        return token == self.tokenizer.eos_id and not self.settings.ignore_eos

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

    def _alone(self, arm: Arm, token: int, i: int, text: Sequence[int]) -> list[int]:
        """What the candidate writes from here on by itself, `token` first.

        With drafts the baseline's text goes on to be the draft, place by place: of each call the tokens are
        taken that it agrees with, and the one after them; the cache is cut back to these.
        """
        assert arm.kernel is not None
        written, room = [token], self.settings.n_predict - i
        before = len(self.prompt) + i
        branch = self.stepper.branch(ArmRunner(replace(arm, reference=None), {}), after=arm.name)
        while len(written) < room and not self._is_end(written[-1]):
            if self.settings.draft:
                branch.cut(before + len(written) - 1)
            after = i + len(written)
            draft = text[after : after + self.settings.draft - 1] if self.settings.draft else []
            logits = branch.step(torch.tensor([written[-1], *draft]), scored=len(draft) + 1).get(arm.name)
            if logits is None:
                break
            for row, drafted in zip(logits, [*draft, None], strict=True):
                written.append(int(row.argmax()))
                if written[-1] != drafted or len(written) == room or self._is_end(written[-1]):
                    break
        return written


def _check_cut(architecture: Architecture, draft: int) -> None:
    """Raises UsageError for a model whose state cannot be cut back to what is taken of a draft."""
    for layer in range(architecture.sizes.layers):
        if not architecture.attends(layer):
            raise UsageError(
                f"--draft {draft}: layer {layer} of {architecture.file.path} is recurrent, its state cannot"
                " be cut back to a token; expected a model whose layers all attend"
            )


def _match(settings: GenSettings, architecture: Architecture, device: torch.device) -> list[Match]:
    """The baseline of each candidate."""
    return match_baselines(
        settings.baseline,
        settings.candidates,
        architecture,
        cache_type=settings.cache_type,
        device=device,
        path="decode",
    )


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
        own = int(top.indices[0])
        arms[name] = ArmStep(
            nll=-float(logs[name][first]),
            kld_to_exact=kld(name, "exact"),
            kld_to_baseline=kld(name, reference_of.get(name)),
            top1=own,
            top1_margin=float(top.values[0] - top.values[1]),
            target_logit=float(x[first]),
            margin=float(x[first]) - float(x[second]),
            finite=bool(np.isfinite(float(x.sum()))),
            moved=abs(float(x[first] - x[own]) - float(logits["baseline"][first] - logits["baseline"][own])),
        )
    return Step(n_kv, token, first, arms)
