"""Products whose columns several GPUs share: the sum of each GPU's, in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.plain_arms import ExactArm, logits_of, relative
from support.synthetic_moe import MoeSizes, write_moe
from verify.model.architectures import architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.products import Products
from verify.model.runner import Runner
from verify.model.stopwatch import Stopwatch

CPU = torch.device("cpu")
U = 2.0**-24


def products(gpus: int) -> Products:
    return Products(16, Stopwatch(CPU), gpus)


@pytest.mark.parametrize("gpus", [2, 3, 5])
def test_the_sum_is_the_product_within_the_rounding_of_both(gpus: int) -> None:
    draw = torch.Generator().manual_seed(gpus)
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((20, 160), (24, 160), (24,)))
    whole, summed = (products(n).summed(x, weight, bias, unit=16) for n in (1, gpus))
    exact = x.double() @ weight.double().T + bias.double()
    # Any order of summation of n products errs by (n + 1) u sum |x||w| at most, the bias included.
    bound = 161 * U / (1 - 161 * U) * (x.double().abs() @ weight.double().abs().T + bias.double().abs())
    for found in (whole, summed):
        assert ((found.double() - exact).abs() <= bound).all()
    assert torch.equal(whole, products(1)(x, weight, bias))
    assert not torch.equal(whole, summed)


def test_gpus_add_in_their_order() -> None:
    # (1 + u) + u is 1 in float32; 1 + (u + u) and (u + u) + 1 are 1 + 2 u.
    weight = torch.zeros(1, 48)
    weight[0, [0, 16, 32]] = torch.tensor([1.0, U, U])
    assert products(3).summed(torch.ones(1, 48), weight, unit=16).item() == 1.0
    assert products(3).summed(torch.ones(1, 48), weight.roll(16, 1), unit=16).item() == 1.0
    assert products(3).summed(torch.ones(1, 48), weight.roll(-16, 1), unit=16).item() == 1.0 + 2 * U
    # The bias comes last: 1 + (-1) is 0 before it.
    last = products(2).summed(torch.ones(1, 2), torch.tensor([[1.0, -1.0]]), torch.tensor([U]), unit=1)
    assert last.item() == U


def test_float64_operands_are_summed_in_float64() -> None:
    weight = torch.tensor([[1.0, U]], dtype=torch.float64)
    assert products(2).summed(torch.ones(1, 2, dtype=torch.float64), weight, unit=1).item() == 1.0 + U


def test_matrices_that_end_a_branch_are_summed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = MoeSizes(layers=2, dense=1, experts=2, used=1, width=128, inner=512, expert_inner=256)
    architecture = architecture_of(GGUFFile.open(write_moe(tmp_path / "moe.gguf", sizes)))
    summed, asked = Products.summed, list[tuple[int, int, int]]()

    def noted(self: Products, x: Any, weight: torch.Tensor, *bias: Any, unit: int) -> torch.Tensor:
        asked.append((weight.shape[0], weight.shape[1], unit))
        return summed(self, x, weight, *bias, unit=unit)

    monkeypatch.setattr(Products, "summed", noted)
    tokens = np.arange(16, dtype=np.int32)[None]
    logits = {
        gpus: logits_of(Runner(architecture, device=CPU, gpus=gpus), tokens, [ExactArm()], range(16))["exact"]
        for gpus in (1, 2)
    }
    # 24 heads over 2 KV heads of size 32. Q6_K has blocks of 256; the shared expert is Q4_0, of 32.
    attention, dense, expert, shared = (128, 768, 384), (128, 512, 256), (128, 256, 256), (128, 256, 32)
    assert set(asked) == {attention, dense, expert, shared}
    assert asked.count(attention) == 2 * asked.count(dense) == 4
    assert not torch.equal(logits[1], logits[2])
    assert relative(logits[2], logits[1]) < 1e-4
