"""Rules of the kernel diff about one cell: what is a fault, what is the gravest, what is compared."""

from __future__ import annotations

import math

from verify.diff.cells import Cell, compare, evidence_of, faults_of, judge_cells
from verify.diff.examining import CellInputs, KernelEvidence, by_cache
from verify.judge.verdict import Decision, decide
from verify.kernels.cache_types import parse_cache
from verify.kernels.call import AttentionOutput
from verify.kernels.judging.detectors import Finding, measure
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel

INPUTS = CellInputs(
    "6/2x32", 64, "gaussian", 0, draw("gaussian", InputSizes(n_kv=(1,), spare=0, edges=()), 0)
)


def cell(
    candidate: KernelEvidence, *, compared: bool = True, covered: bool = True, equal: bool = False
) -> Cell:
    return Cell(
        inputs=INPUTS,
        baseline=KernelEvidence("eager"),
        candidate=candidate,
        faults=faults_of(candidate, "candidate"),
        compared=compared,
        covered=covered,
        bitwise_equal=equal,
        same_spec=False,
        stratum=None,
    )


def decided(*cells: Cell) -> Decision:
    judgement = judge_cells(cells, 1.25)
    found = evidence_of(cells, judgement, margin=1.25, allow_same=False, narrowed_by="more draws narrow it")
    return decide(found)


def test_a_failure_hides_what_else_was_found() -> None:
    found = KernelEvidence(
        "k", failure="raised: no", probes_failed=["probe a"], findings=[Finding("lse", "off")]
    )
    assert faults_of(found, "candidate") == ["candidate failed: raised: no"]
    assert found.severity == math.inf


def test_of_failed_probes_the_first_is_said_and_all_are_counted() -> None:
    assert faults_of(KernelEvidence("k", probes_failed=["probe a: wrong"]), "it") == ["it: probe a: wrong"]
    found = KernelEvidence("k", probes_failed=["probe a: wrong", "probe b"])
    assert faults_of(found, "it") == ["it: probe a: wrong (2 probes failed)"]


def test_a_suspicion_is_no_fault_and_a_breach_names_its_element() -> None:
    found = KernelEvidence(
        "k",
        findings=[Finding("quadrature", "odd"), Finding("budget", "too far")],
        worst=(0, 1, 2, 3),
        worst_values=(1.5, 1.25),
    )
    assert faults_of(found, "it") == ["it: too far at row 1, head 2, element 3: 1.5, exact 1.25"]


def test_the_gravest_fault_is_the_reason() -> None:
    mild = KernelEvidence("k", findings=[Finding("lse", "lse off")])
    grave = KernelEvidence("k", failure="died: of nothing")
    assert decided(cell(mild), cell(grave)) == ("broken", ["candidate failed: died: of nothing"])


def test_what_did_not_run_another_plan_is_no_evidence() -> None:
    verdict, reasons = decided(cell(KernelEvidence("k"), covered=False))
    assert verdict == "inconclusive"
    assert "the path under test did not run" in reasons[0]


def test_equal_bits_count_where_another_plan_ran() -> None:
    ran = cell(KernelEvidence("k"), equal=True)
    other = cell(KernelEvidence("k"), covered=False, equal=False)
    assert decided(ran, other).verdict == "identical"


def test_probes_alone_compare_nothing() -> None:
    verdict, reasons = decided(cell(KernelEvidence("k"), compared=False))
    assert (verdict, reasons) == (
        "inconclusive",
        ["probes show faults alone: none was found, and none is compared"],
    )


def test_kernels_are_held_against_what_their_cache_holds() -> None:
    kernels = [build_kernel("eager"), build_kernel("eager:kv=2")]
    assert by_cache(kernels) == [[0, 1]]
    kernels[1].cache = parse_cache("q8_0")
    assert by_cache(kernels) == [[0], [1]]


def overflowing(*elements: int) -> KernelEvidence:
    """What is found in a kernel whose result for INPUTS is Inf in these elements, and right in the others."""
    kernel = build_kernel("eager")
    result = kernel.run(INPUTS.call)
    out = result.out.clone()
    out.view(-1)[list(elements)] = math.inf
    found = KernelEvidence("k", output=AttentionOutput(out, result.lse))
    if elements:
        said = f"{len(elements)} elements are NaN or Inf"
        found.findings = [Finding("budget", said)]
        found.worst, found.worst_values = (0, 0, 0, elements[0]), (math.inf, 0.0)
        measured = measure(INPUTS.call, found.output, kernel.arithmetic_of(INPUTS.call), distinct=True)
        assert measured.nonfinite == len(elements)
        found.measures = measured
    return found


def test_an_overflow_that_the_baseline_has_in_the_same_elements_is_not_this_change() -> None:
    fewer, more = overflowing(3), overflowing(3, 5)
    assert not compare(INPUTS, more, fewer).faults
    assert (
        "1 elements are NaN or Inf, all of them among the baseline's 2" in compare(INPUTS, more, fewer).shared
    )
    assert compare(INPUTS, fewer, more).faults, "a candidate that overflows in more places is broken"
    assert compare(INPUTS, overflowing(), fewer).faults
    worse = overflowing(3)
    worse.findings.append(Finding("lse", "lse off"))
    assert compare(INPUTS, more, worse).faults, "whatever else is wrong with it is its own"
