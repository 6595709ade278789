from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from support.ppl_runs import Tiny, run
from support.problems import problem
from verify.kernels.exact import exact_attention
from verify.kernels.merge import Part, merge_sequential
from verify.ppl.evidence.power import _nll_slope
from verify.ppl.planted import last_key_dropped, merge_weight_off, middle_key_dropped
from verify.ppl.record import PlantedRecord, PowerRecord


@pytest.fixture(scope="module")
def power(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("power") / "run"
    _, report = run(
        tiny, out, "--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2", "--power"
    )
    return report


@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"softcap": 2.0}])
def test_the_last_key_dropped_is_attention_without_it(options: dict[str, Any]) -> None:
    call = problem(rows=40, **options)
    oracle = exact_attention(call)
    window = options.get("sliding_window")
    # Without its newest key, a row's window still begins where it did.
    shorter = replace(call, kv_len=call.kv_len - 1, sliding_window=window - 1 if window else None)
    expected = exact_attention(shorter).out - oracle.out
    found = last_key_dropped(call, oracle, oracle.out)
    assert (found - expected)[:, 1:].abs().max() < 1e-12
    # A row that sees one key keeps it.
    assert found[:, 0].abs().max() == 0


def test_the_middle_key_dropped_is_attention_without_it() -> None:
    call = problem(rows=9)
    oracle = exact_attention(call)
    found = middle_key_dropped(call, oracle, oracle.out)
    # Row 8 sees keys 0 .. 8 and loses key 4.
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    alone = replace(
        call,
        q=call.q[:, 8:],
        k=call.k[:, kept],
        v=call.v[:, kept],
        kv_len=torch.tensor([[8]], dtype=torch.int32),
    )
    expected = exact_attention(alone).out[:, 0] - oracle.out[:, 8]
    assert (found[:, 8] - expected).abs().max() < 1e-12


def test_the_merge_that_is_off_is_a_merge_with_another_lse() -> None:
    call = problem(rows=16)
    oracle = exact_attention(call)
    found = merge_weight_off(call, oracle, oracle.out)
    # Row 15 sees 16 keys: parts of 8.
    row = replace(call, q=call.q[:, 15:], kv_len=call.kv_len[:, 15:])
    first = exact_attention(replace(row, kv_len=row.kv_len // 2))
    second = exact_attention(replace(row, k=call.k[:, 8:], v=call.v[:, 8:], kv_len=row.kv_len // 2))
    ulp = torch.nextafter(second.lse.abs().half(), torch.tensor(torch.inf).half()) - second.lse.abs().half()
    # The step of the float16 above |lse|: lse itself may round up into the next binade.
    expected = merge_sequential([Part(first.out, first.lse), Part(second.out, second.lse + ulp.double())]).out
    assert (found[:, 15] - (expected - oracle.out[:, 15:])[:, 0]).abs().max() < 1e-9


def test_a_larger_fault_is_seen_by_whatever_saw_a_smaller_one(power: dict[str, Any]) -> None:
    scales = [fault for fault in power["power"]["faults"] if fault["kind"] == "scale"]
    for detector in ("budget", "rms", "gain", "distance"):
        seen = [fault["seen"][detector] for fault in scales]
        assert seen == sorted(seen), detector
        assert seen[-1], detector
    assert not scales[0]["seen"]["gain"]
    assert not scales[0]["seen"]["distance"]


def test_the_gain_is_the_size_that_was_planted(power: dict[str, Any]) -> None:
    for fault in power["power"]["faults"]:
        if fault["kind"] == "scale" and fault["seen"]["gain"]:
            assert fault["gain"] == pytest.approx(fault["size"], rel=0.2)
    smallest = power["power"]["smallest"]["gain"]
    assert smallest / 10 <= power["detectable"]["candidate"]["scale_by_gain"] <= smallest


def test_lost_keys_are_bugs(power: dict[str, Any]) -> None:
    faults = {fault["kind"]: fault for fault in power["power"]["faults"] if fault["kind"] != "scale"}
    assert set(faults) == {"last key", "middle key", "merge"}
    for name in ("last key", "middle key"):
        assert faults[name]["seen"]["budget"]
        assert faults[name]["seen"]["distance"]


def test_the_candidate_is_judged_as_if_nothing_were_planted(power: dict[str, Any]) -> None:
    assert power["verdict"] == "round-off"
    assert not any(arm["name"].startswith("power/") for arm in power["arms"])


def test_the_least_scale_error_that_perplexity_could_show() -> None:
    """The far end of the interval of the size that is known best; faults of other kinds say nothing."""
    critical = 3.2905

    def planted(kind: str, size: float | None, dnll: float, se: float) -> PlantedRecord:
        return PlantedRecord(
            name=kind,
            kind=kind,
            size=size,
            distance_ratio=None,
            distance_ratio_ci=None,
            frozen_kld=math.nan,
            dnll=dnll,
            dnll_se=se,
            max_budget_ratio=None,
            rms_ratio=None,
            gain=None,
            seen={},
        )

    faults = [
        planted("scale", 1e-3, 0.0, 4e-4),
        planted("scale", 1e-2, -1e-3, 1e-3),
        planted("last key", None, 1.0, 1e-9),
    ]

    def slope(faults: list[PlantedRecord]) -> float:
        return _nll_slope(PowerRecord(reference="baseline", faults=faults, smallest={}))

    assert slope(faults) == pytest.approx((1e-3 + critical * 1e-3) / 1e-2, rel=1e-4)
    assert slope(faults[2:]) == 0
    assert _nll_slope(None) == 0
