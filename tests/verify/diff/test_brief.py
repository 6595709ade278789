"""Lengths that are asked briefly: what is asked of them, and that what is wrong shows there all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.cli import assert_refused, verify
from verify.commands import diff as command
from verify.diff import run as diff
from verify.diff.inputs import DiffSettings, all_inputs, count_inputs, families_of
from verify.diff.probing import PROBES
from verify.diff.results import CandidateResult, DiffOutcome
from verify.kernels.call import Call, Result
from verify.kernels.judging.families import FAMILIES
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel
from verify.machine.errors import UsageError
from verify.machine.stages import StageClock

CPU = torch.device("cpu")
SETTINGS = DiffSettings(
    shapes=("6/2x32",),
    n_kvs=(96, 130),
    families=families_of("all", "decode"),
    baseline="eager",
    candidates=("eager:kv=2",),
    device="cpu",
    rows=16,
    most_rows=16,
    brief_n_kvs=(130,),
)


def outcome(settings: DiffSettings, build: Callable[[str], Kernel] = build_kernel) -> DiffOutcome:
    clock = StageClock(CPU)
    inputs = all_inputs(settings, CPU, clock)
    return diff.run_diff(settings, CPU, inputs, clock, build=build, name_bugs=False)


@pytest.fixture(scope="module")
def found() -> DiffOutcome:
    return outcome(SETTINGS)


def test_every_kind_of_input_has_its_stratum_there(found: DiffOutcome) -> None:
    """An option applied wrongly, or a precision that is lost, from some length on alone is seen there,
    however alike the kernel looks."""
    (candidate,) = found.candidates
    kinds = {n: {s.family for s in candidate.strata.strata if s.n_kv == n} for n in SETTINGS.n_kvs}
    assert kinds[130] == kinds[96] == {name for name, family in FAMILIES.items() if family.distinct}
    assert len(candidate.cells) == count_inputs(SETTINGS)
    assert [len(line.cells) for line in candidate.lines] == [len(SETTINGS.families)] * 2
    said = "130 keys: one-hot probes asked for each key once, of one KV head; --n-kv 130 asks all"
    assert said in found.notes


def test_the_command_that_makes_it_again_says_what_is_brief(found: DiffOutcome) -> None:
    assert "--n-kv 96,130 --brief 130" in found.run["again"]
    assert found.run["settings"]["brief_n_kv"] == [130]


class Spoiled(Kernel):
    """`eager:kv=2` that is given another call."""

    as_if_alone = True

    def __init__(self, spec: str, change: Callable[[Call], Call]) -> None:
        super().__init__(spec)
        self.kernel, self.change = build_kernel(spec), change

    def run(self, call: Call) -> Result:
        return self.kernel.run(self.change(call))

    def arithmetic(self, *about: Any) -> Any:
        return self.kernel.arithmetic(*about)

    def arithmetic_of(self, call: Call) -> Any:
        return self.kernel.arithmetic_of(call)

    def capabilities(self) -> Any:
        return self.kernel.capabilities()


def _window(call: Call) -> Call:
    wide = call.sliding_window
    return call if wide is None or wide < 3 else replace(call, sliding_window=wide - 1)


def _slopes(call: Call) -> Call:
    return call if call.alibi_slopes is None else replace(call, alibi_slopes=1.01 * call.alibi_slopes)


def _cap_beside_sinks(call: Call) -> Call:
    return replace(call, softcap=None) if call.sinks is not None else call


def _value_of_neighbour(call: Call) -> Call:
    """The last key of each 32, in the second KV head."""
    v = call.v.clone()
    v[:, 31::32, 1] = v[:, 30::32, 1][:, : v[:, 31::32].shape[1]]
    return replace(call, v=v)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (_window, {PROBES, "window", "window+sinks", "window+softcap"}),
        (_slopes, {PROBES, "alibi"}),
        (_cap_beside_sinks, {"sinks+softcap"}),
        (_value_of_neighbour, {*FAMILIES, PROBES, "sequences", "shorter"} - {"massive"}),
    ],
)
def test_a_fault_is_broken_at_a_brief_length(change: Callable[[Call], Call], shown: set[str]) -> None:
    def build(spec: str) -> Kernel:
        return build_kernel(spec) if spec == "eager" else Spoiled(spec, change)

    candidate: CandidateResult = outcome(replace(SETTINGS, n_kvs=(130,)), build).candidates[0]
    assert candidate.verdict == "broken"
    assert {cell.inputs.family for cell in candidate.cells if cell.faults} >= shown


def test_a_loss_of_precision_with_one_option_from_that_length_on_is_degraded() -> None:
    def coarse(call: Call) -> Call:
        """Keys of seven bits beside a softcap, of more than 100 keys."""
        if call.softcap is None or call.shape.keys < 120:
            return call
        return replace(call, k=call.k.bfloat16().half())

    def build(spec: str) -> Kernel:
        return build_kernel(spec) if spec == "eager" else Spoiled(spec, coarse)

    candidate: CandidateResult = outcome(replace(SETTINGS, most_rows=256), build).candidates[0]
    assert candidate.verdict in ("degraded", "broken")
    assert any("130" in reason and "softcap" in reason for reason in candidate.reasons), candidate.reasons


def test_a_length_that_is_not_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--brief 64: expected lengths of --n-kv"):
        replace(SETTINGS, brief_n_kvs=(64,))
    asked = ("diff", "--device", "cpu", "--out", str(tmp_path / "d"), "--n-kv", "40")
    assert_refused(verify(*asked, "--brief", "some"), "--brief some: expected lengths from 1")


@pytest.mark.parametrize(
    ("options", "brief"),
    [
        ([], (2048, 8192)),
        (["--path", "prefill"], (2048, 8192)),
        (["--n-kv", "512,8192"], ()),
        (["--inputs", "softcap"], ()),
        (["--n-kv", "512,8192", "--brief", "512"], (512,)),
    ],
)
def test_what_is_brief_by_default(
    options: list[str], brief: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was asked for by name."""
    asked: list[DiffSettings] = []

    def run_diff(settings: DiffSettings, *_: Any, **__: Any) -> None:
        asked.append(settings)
        raise UsageError("far enough")

    monkeypatch.setattr(diff, "run_diff", run_diff)
    assert {*command.CPU_BRIEF.split(",")} < {*command.CPU_N_KV.split(",")}
    verify("diff", "--device", "cpu", "--out", str(tmp_path / "d"), *options)
    assert [settings.brief_n_kvs for settings in asked] == [brief]
