"""`--caches`: one table of what caches cost and lose, and the proof that they ran."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.cli import assert_refused
from support.ppl_runs import Tiny, run
from verify.arms.cache_proof import prove_cache
from verify.kernels.cache_types import parse_cache
from verify.kernels.faults import CACHE_FAULTS
from verify.kernels.faults.caches import OverCache
from verify.model.architectures import architecture_of
from verify.model.gguf.file import GGUFFile
from verify.ppl.settings import with_caches

CACHES = "f16,e4m3,nvfp4/e4m3,f16+rotate=16,e4m3@1-1:f16"


def test_one_run_lays_caches_beside_each_other(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(tiny, tmp_path / "run", "--baseline", "eager", "--caches", CACHES)
    assert done.returncode in (0, 1)
    records = {record["cache"]: record for record in report["caches"]}
    assert list(records) == ["e4m3", "nvfp4/e4m3", "f16+rotate=16", "e4m3@1-1:f16"]
    assert [arm["spec"] for arm in report["arms"] if arm["role"] == "candidate"] == [
        f"eager:cache={cache}" for cache in records
    ]
    one = records["e4m3"]
    assert one["bytes_a_token"] * 2 == one["bytes_a_token_given"]
    # What the cache loses is far above what the kernel does, but where it holds what it was given.
    assert one["cache_rms"] > 20 * one["kernel_rms"] > 0
    assert records["f16+rotate=16"]["cache_rms"] < one["cache_rms"] / 20
    assert records["e4m3@1-1:f16"]["cache_rms"] < one["cache_rms"]
    assert records["nvfp4/e4m3"]["cache_rms"] > one["cache_rms"]
    for record in records.values():
        assert record["faults"] == []
    seen = [(x["first"], x["last"], x["k"], x["v"]) for x in records["nvfp4/e4m3"]["layers"]]
    last = max(x["last"] for x in one["layers"])
    assert seen == [(0, last, "nvfp4", "e4m3")]
    held = records["nvfp4/e4m3"]["layers"][0]
    assert held["codes_k"] == 15 and 2 < held["distinct_k"] <= 15
    by_layer = [(x["first"], x["last"], x["v"]) for x in records["e4m3@1-1:f16"]["layers"]]
    assert (1, 1, "what was given (f16)") in by_layer and by_layer[0][2] == "e4m3"
    for text in (done.stdout, (tmp_path / "run" / "report.md").read_text()):
        assert "bytes a token" in text and "cache alone" in text and "e4m3@1-1:f16" in text


@pytest.mark.parametrize("name", ["codec did not run", "cache of the next layer", "K and V swapped"])
def test_a_cache_that_is_not_what_it_is_said_to_be_is_said(tiny: Tiny, name: str) -> None:
    kind = next(fault.kind for fault in CACHE_FAULTS if fault.name == name)
    cache = parse_cache("e4m3/nvfp4@1-1:nvfp4/e4m3")
    with GGUFFile.open(tiny.model) as file:
        architecture = architecture_of(file)
        right = prove_cache(OverCache("right", cache=cache), architecture, "f16", torch.device("cpu"))
        wrong = prove_cache(kind("wrong", cache=cache), architecture, "f16", torch.device("cpu"))
    assert right.faults == [] and len(right.layers) >= 2
    assert wrong.faults != [] and "was to be kept as" in wrong.faults[0]


def test_what_is_no_list_of_caches_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    for i, (more, said) in enumerate(
        (
            (("--caches", "f16"), "expected at least one cache beside f16"),
            (("--caches", "q9_0"), "unknown type 'q9_0'"),
            (("--caches", "e4m3", "--baseline", "eager:cache=e4m3"), "a baseline without a cache of its own"),
        )
    ):
        done, _ = run(tiny, tmp_path / str(i), *more)
        assert_refused(done, said)
    assert with_caches("eager:kv=2", "f16,q8_0,q8_0") == ("eager:kv=2,cache=q8_0",)
