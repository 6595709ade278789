"""Our kernels keep every law. The flash kernel's own are in tests/kernels/test_flash.py and tests/cuda."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from support.subjects import assert_keeps
from verify.kernels.budget.merge_bound import given as exactly
from verify.kernels.budget.merge_bound import merge_bound
from verify.kernels.merge import merge_tree
from verify.laws import LAWS, Law, subject_of
from verify.laws.cases import Parts
from verify.laws.draws import part_lists
from verify.laws.merge_laws import tensors
from verify.laws.tolerance import part_within

EACH_LAW = pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
# What `eager` cannot be asked for.
NOT_EAGER: set[str] = set()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Problems are small here: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@EACH_LAW
def test_eager_keeps(law: Law) -> None:
    subject = subject_of("eager")
    assert (law.not_applicable(subject) is not None) == (law.name in NOT_EAGER)
    # The slow tests ask a thousand cases of each.
    count = {"merge": None, "plans": None, "forms": 3}.get(law.group, 10)
    assert_keeps(law, subject, examples=count)


def test_quantised_caches_keep_theirs() -> None:
    """Where it cannot run, `flash` runs as `eager` over the cache's numbers."""
    assert_keeps(LAWS["caches"], subject_of("flash"), examples=20)


@pytest.mark.parametrize("spec", ["flash:cache=q8_0", "flash:heads=8+4,kv=2", "flash:policy=ik-1183"])
@pytest.mark.parametrize(
    "law", [law for law in LAWS.values() if law.group != "forms"], ids=lambda law: law.name
)
def test_options_of_a_specification_bound_what_is_drawn(law: Law, spec: str) -> None:
    """A cache in blocks has its head sizes, head groups have their ratio; a policy gives way to a plan."""
    assert_keeps(law, subject_of(spec), examples=3)


# Of the laws of forms those that choose head sizes themselves; the others draw them as all laws do.
OF_SIZES = ("v-in-k", "far-pages")


@pytest.mark.parametrize(
    "law",
    [
        pytest.param(law, id=name, marks=() if name in OF_SIZES else pytest.mark.slow)
        for name, law in LAWS.items()
        if law.group == "forms"
    ],
)
def test_forms_keep_to_the_blocks_of_a_cache(law: Law) -> None:
    """Values that lie in keys are whole blocks too: a law that asked for half a block was our error."""
    assert_keeps(law, subject_of("eager:cache=q8_0"), examples=2)


def test_a_kernel_that_answers_in_bfloat16_is_allowed_what_that_loses() -> None:
    subject = subject_of("sdpa:math")
    subject.capabilities = replace(subject.capabilities, dtypes=("bfloat16",))
    for name in ("within-budget", "keys-permuted"):
        assert_keeps(LAWS[name], subject, examples=30)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["eager", "exact", "eager:p=bf16,kv=3,block=16", "eager:p=f32,heads=split,out=f16"]
)
@EACH_LAW
def test_a_thousand_cases(law: Law, spec: str) -> None:
    assert_keeps(law, subject_of(spec), examples=1000)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_merges() -> None:
    """Of every law of merging; all of them within ten minutes."""
    for law in LAWS.values():
        if law.group == "merge":
            assert_keeps(law, subject_of("eager"), examples=10_000)


@given(part_lists(least=1, most=9))
def test_trees_of_two_are_within_the_bound_of_their_merges(case: Parts) -> None:
    """`merge_tree` takes neighbours in pairs; the bound composes in the same way."""
    parts = tensors(case, torch.device("cpu"))
    level = [exactly(part) for part in parts]
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [merge_bound(pair) if len(pair) == 2 else pair[0] for pair in pairs]
    part_within("a tree", merge_tree(parts), level[0])
