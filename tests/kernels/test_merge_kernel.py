"""A merge alone as a candidate: right ones keep the merge laws and the budget, broken ones do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support import merges
from verify.kernels.budget.bound import error_budget
from verify.kernels.errors import KernelFailure, SpecError
from verify.kernels.foreign import merge_kernel
from verify.kernels.foreign.merge_kernel import MergeKernel
from verify.kernels.heads import Heads
from verify.kernels.judging.detectors import SUSPICIONS, findings, measure
from verify.kernels.judging.families import draw
from verify.kernels.judging.figures import budget_ratio
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.kernel import Kernel
from verify.kernels.merge import Part, merge_sequential
from verify.kernels.registry import build_kernel
from verify.laws import LAWS, subject_of
from verify.laws.run import run_law

FILE = Path(__file__).parents[1] / "support/merges.py"
SIZES = InputSizes(n_kv=(257, 130, 3), heads=Heads(6, 2, 32, 32), edges=(64, 128))
RIGHT = ("right", "base2,base=2", "normalised", "careless", "right,dtype=f16", "right,kv=3")
# Wrong ones, and laws of merges that each breaks.
WRONG = {
    "read_as_base_e,base=2": "merge-exact",
    "mean": "merge-exact",
    "second_lost": "merge-commutes",
    "no_common_maximum": "merge-far-apart",
    "lse_of_the_larger": "merge-exact",
    "weights_in_16_bits": "merge-exact",
}


def spec(merge: str) -> str:
    name, _, options = merge.partition(",")
    return f"merge:{FILE}::{name}{',' + options if options else ''}"


class InProcess:
    """The worker of a merge, where starting a process is not what is tested."""

    def __init__(self, spec: str, name: str, servant: str, arguments: dict[str, Any]) -> None:
        self.function = getattr(merges, name)

    def ask(self, question: Any, given: dict[str, torch.Tensor], results: Any, limit_s: float) -> Any:
        out, lse = self.function(given["o_a"], given["lse_a"], given["o_b"], given["lse_b"])
        return {"out": out.float(), "lse": lse.float()}

    def forgive(self) -> None:
        return None

    close = forgive


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_kernel, "WorkerProcess", InProcess)


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    built = build_kernel(spec(request.param))
    yield built
    built.close()


def sure(kernel: Kernel, family: str) -> set[str]:
    """What is found of a kernel's result on a family of inputs."""
    call = draw(family, SIZES, 1)
    result = kernel.run(call)
    found = findings(measure(call, result, kernel.arithmetic_of(call), distinct=True))
    return {finding.detector for finding in found} - SUSPICIONS


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("kernel", RIGHT, indirect=True)
def test_right_merges_are_right(kernel: Kernel) -> None:
    for family in ("gaussian", "gaps", "sinks", "window"):
        call = draw(family, SIZES, 1)
        result = kernel.run(call)
        budget = error_budget(call, kernel.arithmetic_of(call))
        assert float(budget_ratio(result.out - budget.out, budget.bound).max()) <= 1, family
        assert float(budget_ratio(result.lse - budget.lse, budget.lse_bound).max()) <= 1, family
        assert not sure(kernel, family)
        assert {s.kernel.partition("[")[0].partition("@")[0] for _, _, s in result.launched.rows} == {
            f"merge:merges.py::{kernel.spec.partition('::')[2].partition(',')[0]}"
        }
    subject = subject_of(kernel, strict=False)
    careless = "careless" in kernel.spec
    assert subject.capabilities.empty_rows is not careless
    assert any("both its parts are empty" in said for said in subject.said) is careless
    for name, law in LAWS.items():
        if law.group == "merge":
            assert run_law(law, subject, examples=15, seed=0).state == "holds", name


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("merge", WRONG)
def test_wrong_merges_break_laws_and_budgets(merge: str) -> None:
    built = build_kernel(spec(merge) + ",p=f32")
    subject = subject_of(built, strict=False)
    assert run_law(LAWS[WRONG[merge]], subject, examples=60, seed=0).state == "broken"
    # Sums of logits so large that only a merge without a maximum overflows are the law's business.
    if merge != "no_common_maximum":
        assert sure(built, "gaps") | sure(built, "gaussian")
    built.close()


@pytest.mark.usefixtures("in_process")
def test_careless_of_two_empty_parts_is_a_fault_where_that_is_asked_for() -> None:
    built = build_kernel(spec("careless"))
    strict = subject_of(built, strict=True)
    assert run_law(LAWS["merge-nothing"], strict, examples=5, seed=0).state == "broken"
    built.close()


@pytest.mark.usefixtures("in_process")
def test_heads_are_told_apart() -> None:
    built = build_kernel(spec("next_heads_weight"))
    assert sure(built, "gaps")
    built.close()


@pytest.mark.usefixtures("in_process")
def test_the_fold_is_the_merge_of_all() -> None:
    built = build_kernel(spec("right"))
    assert isinstance(built, MergeKernel)
    g = torch.Generator().manual_seed(0)
    parts = [Part(torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, generator=g)) for _ in range(4)]
    found, due = built.merger()(parts), merge_sequential(parts)
    assert torch.allclose(found.out, due.out, atol=1e-6) and torch.allclose(found.lse, due.lse, atol=1e-6)
    built.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge:nowhere.py::f", "nowhere.py: no such file"),
        (f"merge:{FILE}", "expected merge:FILE.py::FUNCTION"),
        (f"merge:{FILE}::rigth", "has no function rigth, did you mean right"),
        (spec("right,base=10"), "base=10, expected one of e, 2"),
        (spec("right,bas=2"), "unknown option 'bas', did you mean 'base'"),
    ],
)
def test_what_is_no_merge_is_said_in_a_line(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        build_kernel(text)


@pytest.mark.parametrize("kernel", ["right", "writes"], indirect=True)
def test_merges_run_in_a_process_of_their_own(kernel: Kernel) -> None:
    assert not sure(kernel, "gaps")
    subject = subject_of(kernel)
    assert run_law(LAWS["merge-exact"], subject, examples=5, seed=0).state == "holds"


def test_a_merge_that_returns_no_lse_is_a_finding() -> None:
    built = build_kernel(spec("one_number"))
    with pytest.raises(KernelFailure, match=r"returned a Tensor, expected \(o, lse\)") as failed:
        built.run(draw("gaussian", replace(SIZES, n_kv=(200,)), 0))
    assert failed.value.kind == "shape"
    built.close()
