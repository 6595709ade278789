"""A run of `verify ppl` as `run.json` holds it: one record, which screen, reports and file all take.

Fields are the keys of the file, in its order; `docs/run-json.md` has the same list for readers. What has a
default may be missing in a file of an earlier schema.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verify.arms.records import (
    NOT_KNOWN,
    ArmOfRun,
    CoverageRecord,
    InPlaceRecord,
    PairOfRun,
    RunRecord,
    SeenLayers,
)
from verify.machine.records import record_from_json
from verify.ppl.headroom_record import HeadroomRecord
from verify.ppl.perplexity import Perplexity

# Ends the name of an arm's pass with frozen casts (`verify.ppl.frozen`).
FROZEN_SUFFIX = "/frozen"


def frozen_name(arm: str) -> str:
    """The name of an arm's pass with frozen casts."""
    return arm + FROZEN_SUFFIX


@dataclass(frozen=True, kw_only=True)
class CorpusRecord:
    """The text, and the windows that it was cut into."""

    name: str  # as it was asked for
    source: str  # where it was read
    bytes: int  # of the text
    sha256: str  # of the text
    notice: str | None  # what a reader must know of it: another text stood in, say
    tokens: int  # of the whole text
    n_ctx: int  # tokens a window
    windows: int  # that were scored
    scored_per_window: int  # positions
    first_scored: int = 0  # position in each window
    measured_windows: int = 0  # on which kernels were measured, and the floor ran


@dataclass(frozen=True, kw_only=True)
class FrozenMeans:
    """An arm's pass with frozen casts, in nats a token."""

    nll_mean: float
    kld_to_exact_mean: float


@dataclass(frozen=True, kw_only=True)
class ArmRecord(ArmOfRun):
    """One arm: what it is, and its free-running pass."""

    path: str  # how rows are computed together: decode, several or prefill
    calls: str = ""  # what its kernel's calls are beside plain ones, in words
    ppl: float  # perplexity
    ppl_se: float  # its error bar
    nll_mean: float  # nats a token
    tokens: int = 0  # scored
    kld_to_exact_mean: float = NOT_KNOWN  # nats a token
    frozen: FrozenMeans | None = None  # None: it has no such pass
    failure: str | None = None  # what its kernel failed with
    bitwise_equal: bool | None = None  # attention and logits had all bits of the reference's; None: has none

    @property
    def perplexity(self) -> Perplexity:
        return Perplexity(self.ppl, self.ppl_se, self.nll_mean, self.tokens)

    @property
    def holds(self) -> bool:
        """Whether a control is its baseline to the bit."""
        return self.role == "control" and self.failure is None and bool(self.bitwise_equal)


@dataclass(frozen=True, kw_only=True)
class FreeRatio:
    """A distance ratio of passes that run freely."""

    distance_ratio: float
    distance_ratio_ci: tuple[float, float]  # 99.9 %


@dataclass(frozen=True, kw_only=True)
class PairRecord(PairOfRun):
    """One candidate against its baseline: what was measured, and the verdict on it."""

    theta: float | None = None  # mean over tokens of ln(KLD / KLD of the reference), frozen casts
    theta_se: float | None = None  # its standard error
    distance_ratio: float | None = None  # exp(theta / 2); None without finite divergences of both
    distance_ratio_ci: tuple[float, float] | None = None  # 99.9 %
    energy_ratio: float | None = None  # of the root mean divergences, which few tokens may hold
    distance_kind: str = "free-running"  # what it is a distance of
    distance_to: str = "reference"  # or `floor`, where the reference is exact to the bit
    distance_scope: str | None = None  # what the interval speaks about
    free: FreeRatio | None = None  # the same, free-running
    frozen_kld: float = NOT_KNOWN  # nats a token to exact, frozen casts
    frozen_kld_reference: float = NOT_KNOWN  # the same of the reference
    cost_nats: float = NOT_KNOWN  # difference of mean nll, frozen casts
    cost_nats_se: float = NOT_KNOWN  # its standard error
    dlnppl: float = NOT_KNOWN  # difference of ln PPL, free-running
    dlnppl_se: float = NOT_KNOWN  # its standard error
    kld_mean: float = NOT_KNOWN  # nats a token to the reference, free-running
    kld_max: float = NOT_KNOWN  # the largest of a token
    top1_changes: int = 0  # tokens whose most likely token changed, free-running
    tokens: int = 0  # compared freely
    measured_tokens: int | None = None  # compared with casts frozen; None: not said, `tokens`
    bitwise_equal: bool = False  # attention outputs of every layer, and logits
    coverage: float = 0.0  # share of scored tokens whose plan or kernel differed
    coverage_rows: float | None = None  # the same of attention rows
    changed_n_kv: tuple[int, int] | None = None  # smallest and largest n_kv at which it did
    detectable_distance_ratio: float | None = None  # told from 1 with 90 % probability
    judged_calls: int | None = None  # calls that were held against exact


