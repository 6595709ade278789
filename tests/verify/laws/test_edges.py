"""What laws are tried on that is not left to chance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from support import hidden_faults
from support.subjects import function_subject
from verify.kernels.judging.families import FAMILIES
from verify.laws import LAWS, subject_of
from verify.laws import run as running
from verify.laws.cases import Case, Problem
from verify.laws.draws import KINDS_OF_CALLS, RATIOS, SIZES, edges
from verify.laws.law import Law, Subject
from verify.laws.run import run_law

# A fault that shows at an edge of sizes, in a family or in a kind of call; the law that sees it.
SHOWN_BY = {
    "finite_floor": "within-budget",
    "cap_after_mask": "within-budget",
    "capped_sink": "within-budget",
    "first_length": "within-budget",
    "third_sequence": "within-budget",
    "four_of_prefill": "within-budget",
    "few_of_prefill": "within-budget",
    "sixteen_heads": "within-budget",
    "captured_lengths": "other-lengths",
    "sixteens": "within-budget",
    "wide_values": "within-budget",
    "latent_blocks": "within-budget",
    "lengths_of_eight": "within-budget",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "law"), SHOWN_BY.items())
def test_a_fault_at_an_edge_is_seen_by_the_cases_that_every_run_has(name: str, law: str) -> None:
    subject = function_subject(getattr(hidden_faults, name))
    result = run_law(LAWS[law], subject, examples=100, seed=0, shrink=False)
    assert result.state == "broken" and result.examples <= len(edges(subject))


def test_a_right_function_keeps_the_law_that_sees_most_of_them() -> None:
    subject = function_subject(hidden_faults.right)
    result = run_law(LAWS["within-budget"], subject, examples=2 * len(edges(subject)), seed=0)
    assert result.state == "holds", f"{result.reason}: {result.case}"


def cases_of(law: Law, subject: Subject, examples: int) -> list[Case]:
    """The cases that a law is tried on."""
    tried: list[Case] = []
    recorder = law.__class__(**{**vars(law), "check": lambda _, case: tried.append(case) or 0.0})
    run_law(recorder, subject, examples=examples, seed=0)
    return tried


def test_every_family_size_ratio_and_kind_of_call_is_tried() -> None:
    found = [
        case
        for case in cases_of(LAWS["within-budget"], subject_of("eager"), 100)
        if isinstance(case, Problem)
    ]
    assert len(found) == 100
    assert {case.family for case in found} == {*FAMILIES}
    assert {(case.k_size, case.v_size) for case in found} >= {*SIZES}
    assert {case.ratio for case in found} >= {*RATIOS}
    for kind in KINDS_OF_CALLS:
        assert any(all(getattr(case, name) == value for name, value in kind.items()) for case in found), kind


@pytest.mark.parametrize("law", ["keys-permuted", "alibi", "parts-every-cut", "both-paths"])
def test_a_law_keeps_its_own_bounds(law: str) -> None:
    """One row where it is a law of one; no family, path and length that it leaves out."""
    for case in cases_of(LAWS[law], subject_of("eager"), 100):
        assert isinstance(case, Problem)
        if law in ("keys-permuted", "parts-every-cut"):
            assert len(case.n_kv) == 1 and not case.fewer and case.path == "decode"
            assert not {"window", "alibi"} & set(case.family.split("+"))
        if law == "alibi":
            assert max(case.n_kv) <= 200 and case.family in (
                "gaussian",
                "needles",
                "one-sign",
                "peaked",
                "flat",
                "tiny",
            )
        if law == "both-paths":
            assert case.path == "decode"


def test_few_examples_have_few_of_them() -> None:
    assert len(list(running._edges(LAWS["within-budget"], subject_of("eager"), 3, None))) == 3
    assert list(running._edges(LAWS["merge-exact"], subject_of("eager"), 30, None)) == []
