"""The table of caches of `verify ppl`: what each costs, what it loses, and whose loss that is."""

from __future__ import annotations

from verify.arms.records import SeenLayers
from verify.ppl.record import CacheRecord, PairRecord, PplRun
from verify.reports.templating import figure

# Of ln PPL: two-sided 95 %, a normal deviate.
_WIDE = 1.96
COLUMNS = (
    "cache", "bytes a token", "distance ratio (99.9 %)", "KLD", "ln PPL difference (95 %)", "top-1 changes",
    "cache alone", "kernel alone", "read back",
)  # fmt: skip


def cache_rows(run: PplRun) -> list[tuple[str, ...]]:
    """A row a candidate with a cache of its own, by COLUMNS; nothing where there is none.

    distance ratio: of the candidate's distance to exact (casts frozen) to the baseline's; KLD: nats a token
    to the baseline, free-running; cache alone: exact attention on what the cache holds, relative to exact;
    kernel alone: the kernel's own error on that.
    """
    pairs = {pair.candidate: pair for pair in run.pairs}
    return [_row(record, pairs[record.candidate]) for record in run.caches if record.candidate in pairs]


def _row(record: CacheRecord, pair: PairRecord) -> tuple[str, ...]:
    interval = pair.distance_ratio_ci
    ratio = figure(pair.distance_ratio)
    if interval is not None:
        ratio = f"{ratio} ({interval[0]:.3g} to {interval[1]:.3g})"
    share = record.bytes_a_token / record.bytes_a_token_given
    return (
        record.cache,
        f"{record.bytes_a_token:.0f} ({share:.3g} of f16)",
        ratio,
        figure(pair.kld_mean, "%.2e"),
        f"{pair.dlnppl:+.2e} +/- {_WIDE * pair.dlnppl_se:.1e}",
        f"{pair.top1_changes} of {pair.tokens}",
        figure(record.cache_rms, "%.2e"),
        figure(record.kernel_rms, "%.2e"),
        _read_back(record),
    )


def _read_back(record: CacheRecord) -> str:
    if record.faults:
        return f"not as it is said: {record.faults[0]}"
    return "; ".join(_words(layers) for layers in record.layers) or "not possible"


def _words(seen: SeenLayers) -> str:
    alike = seen.k is None or seen.k == seen.v
    what = seen.v if alike else f"K {seen.k}, V {seen.v}"
    hidden = " (V alone: no lse)" if seen.k is None else ""
    count = ""
    if seen.codes_v:
        count = f", {seen.distinct_v} of {seen.codes_v} numbers a block"
    return f"layers {seen.first}-{seen.last}: {what}{hidden}{count}"