@dataclass(frozen=True, kw_only=True)
class LengthRecord:
    """One candidate over a range of context lengths; divergences in nats a token."""

    candidate: str  # name of its arm
    reference: str  # name of its baseline's
    n_kv_min: int  # first length of the range
    n_kv_max: int  # last length of the range
    tokens: int  # scored
    changed: float  # share of them that took the changed plan
    frozen_kld: float  # to exact, frozen casts
    frozen_kld_reference: float  # the same of the reference
    floor_kld: float | None  # free-running; None without a floor
    kld_mean: float  # to the reference, free-running
    dnll: float  # free-running
    dnll_se: float  # its standard error
    cost_nats: float  # frozen casts


@dataclass(frozen=True, kw_only=True)
class FreeLevel:
    """How far an arm that runs freely is from exact, in nats a token."""

    mean: float
    trimmed: float  # the mean without the largest of each window's tokens
    largest: float  # of any token


@dataclass(frozen=True, kw_only=True)
class DriftLayer:
    """How far a pass was from exact when it entered a layer, relative to exact's own size."""

    layer: int
    relative: float
    by_position: list[float]  # one a range of `DriftRecord.edges`


@dataclass(frozen=True, kw_only=True)
class DriftArm:
    """One pass."""

    arm: str
    layers: list[DriftLayer]


@dataclass(frozen=True, kw_only=True)
class DriftRecord:
    """Distances of the residual stream to the exact arm's."""

    edges: list[int] = field(default_factory=list)  # bounds of ranges of positions
    arms: list[DriftArm] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Top1Record:
    """A token whose most likely token changed."""

    candidate: str  # name of its arm
    reference: str  # name of its baseline's
    window: int  # counted from 0
    position: int  # in the window, counted from 0
    n_kv: int  # visible keys
    context: str  # the text before it
    target: str  # the text's next token
    reference_token: str  # that the reference prefers, as text
    candidate_token: str  # that the candidate prefers, as text
    p_reference: tuple[float, float]  # that the reference gives to its own token, and to the candidate's
    p_candidate: tuple[float, float]  # that the candidate gives to the same two
    p_exact: tuple[float, float]  # that exact gives to them
    margin: float  # difference of exact's logits, reference's token - candidate's
    floor: float  # how far rounding alone moves such a difference here
    margin_in_floors: float  # margin / floor


@dataclass(frozen=True, kw_only=True)
class NoiseArm:
    """One noise arm against its baseline."""

    name: str  # of the arm
    spec: str  # the baseline's kernel with another plan
    theta: float | None  # as in `PairRecord`
    distance_ratio: float | None  # exp(theta / 2)
    distance_ratio_ci: tuple[float, float] | None  # 99.9 %
    dlnppl: float  # free-running
    kld_mean: float  # nats a token to the baseline, free-running
    top1_changes: int  # tokens whose most likely token changed
    faults: list[str] = field(default_factory=list)  # sentences


