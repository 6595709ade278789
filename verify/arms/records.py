"""What runs of `verify ppl` and `verify gen` both say of themselves in `run.json`: records, saved by field.

`docs/run-json.md` says what each key means to a reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from verify.judge.verdict import Verdict
from verify.machine.errors import UsageError

if TYPE_CHECKING:
    # Reports of stored runs are made from this module, and need no torch.
    from verify.arms.arm import Arm
    from verify.kernels.trace import LaunchTrace

# In the place of a baseline: each candidate's own kernel, asked plain calls with one query token.
OWN = "own"
# Of run.json and settings.json. 3: settings.json has it too, and arms say whether they kept all bits.
SCHEMA = 3
NOT_KNOWN = float("nan")


def check_schema(stored: Mapping[str, Any], where: str) -> None:
    """Raises UsageError where a run.json is of a later schema than this program knows."""
    found = stored.get("schema", 1)
    if not isinstance(found, int) or found > SCHEMA:
        raise UsageError(f"{where}: schema {found}, expected at most {SCHEMA}: a later verify wrote it")


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The model that a run was about."""

    path: str  # as it was found, the first file of several
    name: str | None  # as the file names itself
    architecture: str  # of its metadata
    bytes: int  # of all its files
    fingerprint: str  # hash of sizes, beginnings and ends of its files
    layers: int  # of blocks
    heads: int  # query heads of a layer
    kv_heads: int  # of a layer
    ratio: int  # query heads a KV head
    head_size: int  # of keys
    context: int  # tokens that it was trained on at once


@dataclass(frozen=True, kw_only=True)
class TensorParallelRecord:
    """How the layers are shared out among the GPUs of the engine that is reproduced."""

    gpus: int
    kv_heads_by_gpu: list[int]  # in the first layer


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What every run with a model says first."""

    schema: int  # `SCHEMA` when it was written
    command: str  # `ppl` or `gen`
    verdict: str  # or `void`, where nothing was measured
    exit_code: int  # of the verdict
    reasons: list[str]  # for the verdict, sentences
    notes: list[str]  # what a reader of it must know
    settings: dict[str, Any]  # `PplSettings` or `GenSettings`, by field
    environment: dict[str, Any]  # what it ran on
    model: ModelRecord  # what it was about
    tensor_parallel: TensorParallelRecord | None = None  # None: one GPU is reproduced


@dataclass(frozen=True, kw_only=True)
class ArmOfRun:
    """What every arm says first."""

    name: str  # unique in the run
    role: str  # see `verify.arms.arm`
    spec: str  # of its kernel, or the file of an engine


@dataclass(frozen=True, kw_only=True)
class PairOfRun:
    """What every candidate beside its baseline says first."""

    reference: str  # name of the baseline's arm
    candidate: str  # name of the candidate's
    path: str  # decode, several or prefill
    verdict: Verdict  # on this candidate
    reasons: list[str]  # for it, sentences


@dataclass(frozen=True, kw_only=True)
class CoverageRecord:
    """Attention rows of one kind that an arm's kernel launched."""

    arm: str  # its name
    spec: str  # of its kernel
    path: str  # decode, several or prefill
    kernel: str  # with its numerical options
    binary: str  # hash of the code that ran, empty where there is none
    launch: str  # `one`, or `each` head group
    tokens_a_call: int | None = None  # query tokens (T); 0: rows are computed as if alone; None: not said
    page: int = 0  # keys a page, where a model's keys lay in pages; 0: side by side
    sequences: int = 1  # of a call
    head_groups: list[int]  # query heads that each program handled; empty where it cannot say
    parts: int  # of the KV range; 0 where it cannot say
    kv_cuts: list[int]  # bounds of the parts, of the longest row
    rows: int  # tokens times layers
    n_kv_min: int  # of all these rows
    n_kv_max: int  # of all these rows


def coverage_records(arms: Iterable[Arm], traces: Mapping[str, LaunchTrace]) -> list[CoverageRecord]:
    """What every arm launched, by its name in `traces`."""
    return [
        CoverageRecord(arm=arm.name, spec=arm.spec, **line.to_json())
        for arm in arms
        if arm.name in traces
        for line in traces[arm.name].coverage()
    ]


@dataclass(frozen=True, kw_only=True)
class SeenLayers:
    """What some layers were seen to hold."""

    first: int  # layer, counted from 0
    last: int  # layer
    cache: str  # what they are said to hold
    k: str | None  # what K reads as; None: the kernel returns no lse, so that keys cannot be read
    v: str  # what V reads as
    distinct_k: int | None  # most different numbers in a block of stored K
    distinct_v: int  # the same of V
    codes_k: int  # how many a block can have at most; 0: as many as it has numbers
    codes_v: int  # the same of V


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """A kernel's own error in one layer."""

    layer: int
    max_budget_ratio: float
    relative_rms: float
    rms_ratio: float = NOT_KNOWN
    gain: float = NOT_KNOWN


@dataclass(frozen=True, kw_only=True)
class InPlaceRecord:
    """A kernel's own error on the exact arm's q, k and v, over all layers, heads and windows."""

    arm: str  # its name
    checks: int  # of a layer, head and window
    max_budget_ratio: float  # largest |error| / budget
    vacuous: float  # share of rows whose budget says nothing
    relative_rms: float  # ||error|| / ||exact||
    rms_ratio: float = NOT_KNOWN  # error over its expected size
    gain_mean: float = NOT_KNOWN  # a common factor is 1 + gain
    gain_se: float = NOT_KNOWN  # its standard error
    gain_z: float = NOT_KNOWN  # gain_mean / gain_se
    gain_limit: float = NOT_KNOWN  # what rounding alone does not exceed
    lse_budget_ratio: float | None = None  # largest |lse error| / bound; None: it returns no lse
    layers: list[LayerErrors] = field(default_factory=list)  # one a layer
