from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support.problems import problem
from verify.kernels.cache_types import LAW_CACHES
from verify.kernels.capabilities import ALL_FORMS, FORMS, WORDS, Capabilities
from verify.kernels.registry import build_kernel


def test_a_kernel_says_in_words_what_it_lacks() -> None:
    has_all = replace(Capabilities(), **dict.fromkeys(FORMS, True))
    assert has_all.lacks(*WORDS) is None
    for name, words in WORDS.items():
        assert replace(has_all, **{name: False}).lacks(name) == words
    few = replace(has_all, sinks=False, softcap=False)
    assert few.lacks("lse", "sinks", "softcap") == "has no sinks; has no softcap"


def test_a_call_beyond_a_kernel_is_refused_with_what_it_needs() -> None:
    call = problem(rows=3, sinks=torch.zeros(6), sliding_window=2)
    assert Capabilities().refuses(call) is None
    narrow = Capabilities(sinks=False, ragged=False, paths=("prefill",), k_sizes=(64, 128))
    assert narrow.refuses(call) == (
        "has no sinks; takes one kv_len a call; has no path decode (has prefill);"
        " has no head size 32 (has 64, 128)"
    )


def test_blocks_of_a_cache_bound_the_head_sizes() -> None:
    blocks = Capabilities(size_multiple=64)
    assert blocks.limits() == ["has only head sizes that are multiples of 64"]
    assert blocks.refuses(problem()) == "has no head size 32 (has multiples of 64)"
    assert Capabilities(size_multiple=32).refuses(problem()) is None


@pytest.mark.parametrize("name", ["eager", "flash"])
def test_head_groups_of_their_own_bound_the_ratio(name: str) -> None:
    assert build_kernel(f"{name}:heads=8+4").capabilities().ratios == (12,)
    assert build_kernel(f"{name}:heads=split").capabilities().ratios is None


def test_our_kernels_state_theirs() -> None:
    assert build_kernel("flash:cache=q8_0").capabilities().size_multiple == 32
    assert build_kernel("eager").capabilities() == Capabilities(caches=LAW_CACHES, **ALL_FORMS)
    assert "q8_0" in build_kernel("flash").capabilities().caches
    assert not build_kernel("exact").capabilities().plans
    mine = build_kernel("py:tests/support/user_kernels.py::good").capabilities()
    assert mine.lacks("sinks", "plans") is not None
    assert mine.lacks("ragged", "empty_rows") is None


def test_a_softcap_may_be_had_at_some_head_sizes_alone() -> None:
    some = Capabilities(softcap_sizes=(128, 256))
    assert some.refuses(problem()) is None
    asked = replace(problem(), softcap=30.0)
    assert some.refuses(asked) == "has no softcap at head size 32 (has 128, 256)"
    assert replace(some, softcap_sizes=(32,)).refuses(asked) is None
    assert some.limits() == ["has only a softcap at head sizes 128, 256"]
