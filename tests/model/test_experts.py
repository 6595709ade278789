"""A layer of experts against its formula, a row at a time, in every way that rows may lie side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch

from verify.model.architectures import experts
from verify.model.architectures.experts import ExpertRows, Experts
from verify.model.products import Products
from verify.model.stopwatch import Stopwatch

WIDTH, INNER, COUNT, USED = 24, 20, 6, 2
LAYER = Experts(
    width=WIDTH,
    count=COUNT,
    used=USED,
    size=INNER,
    shared=0,
    gating="sigmoid",
    normalised=True,
    scale=1.5,
    has_bias=True,
)
# The fourth has no rows at all.
LENGTHS = (30, 7, 16, 0, 1, 25)


class Pull:
    """Random experts; the last is never chosen."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(5)
        self.parts = {
            name: torch.randn(shape, generator=random, dtype=torch.float64)
            for name, shape in LAYER.streamed.items()
        }
        self.asked: list[int] = []

    def announce(self, names: Iterable[str], wanted: Iterable[int]) -> Sequence[int]:
        self.asked = list(wanted)
        return self.asked

    def __call__(self, name: str, expert: int) -> torch.Tensor:
        return self.parts[name][expert]

    def unit(self, name: str) -> int:
        return 1


def layer_inputs() -> tuple[list[tuple[str, torch.Tensor]], dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    states = [
        (f"state {i}", torch.randn((n, WIDTH), generator=random, dtype=torch.float64))
        for i, n in enumerate(LENGTHS)
    ]
    bias = torch.zeros(COUNT, dtype=torch.float64)
    bias[-1] = -10
    gate = torch.randn((COUNT, WIDTH), generator=random, dtype=torch.float64)
    return states, {"ffn_gate_inp": gate, "exp_probs_b.bias": bias}


def by_formula(h: torch.Tensor, weights: dict[str, torch.Tensor], pull: Pull) -> torch.Tensor:
    """One row."""
    scores = (weights["ffn_gate_inp"] @ h).sigmoid()
    chosen = (scores + weights["exp_probs_b.bias"]).topk(USED).indices
    out = torch.zeros_like(h)
    for expert in chosen.tolist():
        gate, up, down = (
            pull(f"ffn_{name}_exps", expert).reshape(-1, size)
            for name, size in (("gate", WIDTH), ("up", WIDTH), ("down", INNER))
        )
        share = LAYER.scale * scores[expert] / scores[chosen].sum()
        out += share * (down @ (torch.nn.functional.silu(gate @ h) * (up @ h)))
    return out


@pytest.mark.parametrize(
    "rows", [experts.ON_CPU, ExpertRows(16, 0, 0), ExpertRows(16, 40, 24), ExpertRows(8, 1000, 1000)], ids=str
)
def test_each_row_is_what_the_formula_says(rows: ExpertRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "ON_CPU", rows)
    states, weights = layer_inputs()
    pull = Pull()
    products = Products(64, Stopwatch(torch.device("cpu")))
    found = list(LAYER(iter(states), weights, products, pull))
    assert [key for key, _ in found] == [key for key, _ in states]
    assert pull.asked == list(range(COUNT - 1))
    for (_, out), (_, h) in zip(found, states, strict=True):
        assert out.shape == h.shape
        for row, given in zip(out, h, strict=True):
            torch.testing.assert_close(row, by_formula(given, weights, pull), rtol=1e-12, atol=1e-12)


def test_a_cpu_takes_each_state_by_itself() -> None:
    """However many there are, no bit moves."""
    states, weights = layer_inputs()
    states = [(key, h.float()) for key, h in states]
    weights = {name: w.float() for name, w in weights.items()}
    pull = Pull()
    pull.parts = {name: x.float() for name, x in pull.parts.items()}
    products = Products(64, Stopwatch(torch.device("cpu")))
    together = dict(LAYER(iter(states), weights, products, pull))
    for key, h in states:
        ((_, alone),) = LAYER(iter([(key, h)]), weights, products, pull)
        assert torch.equal(alone, together[key])


def test_torch_stays_deterministic() -> None:
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        states, weights = layer_inputs()
        list(LAYER(iter(states), weights, Products(64, Stopwatch(torch.device("cpu"))), Pull()))
        assert torch.get_deterministic_debug_mode() == 2
    finally:
        torch.set_deterministic_debug_mode(before)
