"""The oracle with its products in slices: how far it lies from float64, and what it would take elsewhere.

    python benchmarks/sliced_oracle.py [--out FILE.json]

Slices are whole numbers of a few bits, here held in float64, so what is measured is what integers give that a
tensor core adds up without rounding (int8 into int32, float16 into float32): the agreement is that of the
hardware. Pairs of slices are counted as they are multiplied. Seconds are not measured: a card's are its data
sheet's rate by the operations counted, at REACHED of it, and what stays in float64 is counted beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from commit import commit, write_result

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import error_budget
from verify.kernels.exact import exact_attention
from verify.kernels.judging.families import FAMILIES, InputSizes, draw

SIZES = InputSizes(n_kv=(700, 300, 65), edges=(64, 256, 640))
AGREE = 1e-10
# Share of a nominal rate that large products reach: 50 of 66.9 TFLOP/s in results/h100-glm-layers.json.
REACHED = 0.75
# Operations of float64 a logit that no slice takes over: exp (a polynomial of degree 11, its reduction and
# scaling), the maximum, the sum, and adding up each pair's whole numbers.
EXP_OPERATIONS, OTHER_OPERATIONS = 30, 4


class Slices(NamedTuple):
    """bits: of a slice, its sign left out; chunk: terms whose sum is exact; most: slices of a number."""

    name: str
    bits: int
    chunk: int
    most: int


# 2^(2 bits) chunk is at most 2^24 where float32 adds up, 2^31 where int32 does.
KINDS = (
    *(Slices(f"int8, {n} slices", 7, 1 << 16, n) for n in (4, 5, 6, 7)),
    *(Slices(f"float16, {n} slices", 8, 1 << 8, n) for n in (4, 5, 6)),
)


class Card(NamedTuple):
    """Nominal dense operations a second: float64 (on tensor cores where it has them), int8, float16 into
    float32."""

    name: str
    float64: float
    int8: float
    float16: float


CARDS = (
    Card("H200", 67e12, 1979e12, 989e12),
    Card("RTX 3090", 35.6e12 / 64, 284e12, 71e12),
    Card("RTX 4090", 82.6e12 / 64, 660.6e12, 165.2e12),
)


class Counted:
    """A product in slices that counts what it multiplies."""

    def __init__(self, kind: Slices) -> None:
        self.kind, self.pairs, self.products, self.elements = kind, 0.0, 0.0, 0.0

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        kind, out = self.kind, a.new_zeros((a.shape[0], a.shape[1], b.shape[2]))
        for first in range(0, a.shape[2], kind.chunk):
            chunk = slice(first, first + kind.chunk)
            left, e_left = self._slices(a[:, :, chunk], 2)
            right, e_right = self._slices(b[:, chunk], 1)
            total = torch.zeros_like(out)
            for i, x in enumerate(left):
                for j, y in enumerate(right[: kind.most - i]):
                    whole = torch.bmm(x, y)
                    assert float(whole.abs().amax()) < (2**31 if kind.bits == 7 else 2**24 + 1)
                    total.add_(whole, alpha=2.0 ** (-kind.bits * (i + j + 2)))
                    self.pairs += 2.0 * x.numel() * y.shape[2]
                    self.elements += whole.numel()
            self.products += 2.0 * a[:, :, chunk].numel() * b.shape[2]
            out += torch.ldexp(total, e_left + e_right)
        return out

    def _slices(self, x: torch.Tensor, dim: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        exponent = torch.frexp(x.abs().amax(dim, keepdim=True)).exponent
        rest, found = torch.ldexp(x, -exponent), []
        for i in range(self.kind.most):
            whole = torch.round(torch.ldexp(rest, torch.tensor(self.kind.bits * (i + 1))))
            if self.kind.bits == 7:
                # A byte ends at 127: what is left of 128 goes into the next slice.
                whole = whole.clamp(-127, 127)
            found.append(whole)
            rest = rest - torch.ldexp(whole, torch.tensor(-self.kind.bits * (i + 1)))
            if not rest.any():
                break
        return found, exponent


def error_of(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], family: str) -> float:
    """Largest |out - float64's| over sum p |v| of its row and column."""
    call = draw(family, SIZES, 0)
    size = error_budget(call, Arithmetic(cuts_at=lambda n: (0, n))).size
    found, due = exact_attention(call, product), exact_attention(call)
    return float(((found.out - due.out).abs() / size.clamp(min=1e-300)).max())


def seconds_of(card: Card, kind: Slices, pairs_each: float, products: float, head: int) -> dict[str, float]:
    """Seconds of attention whose two products are so many operations, with heads of `head` numbers."""
    # Two products of `head` terms a logit, and two matrices of results that are added up a pair.
    logits = products / (4 * head)
    rest = logits * (EXP_OPERATIONS + OTHER_OPERATIONS)
    rate = card.int8 if kind.bits == 7 else card.float16
    adding = logits * (1 + head / 128) * pairs_each * 2
    return {
        "float64": products / (REACHED * card.float64) + rest / (REACHED * card.float64),
        "sliced": products * pairs_each / (REACHED * rate) + (rest + adding) / (REACHED * card.float64),
        "of_that_products": products * pairs_each / (REACHED * rate),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    known = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for kind in KINDS:
        errors, pairs, products = {}, 0.0, 0.0
        for family in FAMILIES:
            counted = Counted(kind)
            errors[family] = error_of(counted, family)
            pairs, products = pairs + counted.pairs, products + counted.products
        worst = max(errors, key=errors.__getitem__)
        each = pairs / products
        lines.append(
            {
                "kind": kind.name,
                "largest_error": errors[worst],
                "of": worst,
                "agrees": errors[worst] <= AGREE,
                "products_of_slices_for_each": each,
                # A window of 8,192 tokens, 96 heads of 128.
                "seconds": {
                    card.name: seconds_of(card, kind, each, 4.0 * 96 * 8192**2 * 0.75 * 128, 128)
                    for card in CARDS
                },
            }
        )
        print(f"{kind.name:20} {errors[worst]:.1e} ({worst}), {each:.1f} products each", flush=True)
    result = {
        "command": "python benchmarks/sliced_oracle.py",
        "commit": commit(),
        "computed": "agreement with slices held in float64; seconds by counted operations, not measured",
        "lines": lines,
    }
    write_result(result, known.out)


if __name__ == "__main__":
    main()
