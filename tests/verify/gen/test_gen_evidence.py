"""Rules about what a generation showed: where a kernel failed, and how far it moves the two top tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from verify.arms.arm import Arm, Findings, Place
from verify.gen.checks import CHECK_SCHEMA, StepCheck, log_squares
from verify.gen.evidence import _faults, _floor_at, _moved
from verify.gen.run import ArmStep, Step, Written
from verify.judge.ties import is_tie

CANDIDATE = Arm("candidate", "candidate", "eager", "decode")


def arm_step(margin: float = 0.0, *, finite: bool = True) -> ArmStep:
    return ArmStep(
        nll=1.0,
        kld_to_exact=0.0,
        kld_to_baseline=0.0,
        top1=1,
        top1_margin=1.0,
        target_logit=1.0,
        margin=margin,
        finite=finite,
    )


def check(step: int, **change: Any) -> StepCheck:
    values: dict[str, Any] = {
        "square_error": 1e-9,
        "max_budget_ratio": 0.5,
        "relative_max": 0.0,
        "vacuous": 0.0,
    }
    values |= {"nonfinite": 0, "n_kv": 9, "head": 1, "arm": "candidate"} | change
    return StepCheck(step=step, layer=2, **values)


def faults(findings: Findings, *checks: StepCheck, written: Written | None = None) -> list[str]:
    exact = SimpleNamespace(checks=list(checks), table=CHECK_SCHEMA.empty_table)
    generation: Any = SimpleNamespace(exact=exact)
    return _faults(generation, written or Written(), CANDIDATE, findings, "candidate")


def test_a_failure_is_placed_in_the_prompt_or_at_a_token() -> None:
    failed = Findings(failure="raised: no", failure_place=Place(0, 3))
    steps = [Step(5, 1, 2, {"candidate": arm_step()})]
    assert faults(failed, written=Written(steps=steps)) == [
        "candidate failed at token 2, layer 3: raised: no"
    ]
    in_prompt = Written(failed_in_prompt=frozenset({"candidate"}))
    assert faults(failed, written=in_prompt) == ["candidate failed at the prompt, layer 3: raised: no"]


def test_a_kernel_that_does_not_take_the_call_is_not_broken() -> None:
    assert faults(Findings(failure="unsupported: sinks")) == []


def test_attention_that_is_not_finite_is_said_rather_than_its_logits() -> None:
    steps = [Step(5, 1, 2, {"candidate": arm_step(finite=False)})]
    assert faults(Findings(), written=Written(steps=steps)) == [
        "candidate: NaN or Inf in the logits of token 1"
    ]
    rows = Findings(nonfinite_rows=2, nonfinite_place=Place(0, 4))
    assert faults(rows, written=Written(steps=steps)) == [
        "candidate: NaN or Inf in 2 attention rows, first in layer 4"
    ]


def test_of_wrong_checks_the_gravest_is_said() -> None:
    (fault,) = faults(Findings(), check(0), check(1, max_budget_ratio=2.0), check(2, max_budget_ratio=7.0))
    assert "7 times its rounding budget at token 3, layer 2, n_kv 9, head 1" in fault
    assert "(2 of 3 checks of a step and layer failed)" in fault
    (fault,) = faults(Findings(), check(1, max_budget_ratio=9.0), check(-1, nonfinite=1))
    assert "NaN or Inf at the prompt, layer 2" in fault


@pytest.mark.parametrize(
    ("kld", "first", "tie"),
    [
        # One rounding moves two tokens by 2 sqrt(KLD): 1e-3 here, three times that is as far as a tie goes.
        (2.5e-7, None, (True, False)),
        (math.nan, None, (None, None)),
        # At the first difference draws of its own say how far.
        (2.5e-7, 1e-2, (True, True)),
    ],
)
def test_a_step_that_differs_is_a_tie_where_rounding_moves_as_much(
    kld: float, first: float | None, tie: tuple[bool | None, bool | None]
) -> None:
    at_first: Any = None if first is None else SimpleNamespace(step=0, floor=first)
    step = Step(5, 1, 2, {"floor": arm_step()._replace(kld_to_exact=kld)})
    assert tuple(is_tie(moved, _floor_at(0, step, at_first)) for moved in (2.9e-3, 3.1e-3)) == tie
    assert math.isnan(_floor_at(0, Step(5, 1, 2, {}), None))


def test_steps_of_one_call_are_one_sample() -> None:
    errors = {"candidate": (4.0, 16.0, 1.0), "baseline": (1.0, 1.0, 1.0)}
    checks = [
        check(i, arm=arm, square_error=square, call=call)
        for arm, squares in errors.items()
        for i, (square, call) in enumerate(zip(squares, (0, 0, 1), strict=True))
    ]
    assert log_squares(checks, "candidate", "baseline") == pytest.approx([math.log(8), 0.0])
    prompt = [check(-1, arm=arm, square_error=9.0) for arm in errors]
    assert log_squares([*prompt, *checks], "candidate", "baseline")[0] == 0
    of_text = log_squares([*prompt, *checks], "candidate", "baseline", text_alone=True)
    assert of_text == pytest.approx([math.log(8), 0.0])


def test_a_baseline_that_failed_as_it_wrote_is_placed_there() -> None:
    failed = Findings(failure="raised: no", failure_place=Place(0, 3))
    baseline = Arm("baseline", "baseline", "eager", "decode")
    exact = SimpleNamespace(checks=[], table=CHECK_SCHEMA.empty_table)
    generation: Any = SimpleNamespace(exact=exact)
    found = _faults(generation, Written(failed_after=5), baseline, failed, "baseline")
    assert found == ["baseline failed at token 6, layer 3: raised: no"]


def test_how_far_a_margin_is_moved_is_a_root_mean_square() -> None:
    steps = [
        Step(5, 1, 2, {"a": arm_step(3.0), "b": arm_step(0.0)}),
        Step(6, 1, 2, {"a": arm_step(1.0), "b": arm_step(5.0)}),
        Step(7, 1, 2, {"b": arm_step(5.0)}),
    ]
    assert _moved(steps, "a", "b") == pytest.approx(math.sqrt((9 + 16) / 2))
    assert math.isnan(_moved(steps, "c", "b"))