@dataclass(frozen=True, kw_only=True)
class AmongNoise:
    """A candidate's place among the noise arms."""

    candidate: str  # name of its arm
    theta: float  # as in `PairRecord`
    outside: bool  # of theta_limits
    rank: int  # noise arms that are closer to exact
    dlnppl: float  # difference of ln PPL to the baseline
    dlnppl_outside: bool  # of where 99.9 % of the noise arms' lie


@dataclass(frozen=True, kw_only=True)
class NoiseRecord:
    """The noise arms of one baseline; without two that have a theta there are no limits."""

    reference: str  # name of the baseline's arm
    arms: list[NoiseArm]  # one a random plan
    theta_mean: float | None = None  # of the arms
    theta_sd: float | None = None  # their standard deviation
    theta_limits: tuple[float, float] | None = None  # where 99.9 % of such arms lie
    candidates: list[AmongNoise] = field(default_factory=list)  # each candidate's place among them


@dataclass(frozen=True, kw_only=True)
class AloneRegime:
    """Single tokens of one regime of n_kv, or of some heads of it, beside the baseline's."""

    n_kv: int  # the largest that was asked
    heads: str  # which, in words; empty: all
    calls: int  # that these figures are of
    ratio: float  # of rms errors, candidate's over the baseline's
    ratio_ci: tuple[float, float]  # its own limits, 99.9 % each
    word: str  # what it amounts to, see `verify.judge.strata`


@dataclass(frozen=True, kw_only=True)
class AloneRecord:
    """What a kernel that is not computed as if alone did with one query token a call (T = 1, B = 1)."""

    arm: str  # its name
    calls: int  # that were asked
    rows: int  # attention rows (tokens times layers) that it computed in calls of many tokens
    least: int  # fewest calls of a layer and regime of n_kv that is scored
    left_out: int  # calls, of all arms, that were not asked for the time that they take
    n_kv_min: int  # of all that were asked
    n_kv_max: int  # of all that were asked
    other_bits: int  # calls whose row had other bits than in the call of many
    against_many: float  # of rms errors: these over those of the same rows in calls of many
    seconds: float  # that all single tokens of the run took, of all arms
    errors: InPlaceRecord  # against budget and expected size, and their gain
    regimes: list[AloneRegime] = field(default_factory=list)  # beside the baseline, of a candidate


@dataclass(frozen=True, kw_only=True)
class PathAloneRecord:
    """What another form of calls changes by itself: a candidate beside its own kernel in plain calls."""

    candidate: str  # name of its arm
    calls: str  # their form, in words
    n_q: int  # query tokens a call
    page: int  # keys a page; 0: side by side
    sequences: int  # of a call
    tokens: int  # scored in both
    top1_changes: int  # tokens whose most likely token changed
    floor_changes: int  # the same by one rounding of noise, of exact
    floor_tokens: int  # on which that was looked at
    ties: int  # of the changes, those that rounding alone explains
    not_known: int  # those of which it is not known
    bitwise_equal: bool  # attention outputs of every layer, and logits


@dataclass(frozen=True, kw_only=True)
class PlantedRecord:
    """One fault planted in the reference's own output, and which detectors saw it."""

    name: str  # of its pass
    kind: str  # scale, last key, middle key, merge
    size: float | None  # of a scale error
    distance_ratio: float | None  # to the reference's own distance
    distance_ratio_ci: tuple[float, float] | None  # 99.9 %
    frozen_kld: float  # nats a token to exact
    dnll: float  # frozen casts
    dnll_se: float  # its standard error
    max_budget_ratio: float | None  # largest |error| / budget
    rms_ratio: float | None  # error over its expected size
    gain: float | None  # a common factor is 1 + gain
    seen: dict[str, bool]  # by detector


@dataclass(frozen=True, kw_only=True)
class PowerRecord:
    """All planted faults."""

    reference: str
    faults: list[PlantedRecord]
    smallest: dict[str, float | None]  # detector -> smallest scale error that it saw


