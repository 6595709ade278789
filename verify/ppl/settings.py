"""Settings of `verify ppl`: what the command line says, as one record that a run folder can hold."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from verify.arms.records import OWN
from verify.arms.sample import default_measured
from verify.data.corpora import DEFAULT_CORPUS
from verify.data.windows import SMALLEST_N_CTX
from verify.judge.verdict import DEFAULT_MARGIN, check_margin
from verify.kernels.cache_types import parse_cache, run_cache
from verify.kernels.errors import SpecError
from verify.kernels.plans.asked import MOST_SEVERAL
from verify.kernels.plans.spec import parse_spec, with_options
from verify.machine.errors import UsageError

if TYPE_CHECKING:
    # The command line is built from this module: commands that need no torch do not load it.
    from verify.kernels.call import AttentionPath
    from verify.kernels.formed import CallForm

DEFAULT_BASELINE = "flash"
DEFAULT_N_Q = 4
DEFAULT_CANDIDATE = "flash:heads=split,kv=4"
DEFAULT_CHECKPOINT_MINUTES = 10.0


@dataclass(frozen=True)
class PplSettings:
    """What the command line of `verify ppl` says."""

    model: str | None = None  # file, or None for the one that is installed
    file: str | None = None  # text, or None for the corpus
    corpus: str = DEFAULT_CORPUS  # name of a text
    n_ctx: int = 512  # tokens a window
    chunks: int = 4  # windows, -1 for all
    path: str = "decode"  # decode, several, prefill or both (decode and prefill)
    # Specification, or OWN: each candidate's own kernel, in plain calls with one query token.
    baseline: str = DEFAULT_BASELINE
    candidates: tuple[str, ...] = (DEFAULT_CANDIDATE,)  # specifications
    # That of each candidate, once it is known what each returns (`out=match`).
    baselines: tuple[str, ...] = ()
    cache_type: str = "f16"  # type that q, k and v are rounded to, or the cache that all arms have
    device: str = "cpu"  # of torch
    # Bytes that hidden states of one group may take, None for a share of what is free.
    memory: int | None = None
    min_coverage: float = 0.0  # share of scored tokens that must take the changed plan
    margin: float = DEFAULT_MARGIN  # distance ratio that still is round-off
    allow_same: bool = False  # a candidate may be its baseline's specification
    seed: int = 0  # of sampled rows, the floor's noise and noise arms' plans
    capture: str | None = None  # layers whose q, k, v are kept
    compute: str = "f32"  # type of everything but attention
    save_logits: str | None = None  # file for exact's logits
    against: tuple[str, ...] = ()  # engines' logits files
    noise: int = 0  # noise arms a path
    power: bool = False  # whether faults are planted
    headroom: bool = False  # whether it is told how near float16 sums are to overflow
    score_last: int | None = None  # positions scored at the end of a window, None for the second half
    measured_windows: int | None = None  # see `verify.arms.sample`; None for its default, 0 for all
    checkpoint_minutes: float = DEFAULT_CHECKPOINT_MINUTES  # between two checkpoints of a group
    split_mode: str = "layer"  # of the engine that is reproduced, whatever devices this run has
    gpus: int = 1  # of the engine that is reproduced
    n_q: int = 1  # query tokens a call, on the path several
    pages: int = 0  # keys a page of the pool that keys and values lie in; 0: none
    sequences: int = 1  # windows in a call, each at another place
    oracle: str = "float64"  # how exact attention multiplies: a name of `verify.kernels.oracle_products`

    def __post_init__(self) -> None:
        from verify.arms.split_mode import check_split_mode
        from verify.kernels.call import PATHS
        from verify.kernels.oracle_products import AUTO, PRODUCTS
        from verify.model.runner import COMPUTE_TYPES

        if self.oracle not in PRODUCTS:
            raise UsageError(f"--oracle {self.oracle}: expected one of {', '.join((AUTO, *PRODUCTS))}")
        if self.path not in (*PATHS, "both"):
            raise UsageError(f"--path {self.path}: expected decode, several, prefill or both")
        self._check_form()
        try:
            run_cache(self.cache_type)
        except SpecError as error:
            raise UsageError(f"--cache-type: {error}") from None
        if not 0 <= self.min_coverage <= 1:
            raise UsageError(f"--min-coverage {self.min_coverage:g}: expected a share from 0 to 1")
        check_margin(self.margin)
        # Before a model or a text is fetched; of what a text holds more is asked when it is there.
        if self.n_ctx < SMALLEST_N_CTX:
            raise UsageError(f"-c {self.n_ctx}: expected at least {SMALLEST_N_CTX} tokens a window")
        if self.chunks == 0 or self.chunks < -1:
            raise UsageError(f"--chunks {self.chunks}: expected windows from 1, or -1 for all")
        if self.noise == 1 or self.noise < 0:
            raise UsageError(f"--noise {self.noise}: expected 0 (none) or at least 2 arms")
        if self.score_last is not None and not 1 <= self.score_last < self.n_ctx:
            raise UsageError(
                f"--score-last {self.score_last}: expected 1 to {self.n_ctx - 1} positions of windows of"
                f" {self.n_ctx} tokens"
            )
        if self.score_last is not None and (self.save_logits or self.against):
            raise UsageError(
                "--score-last: a logits file holds the second half of every window, expected no --save-logits"
                " or --against beside it"
            )
        if self.measured_windows is not None and self.measured_windows < 0:
            raise UsageError(
                f"--measured-windows {self.measured_windows}: expected a number of windows, or 0 for all"
            )
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise UsageError(
                f"--checkpoint-minutes {self.checkpoint_minutes:g}: expected 0 (after every layer) or more"
            )
        if self.compute not in COMPUTE_TYPES:
            raise UsageError(f"--compute {self.compute}: expected one of {', '.join(COMPUTE_TYPES)}")
        check_split_mode(self.split_mode, self.gpus)
        if not self.candidates:
            raise UsageError("--candidate: expected at least one")

    def _check_form(self) -> None:
        """Raises UsageError where there are no such calls."""
        if self.path == "several":
            if not 2 <= self.n_q <= MOST_SEVERAL:
                raise UsageError(
                    f"--n-q {self.n_q}: expected 2 to {MOST_SEVERAL} query tokens a call with --path several"
                )
        elif self.n_q != 1:
            raise UsageError(f"--n-q {self.n_q}: expected --path several beside it")
        if self.pages < 0:
            raise UsageError(f"--pages {self.pages}: expected keys a page from 1, or 0 for none")
        if self.sequences < 1:
            raise UsageError(f"--sequences {self.sequences}: expected at least 1")
        if self.sequences > 1 and self.chunks > 0 and self.chunks < self.sequences:
            raise UsageError(
                f"--sequences {self.sequences}: expected as many windows at least, --chunks is {self.chunks}"
            )
        if self.baseline == OWN and self.form.is_plain:
            raise UsageError(
                f"--baseline {OWN}: is the candidate's own kernel in plain calls, expected --path several,"
                " --pages or --sequences beside it"
            )

    @property
    def form(self) -> CallForm:
        """Of the calls that the candidates are asked, and the baseline unless it is their own kernel."""
        from verify.kernels.formed import CallForm

        return CallForm(n_q=self.n_q, page=self.pages, sequences=self.sequences)

    @property
    def paths(self) -> tuple[AttentionPath, ...]:
        from verify.kernels.call import PATHS, RUN_PATHS

        return RUN_PATHS if self.path == "both" else tuple(p for p in PATHS if p == self.path)

    @property
    def measured(self) -> int:
        """Windows on which kernels are measured, 0 for all."""

        return default_measured(self.n_ctx) if self.measured_windows is None else self.measured_windows

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> PplSettings:
        """Raises UsageError that names the field where they are not those of a run."""
        kinds = get_type_hints(cls)
        given: dict[str, Any] = {}
        for name in (f.name for f in fields(cls) if f.name in stored):
            value = stored[name]
            if kinds[name] == tuple[str, ...]:
                if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
                    raise UsageError(f"{name}: expected a list of texts, got {value!r}")
                given[name] = tuple(value)
                continue
            kind = kinds[name] | int if kinds[name] is float else kinds[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                called = getattr(kinds[name], "__name__", None) or str(kinds[name])
                raise UsageError(f"{name}: expected {called}, got {value!r}")
            given[name] = value
        if "candidates" not in given:
            raise UsageError("candidates: expected a list of texts, got none")
        return cls(**given)


def with_caches(baseline: str, caches: str) -> tuple[str, ...]:
    """The baseline's kernel over each of some caches, comma between; f16, as given, is the baseline itself.

    Raises UsageError, SpecError.
    """

    if "cache" in parse_spec(baseline).options:
        raise UsageError(f"--caches: expected a baseline without a cache of its own, got {baseline}")
    texts = [text.strip() for text in caches.split(",")]
    parsed = [parse_cache(text) for text in texts]
    chosen = [cache for cache in dict.fromkeys(parsed) if not cache.as_given]
    if not chosen:
        raise UsageError(f"--caches {caches}: expected at least one cache beside f16")
    return tuple(with_options(baseline, {"cache": str(cache)}) for cache in chosen)


def one_cache_type(both: str, k: str | None, v: str | None) -> str:
    """The cache of all arms, K/V where `-ctk` and `-ctv` differ. Raises UsageError."""
    chosen = k or both, v or both
    if k or v:
        for name, kind in zip(("-ctk", "-ctv"), chosen, strict=True):
            if not kind.replace("_", "").isalnum():
                raise UsageError(
                    f"{name} {kind}: expected one type; rotation and layers go into --cache-type"
                )
    return chosen[0] if chosen[0] == chosen[1] else "/".join(chosen)


# A plain number below it is one whose unit was left out: 8 bytes hold no window.
LEAST_BYTES = 1 << 20


def parse_size(text: str) -> int:
    """`8G`, `512M`, `2048K` or plain bytes. Raises UsageError."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number, unit = (text[:-1], text[-1].upper()) if text and text[-1].upper() in units else (text, "")
    try:
        size = float(number) * units.get(unit, 1)
    except ValueError:
        size = 0
    if not 1 <= size < math.inf:
        raise UsageError(f"--memory {text}: expected a size such as 8G or 512M")
    if not unit and size < LEAST_BYTES:
        raise UsageError(f"--memory {text}: expected a unit, such as {text}G; these would be bytes")
    return int(size)
