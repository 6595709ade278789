"""A run of `verify gen` as `run.json` holds it: one record, which screen, reports and file all take.

Fields are the keys of the file, in its order; `docs/generation.md` has the same list for readers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from verify.arms.records import NOT_KNOWN, ArmOfRun, CoverageRecord, PairOfRun, RunRecord
from verify.ppl.record import PathAloneRecord

DISTANCE_KIND = "attention output, on the exact arm's q, k, v"


@dataclass(frozen=True, kw_only=True)
class PromptRecord:
    """What was to be gone on with."""

    text: str
    tokens: int
    last: str  # the text of its last token


@dataclass(frozen=True, kw_only=True)
class GenArmRecord(ArmOfRun):
    """One arm over all steps."""

    calls: str = ""  # what its kernel's calls are beside plain ones, in words
    tokens: int  # steps that it ran
    text: str | None  # what it wrote; None for arms that write nothing
    kld_to_exact_mean: float  # nats a token
    agrees_with_baseline: int  # steps at which its most likely token is the baseline's
    failure: str | None  # what its kernel failed with


@dataclass(frozen=True, kw_only=True)
class ShownToken:
    """A token, and how it is shown."""

    id: int
    text: str


@dataclass(frozen=True, kw_only=True)
class FirstDifference:
    """The first step at which a candidate's most likely token is not the baseline's."""

    candidate: str  # name of its arm
    step: int  # counted from 0
    n_kv: int  # keys that it sees
    before: str  # the text so far
    baseline_token: ShownToken  # that was written
    candidate_token: ShownToken  # that the candidate prefers
    logits: dict[str, tuple[float, float]]  # by arm: of the baseline's token, and of the candidate's
    probabilities: dict[str, tuple[float, float]]  # of the same two
    floor: float | None  # rms of how far one rounding of noise moves exact's margin; None: not measured
    draws: int  # that this is the rms of
    margins: dict[str, float]  # by arm: nats between the two tokens
    margin: float  # the baseline's
    moved: float  # how far the candidate moves that
    sentences: list[str]  # what a user needs to know about it


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """A step at which the candidate prefers another token than the baseline's."""

    step: int  # counted from 0
    baseline_token: str  # its text
    candidate_token: str  # its text
    margin: float  # nats between the baseline's two most likely tokens
    moved: float = NOT_KNOWN  # nats by which the candidate moves the two tokens apart
    floor: float = NOT_KNOWN  # the same of one rounding of noise there, by the floor arm's divergence
    tie: bool | None = None  # whether rounding alone explains it; None: not known


@dataclass(frozen=True, kw_only=True)
class ClosestStep:
    """The step at which the baseline's two most likely tokens were closest."""

    step: int
    token: str  # the baseline's
    margin: float  # nats


@dataclass(frozen=True, kw_only=True)
class GenPairRecord(PairOfRun):
    """One candidate against the baseline: the verdict, and what it rests on."""

    distance_ratio: float | None  # of the kernels' own errors; None where too little is known
    distance_ratio_ci: tuple[float, float] | None  # 99.9 %
    distance_kind: str = DISTANCE_KIND  # what the ratio is of
    distance_scope: str | None  # what the interval speaks about
    detectable_distance_ratio: float | None  # told from 1 with 90 % probability
    kld_mean: float  # nats a token to the baseline
    kld_max: float  # the largest of a step
    tokens: int  # steps that it ran
    bitwise_equal: bool  # attention outputs and logits
    coverage: float  # share of the steps whose plan or kernel differed
    judged_calls: int | None = None  # calls, with drafts of several tokens, that were held against exact
    judged_least: int | None = None  # fewest of them in a layer
    first_difference: FirstDifference | None  # None: the same text
    disagreements: list[Disagreement]  # every step that differs
    margin_moved_rms: float  # nats, over all steps, by the candidate
    margin_moved_rms_floor: float  # the same by one rounding of noise
    closest: ClosestStep | None  # None where nothing was written


@dataclass(frozen=True, kw_only=True)
class GenSpeed:
    """Where the time went."""

    seconds: dict[str, float]  # by kind of work
    weights_resident: bool  # whether they stay decoded in memory


@dataclass(frozen=True, kw_only=True)
class GenRun(RunRecord):
    """One whole run."""

    prompt: PromptRecord  # what was gone on with
    arms: list[GenArmRecord]  # every one
    pairs: list[GenPairRecord]  # one a candidate
    path_alone: list[PathAloneRecord] = field(default_factory=list)  # with drafts: what they change
    coverage: list[CoverageRecord]  # what every kernel launched
    detectable: dict[str, float | None] = field(default_factory=dict)  # candidate -> distance ratio
    speed: GenSpeed | None = None  # where the time went
