"""Laws of the merge algebra, against float64, within a tolerance derived from the arithmetic.

Every law compares two ways to combine the same parts. With u = 2^-24, P parts and Lambda the largest |lse|
(its differences included), one combination errs by at most

    out:  (2u * 2 Lambda + (P + 6) u) * sum_i w_i |o_i| / sum_i w_i        lse:  u (2 Lambda + P + 6)

the exponent's argument being rounded once and the exponential, the product, P additions and the division
once each; a tree passes at most ceil(log2 P) combinations of two parts. Both sides err, hence the factor 2.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.merge import Part, empty_part, merge, merge_sequential, merge_tree

U = 2.0**-24
SIZE = 3

finite = st.floats(-100, 100, width=32)
lses = st.one_of(st.just(-math.inf), st.floats(-100, 100, width=32))


@st.composite
def part_lists(draw: st.DrawFn, most: int = 9) -> list[Part]:
    count = draw(st.integers(1, most))
    parts = []
    for _ in range(count):
        lse = draw(lses)
        out = [0.0] * SIZE if lse == -math.inf else draw(st.lists(finite, min_size=SIZE, max_size=SIZE))
        parts.append(Part(torch.tensor(out, dtype=torch.float32), torch.tensor(lse, dtype=torch.float32)))
    return parts


def in_float64(parts: list[Part]) -> tuple[np.ndarray, float, np.ndarray]:
    """out, lse and sum_i w_i |o_i| / sum_i w_i, in float64."""
    lse = np.array([p.lse.item() for p in parts])
    out = np.array([p.out.double().numpy() for p in parts])
    top = lse.max()
    if top == -math.inf:
        return np.zeros(SIZE), -math.inf, np.zeros(SIZE)
    w = np.exp(lse - top)
    return (w @ out) / w.sum(), top + math.log(w.sum()), (w @ np.abs(out)) / w.sum()


def assert_close(actual: Part, parts: list[Part], *, combinations: int = 1) -> None:
    out, lse, size = in_float64(parts)
    largest = max((abs(p.lse.item()) for p in parts if p.lse.item() != -math.inf), default=0.0)
    each = U * (4 * largest + len(parts) + 6)
    budget = combinations * each * size + 1e-38
    error = np.abs(actual.out.double().numpy() - out)
    assert (error <= budget).all(), f"out: error {error}, budget {budget}"
    if lse == -math.inf:
        assert actual.lse.item() == -math.inf
    else:
        lse_budget = combinations * U * (2 * largest + 2 * abs(lse) + len(parts) + 6)
        assert abs(actual.lse.item() - lse) <= lse_budget


@given(part_lists())
def test_sequential_merge_agrees_with_float64(parts: list[Part]) -> None:
    assert_close(merge_sequential(parts), parts)


@given(part_lists())
def test_a_tree_agrees_with_float64(parts: list[Part]) -> None:
    assert_close(merge_tree(parts), parts, combinations=max(math.ceil(math.log2(len(parts))), 1))


@given(part_lists(), st.randoms(use_true_random=False))
def test_any_order_agrees(parts: list[Part], random: object) -> None:
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert_close(merge_sequential(shuffled), parts)


@given(part_lists(most=3), part_lists(most=3), part_lists(most=3))
def test_association_agrees(a: list[Part], b: list[Part], c: list[Part]) -> None:
    left = merge(merge(merge_sequential(a), merge_sequential(b)), merge_sequential(c))
    right = merge(merge_sequential(a), merge(merge_sequential(b), merge_sequential(c)))
    for nested in (left, right):
        assert_close(nested, a + b + c, combinations=3)


@given(part_lists(), st.integers(0, 9))
def test_an_empty_part_changes_no_bit_wherever_it_stands(parts: list[Part], at: int) -> None:
    at = min(at, len(parts))
    with_empty = [*parts[:at], empty_part(parts[0]), *parts[at:]]
    plain, more = merge_sequential(parts), merge_sequential(with_empty)
    assert torch.equal(plain.out, more.out)
    assert torch.equal(plain.lse, more.lse)


@given(part_lists())
def test_the_same_order_gives_the_same_bits(parts: list[Part]) -> None:
    first, second = merge_sequential(parts), merge_sequential(parts)
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)


@given(part_lists(), st.integers(-64, 64))
def test_a_common_shift_of_lse_moves_lse_alone(parts: list[Part], shift: int) -> None:
    moved = [Part(p.out, p.lse + shift) for p in parts]
    assert_close(merge_sequential(moved), moved)
    plain, other = merge_sequential(parts), merge_sequential(moved)
    _, _, size = in_float64(parts)
    largest = max((abs(p.lse.item()) for p in parts if p.lse.item() != -math.inf), default=0.0) + 64
    budget = 2 * U * (4 * largest + len(parts) + 6) * size + 1e-38
    assert (np.abs((plain.out - other.out).double().numpy()) <= budget).all()


@given(part_lists())
def test_nothing_becomes_nan(parts: list[Part]) -> None:
    for merged in (merge_sequential(parts), merge_tree(parts)):
        assert torch.isfinite(merged.out).all()
        assert not merged.lse.isnan()
