"""Rules of the kernel diff about one cell: what is a fault, what is the gravest, what is compared."""

from __future__ import annotations

import math

from verify.diff.cells import Cell, CellInputs, KernelEvidence, by_cache, decide_cells, faults_of, judge_cells
from verify.judge.verdict import Decision
from verify.kernels.judging.detectors import Finding
from verify.kernels.judging.families import InputSizes, draw
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
    return decide_cells(cells, judgement, margin=1.25, allow_same=False, narrowed_by="more draws narrow it")


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
    kernels[1].cache = "q8_0"
    assert by_cache(kernels) == [[0], [1]]
