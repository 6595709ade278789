"""What an arm notices of its kernel's results: places of the first, waited for at once or at the end."""

from __future__ import annotations

import pytest
import torch

from verify.arms.arm import Arm, ArmRunner, Place
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.kernel import Kernel
from verify.kernels.trace import Launched, Signature
from verify.model.architectures.architecture import AttentionSettings
from verify.model.layer_call import LayerCall

ROWS, HEADS = 3, 4
SIGNATURE = Signature("given", "", (), (), "one")


class Given(Kernel):
    """Gives the tensors that it was told to, one a call."""

    def __init__(self, outputs: list[torch.Tensor]) -> None:
        super().__init__("given")
        self.outputs = iter(outputs)

    def run(self, call: Call) -> Result:
        out = next(self.outputs)
        return Result(out, out.sum(-1), Launched({(call.path, 1, SIGNATURE): 1}))

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return Arithmetic()


def call_of(layer: int) -> LayerCall:
    """Windows 5 and 6, rows that see 1, 2 and 3 keys."""
    q, k = torch.zeros(2, ROWS, HEADS, 8), torch.zeros(2, ROWS, 2, 8)
    kv_len = torch.arange(1, ROWS + 1, dtype=torch.int32).expand(2, -1).contiguous()
    return LayerCall(layer=layer, window=5, q=q, k=k, v=k, kv_len=kv_len, settings=AttentionSettings(1.0))


def spoilt(value: float, *places: tuple[int, int, int]) -> torch.Tensor:
    out = torch.ones(2, ROWS, HEADS, 8)
    for place in places:
        out[place][3] = value
    return out


@pytest.mark.parametrize("wait", [True, False])
def test_the_first_of_each_kind_is_found(wait: bool) -> None:
    plain = torch.ones(2, ROWS, HEADS, 8)
    outputs_at_hand: dict[str, torch.Tensor] = {}
    baseline = Arm("baseline", "baseline", "given", "decode", Given([plain] * 3))
    outputs = [plain, spoilt(2.0, (1, 2, 3)), spoilt(torch.nan, (0, 1, 2), (0, 1, 3), (1, 0, 0))]
    candidate = Arm(
        name="candidate",
        role="candidate",
        spec="given",
        path="decode",
        kernel=Given(outputs),
        reference="baseline",
    )
    runners = [ArmRunner(arm, outputs_at_hand, wait=wait) for arm in (baseline, candidate)]
    for layer in range(3):
        for runner in runners:
            runner.attend(call_of(layer))
    if not wait:
        assert runners[1].findings.attention_equal, "nothing was waited for"
    for runner in runners:
        runner.settle()
    found = runners[1].findings
    assert not found.attention_equal
    assert found.first_difference == Place(6, 1, 2, 3)
    assert found.nonfinite_place == Place(5, 2, 1, 2)
    # Rows, not elements: two heads of one row count once.
    assert found.nonfinite_rows == 2
    assert [runner.launched.total_rows for runner in runners] == [3, 3]
    assert runners[0].findings.attention_equal
    assert runners[0].findings.nonfinite_place is None


@pytest.mark.parametrize("differs", [False, True])
def test_a_control_that_is_trusted_goes_on_with_its_baselines_tensor(differs: bool) -> None:
    """Whether it was right to is known once the device has been asked, and of no call before."""
    plain, other = torch.ones(2, ROWS, HEADS, 8), spoilt(2.0, (1, 2, 3))
    outputs_at_hand: dict[str, torch.Tensor] = {}
    baseline = Arm("baseline", "baseline", "given", "decode", Given([plain] * 2))
    own = Given([plain.clone(), other if differs else plain.clone()])
    control = Arm(
        name="control", role="control", spec="given", path="decode", kernel=own, reference="baseline"
    )
    first = ArmRunner(baseline, outputs_at_hand, wait=False)
    second = ArmRunner(control, outputs_at_hand, wait=False, trusting=True)
    for layer in range(2):
        its = first.attend(call_of(layer))
        assert second.attend(call_of(layer)) is its
    assert not second.trusted_wrongly, "nothing was waited for"
    second.settle()
    assert second.trusted_wrongly == differs


@pytest.mark.parametrize(("moved", "unsteady"), [(0.0, False), (1e-3, False), (1.0, True)])
def test_a_second_result_is_held_against_the_firsts_error_when_it_is_settled(
    moved: float, unsteady: bool
) -> None:
    runner = ArmRunner(Arm("arm", "baseline", "given", "decode", Given([])), {}, wait=False)
    first = torch.ones(2, ROWS, HEADS, 8)
    runner.note_again(call_of(3), first, first + moved, lambda: torch.tensor(0.5, dtype=torch.float64))
    assert runner.findings.unsteady is None
    runner.settle()
    assert (runner.findings.unsteady is not None) == unsteady
    if unsteady:
        # Every element is off by 1.
        times = first.numel() ** 0.5 / 0.5
        assert runner.findings.unsteady == f"window 6, layer 3: {times:.3g} times its error"
