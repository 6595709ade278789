"""No law is vacuous and no fault passes: each law fails on a fault, each fault fails a law or a probe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from support.subjects import assert_keeps, cache_subject, plan_subject, tile_subject
from verify.kernels.cache_types import LAW_CACHES
from verify.kernels.faults import CACHE_FAULTS, FAULTS, PLAN_FAULTS, VARIANTS, CacheFault
from verify.kernels.faults.caches import OverCache
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes import check, standard_probes
from verify.laws import LAWS, Law, Subject
from verify.laws.run import LawResult, run_law

BY_NAME = {fault.name: fault for fault in FAULTS}
CACHES_BY_NAME = {fault.name: fault for fault in CACHE_FAULTS}
PLANS_BY_NAME = {fault.name: fault for fault in PLAN_FAULTS}
# A fault that each law sees.
SEEN_BY = {
    "merge-exact": "mean of parts",
    "merge-commutes": "last part lost",
    "merge-associates": "mean of parts",
    "merge-tree": "last part lost",
    "merge-identity": "mean of parts",
    "merge-nothing": "no common maximum",
    "merge-shift": "base-2 merge",
    "merge-far-apart": "no common maximum",
    "parts-merge": "base-2 lse",
    "parts-every-cut": "last key dropped",
    "parts-far-apart": "last key dropped",
    "lse-exact": "base-2 lse",
    "within-budget": "wrong by 2 %",
    "first-call": "wrong by 2 %",
    "large-values": "f16 overflow",
    "head-groups": "group does not divide",
    "kv-parts": "cut key twice",
    "groups-and-parts": "cut key lost",
    "tile-sizes": "partial tile dropped",
    "plan-runs": "never ran",
    "values-scaled": "wrong cache type",
    "heads-permuted": "last columns",
    "keys-permuted": "last key dropped",
    "logits-shifted": "padding seen",
    "masked-keys": "key beyond",
    "both-paths": "prefill key dropped",
    "row-alone": "part of other batch",
    "other-sequences": "part of other batch",
    "two-runs": "race",
    "other-lengths": "first call's lengths",
    "strides": "strides ignored",
    "empty-rows": "empty row NaN",
    "any-form": "last page's rest seen",
    "pages-permuted": "neighbour's page",
    "page-size": "neighbour's page",
    "far-pages": "page number wraps",
    "shared-prefix": "neighbour's page",
    "table-tails": "table's tail read",
    "unnamed-pages": "neighbour's page",
    "last-page": "last page's rest seen",
    "other-pages": "neighbour's page",
    "no-keys": "zero-length chunk",
    "sequence-alone": "zero-length chunk",
    "several-rows": "four query tokens",
    "tree": "tree mask one level short",
    "mask-of-lengths": "last key dropped",
    "list-of-all": "hole of a list read",
    "list-order": "hole of a list read",
    "list-recall": "last key dropped",
    "v-in-k": "other end of K",
    "caches": "expanded twice",
    "sliding-window": "window off by one",
    "softcap": "softcap dropped",
    "sinks": "sink in every part",
    "alibi": "ALiBi dropped",
    "rotation": "rotation not undone",
    "cache-range": "fp8 wraps",
    "cache-layers": "cache of the next layer",
    "cache-read-back": "codec did not run",
    "groups-sum": "remainder lost",
    "cuts-partition": "tail lost",
    "policy-thresholds": "gate too narrow",
}
# Of the other faults, the law that sees each; the rest is seen by a probe.
SEES = {
    "fix-up columns": "kv-parts",
    "weights in 16 bits": "merge-exact",
    "lse in another order": "parts-every-cut",
    "first row's length": "row-alone",
    "empty part NaN": "sliding-window",
    "empty part finite": "sliding-window",
    "empty row +inf": "empty-rows",
    "lone key dropped": "tile-sizes",
    "tile read twice": "within-budget",
    "window dropped": "sliding-window",
    "heads interleaved": "within-budget",
    "second group's query": "within-budget",
    "second group's sinks": "sinks",
    "accumulator not rescaled": "within-budget",
    "denominator not rescaled": "within-budget",
    "sinks dropped": "sinks",
    "f16 logits": "within-budget",
    "softmax scale": "within-budget",
    "other head size": "within-budget",
    "page offset wraps": "far-pages",
    "first token's sink only": "several-rows",
    "heads packed as of one token": "several-rows",
    "window by cells": "row-alone",
    "first sequence's lengths": "row-alone",
    "third sequence": "row-alone",
    "many entries": "row-alone",
    "scale of all rows": "other-sequences",
    "cuts inside tiles": "cuts-partition",
}
BY_PROBE = {"wrong by 2e-4", "undeclared f16", "offset wraps", "late maximum"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def subject_of_fault(name: str) -> Subject:
    if name in CACHES_BY_NAME:
        # The law of rotation asks for a cache that holds numbers as they are.
        cache = CACHES_BY_NAME[name].cache
        return cache_subject(CACHES_BY_NAME[name].kind, "f16+rotate=64" if "rotate" in cache else cache)
    if name in PLANS_BY_NAME:
        return plan_subject(PLANS_BY_NAME[name])
    return tile_subject(BY_NAME[name].build)


def subject_with_cache_of(name: str) -> Subject:
    """A right kernel which is this fault where it reads a quantised cache."""
    right = tile_subject(lambda: TileKernel("tile"))
    return replace(right, spec=name, variant=subject_of_fault(name).variant)


def broken(law: str, fault: str) -> LawResult:
    """The law on the fault, up to the first case that breaks it; not shrunk, which takes longer."""
    subject = (subject_with_cache_of if law == "caches" else subject_of_fault)(fault)
    return run_law(LAWS[law], subject, examples=200, shrink=False)


def test_every_law_and_every_fault_is_spoken_for() -> None:
    assert SEEN_BY.keys() == LAWS.keys()
    known = {f.name for f in FAULTS if f.needs != "cuda"} | PLANS_BY_NAME.keys() | CACHES_BY_NAME.keys()
    assert set(SEEN_BY.values()) | SEES.keys() | BY_PROBE | CACHES_BY_NAME.keys() == known


@pytest.mark.parametrize(("law", "fault"), SEEN_BY.items())
def test_each_law_fails_on_a_fault(law: str, fault: str) -> None:
    assert broken(law, fault).state == "broken"


@pytest.mark.parametrize(("fault", "law"), SEES.items())
def test_each_other_fault_fails_a_law(fault: str, law: str) -> None:
    assert broken(law, fault).state == "broken"


@pytest.mark.parametrize("fault", sorted(BY_PROBE))
def test_what_no_law_sees_a_probe_does(fault: str) -> None:
    sizes = InputSizes(n_kv=(257, 200, 64, 1, 0), batch=2)
    kernel = BY_NAME[fault].build()
    assert any(check(probe, kernel, most=1) for probe in standard_probes(sizes))


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_the_kernel_that_the_faults_are_made_of_keeps(law: Law) -> None:
    if law.group != "plans":
        result = run_law(law, tile_subject(lambda: TileKernel("tile")), examples=5)
        assert result.state != "broken", f"{result.reason}: {result.case}"


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_clean_variants_keep_every_law(variant: object) -> None:
    if not isinstance(variant.build(), TileKernel):  # type: ignore[attr-defined]
        pytest.skip("eager's laws are tested by themselves")
    for law in LAWS.values():
        if law.name == "large-values" and "near-overflow" in variant.without:  # type: ignore[attr-defined]
            continue
        result = run_law(law, tile_subject(variant.build), examples=40)  # type: ignore[attr-defined]
        assert result.state != "broken", f"{law.name}: {result.reason}: {result.case}"


# What cannot be read back from one key alone.
BY_RESULT = {"scale of the next key": "caches", "fp8 wraps": "cache-range"}


@pytest.mark.parametrize("fault", CACHE_FAULTS, ids=lambda fault: fault.name)
def test_every_fault_of_caches_is_read_back_or_out_of_its_budget(fault: CacheFault) -> None:
    """By what is held, and by the error beside what should be."""
    subject = cache_subject(fault.kind, fault.cache)
    results = "cache-layers" if "@" in fault.cache else BY_RESULT.get(fault.name, "caches")
    for name in (results, *(() if fault.name in BY_RESULT else ("cache-read-back",))):
        result = run_law(LAWS[name], subject, examples=20, shrink=False)
        assert result.state == "broken" and "raised" not in result.reason, name


@pytest.mark.parametrize("cache", [*LAW_CACHES, "q8_0@1-1:q4_0"])
def test_no_right_cache_is_called_broken(cache: str) -> None:
    subject = cache_subject(OverCache, cache)
    for law in LAWS.values():
        if law.group == "cache":
            assert_keeps(law, subject, examples=2)