@dataclass(frozen=True, kw_only=True)
class DetectableRecord:
    """What this run would have seen of one candidate, by detector; None where nothing can be said."""

    distance_ratio: float | None = None
    scale_by_gain: float | None = None  # a scale error, by its gain
    dnll: float | None = None  # nats a token, by the free-running comparison
    scale_by_nll: float | None = None  # the scale error that this takes at least
    logits_file_nats: float | None = None  # what llama-perplexity's 16 bits resolve


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """An engine's logits file beside this run."""

    arm: str  # its name
    path: str  # of the file
    kld: float  # mean to exact, nats a token
    resolution: float  # what the file's 16 bits add to it
    cause: str  # kernel, not the kernel, quantisation or engine, engine, not known
    said: str  # the same as a sentence


@dataclass(frozen=True, kw_only=True)
class SpeedRecord:
    """Where the time went, and what was read."""

    seconds: dict[str, float] = field(default_factory=dict)  # by kind of work, of all processes
    product_flop: float = 0.0  # of the weight products of all passes
    product_flop_per_s: float | None = None  # of a process; None: no product was timed
    anonymous_bytes: int = 0  # the most memory seen, of a process
    group_windows: int = 0  # windows of a group
    stages_ended_at_s: dict[str, float] = field(default_factory=dict)  # since the process began
    groups: int | None = None  # None: not said
    read_bytes: int = 0  # of the model's file
    processes: int = 1  # that ran groups side by side, with one thread each where they are several


@dataclass(frozen=True, kw_only=True)
class CacheRecord:
    """One candidate with a cache of its own: what that costs, what it holds, and which loss is whose."""

    candidate: str  # name of its arm
    cache: str  # as its specification has it
    bytes_a_token: float  # of K and V in all layers
    bytes_a_token_given: float  # the same as float16
    cache_rms: float = NOT_KNOWN  # ||exact on what the cache holds - exact|| / ||exact||, over all layers
    kernel_rms: float = NOT_KNOWN  # ||kernel - exact on what the cache holds|| / ||exact||
    layers: list[SeenLayers] = field(default_factory=list)  # what was read back of it
    faults: list[str] = field(default_factory=list)  # what is not as it is said to be


@dataclass(frozen=True, kw_only=True)
class PplRun(RunRecord):
    """One whole run."""

    engines: list[EngineRecord] = field(default_factory=list)  # with --against
    corpus: CorpusRecord  # its text
    arms: list[ArmRecord]  # every one
    pairs: list[PairRecord]  # one a candidate and path
    coverage: list[CoverageRecord]  # what every kernel launched
    in_place: list[InPlaceRecord]  # each kernel's own error
    caches: list[CacheRecord] = field(default_factory=list)  # of candidates with a cache of their own
    headroom: HeadroomRecord | None = None  # with --headroom
    alone: list[AloneRecord] = field(default_factory=list)  # single tokens, of kernels that were asked them
    # What another form of calls changes by itself, with --baseline own.
    path_alone: list[PathAloneRecord] = field(default_factory=list)
    by_n_kv: list[LengthRecord] = field(default_factory=list)  # divergences by context length
    drift: DriftRecord = DriftRecord()  # distance to exact, layer by layer
    top1_changes: list[Top1Record] = field(default_factory=list)  # the first of them
    noise: list[NoiseRecord] = field(default_factory=list)  # with --noise
    # Arms with a rounding of noise, where a candidate's free-running divergence was held against them.
    free_noise: list[FreeLevel] = field(default_factory=list)
    power: PowerRecord | None = None  # with --power
    detectable: dict[str, DetectableRecord]  # by candidate
    speed: SpeedRecord = SpeedRecord()  # where the time went


def ppl_run_from_json(stored: dict[str, Any], where: str) -> PplRun:
    """The run of a run.json, of this schema or an earlier one.

    where: the file, for messages. Raises UsageError that names file and field.
    """
    if isinstance(detectable := stored.get("detectable"), dict):
        # Schema 1 had the ratio alone.
        detectable = {k: v if isinstance(v, dict) else {"distance_ratio": v} for k, v in detectable.items()}
        stored = {**stored, "detectable": detectable}
    return record_from_json(PplRun, {"schema": 1, **stored}, where)
