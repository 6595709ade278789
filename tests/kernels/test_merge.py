from __future__ import annotations

import math

import pytest
import torch

from verify.kernels.merge import Part, empty_part, from_base2, merge, merge_sequential, merge_tree


def part(*, out: list[float], lse: float) -> Part:
    return Part(torch.tensor(out), torch.tensor(lse))


def test_two_parts_weigh_by_their_share_of_the_softmax() -> None:
    # One key with logit ln 3 and value 4, one with logit 0 and value 8: (3*4 + 1*8) / 4 = 5.
    merged = merge(part(out=[4.0], lse=math.log(3)), part(out=[8.0], lse=0.0))
    assert merged.out.item() == pytest.approx(5.0, rel=1e-6)
    assert merged.lse.item() == pytest.approx(math.log(4), rel=1e-6)


def test_the_empty_part_is_the_identity_to_the_bit() -> None:
    a = part(out=[0.1, -2.7], lse=3.3)
    for merged in (merge(a, empty_part(a)), merge(empty_part(a), a)):
        assert torch.equal(merged.out, a.out)
        assert torch.equal(merged.lse, a.lse)


def test_only_empty_parts_give_the_empty_part() -> None:
    nothing = empty_part(part(out=[1.0, 2.0], lse=0.0))
    merged = merge_sequential([nothing, nothing, nothing])
    assert torch.equal(merged.out, nothing.out)
    assert merged.lse.item() == -math.inf


def test_parts_far_apart_neither_overflow_nor_vanish() -> None:
    merged = merge(part(out=[1.0], lse=-5000.0), part(out=[2.0], lse=5000.0))
    assert merged.out.item() == 2.0
    assert merged.lse.item() == 5000.0


def test_unequal_parts_in_the_wrong_base_are_wrong() -> None:
    """What the base of lse costs: right for equal parts, wrong for all others."""
    keys = {"few": 1, "many": 7}
    in_base2 = {name: math.log2(n) for name, n in keys.items()}
    right = merge_sequential(
        [Part(torch.tensor([float(n)]), from_base2(torch.tensor(in_base2[k]))) for k, n in keys.items()]
    )
    wrong = merge_sequential(
        [Part(torch.tensor([float(n)]), torch.tensor(in_base2[k])) for k, n in keys.items()]
    )
    assert right.out.item() == pytest.approx((1 * 1 + 7 * 7) / 8, rel=1e-6)
    assert abs(wrong.out.item() - right.out.item()) > 0.1


def test_a_tree_of_one_part_is_that_part() -> None:
    a = part(out=[1.5], lse=0.25)
    assert merge_tree([a]) is a


@pytest.mark.parametrize("combine", [merge_sequential, merge_tree])
def test_no_part_is_refused(combine: object) -> None:
    with pytest.raises(ValueError, match="at least one part"):
        combine([])  # type: ignore[operator]
