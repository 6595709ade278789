"""Laws of the merge algebra: (o, lse) pairs combine as softmax-weighted means, in any order and any tree.

Every combination is held against the exact one within `merge_bound`, which composes: a tree of merges is
allowed what its own merges may err by, one on top of the other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from verify.kernels.budget.merge_bound import BoundedPart, given, merge_bound
from verify.kernels.merge import Merge, Part, empty_part
from verify.laws.cases import Parts
from verify.laws.draws import far_parts, part_lists
from verify.laws.law import LawBroken, Subject, laws, no_merge
from verify.laws.tolerance import no_bit_moves, part_within

DERIVED = (
    "merge_bound: rounding of the exponent, the weights, both sums and the division, composed over merges"
)
law = laws("merge", DERIVED, unless=no_merge)
BITS = "bits: a weight of exactly 0 adds exactly nothing"


def tensors(case: Parts, device: torch.device) -> list[Part]:
    """The parts of a case: out [2] and lse [], float32; an empty part holds 0."""
    found = []
    for lse, value in case.parts:
        empty = lse == -float("inf")
        out = torch.tensor([0.0, 0.0] if empty else [float(value), 1.0], device=device)
        found.append(Part(out, torch.tensor(lse, dtype=torch.float32, device=device) + case.shift))
    return found


def _merge_of(subject: Subject) -> Merge:
    assert subject.merge is not None
    return subject.merge


def _nested(merge: Merge, parts: Sequence[Part], order: Sequence[int]) -> tuple[Part, BoundedPart]:
    """Two neighbours at a time, the place of each merge drawn: the result, and what is due."""
    level, due = list(parts), [given(part) for part in parts]
    for i in order:
        level[i : i + 2] = [merge(level[i : i + 2])]
        due[i : i + 2] = [merge_bound(due[i : i + 2])]
    return level[0], due[0]


@law("merge-exact", lambda _: part_lists(shift=64))
def merge_exact(subject: Subject, case: Parts) -> float:
    """Merged parts are the exact softmax-weighted mean, and their lse is the natural logarithm of the sum."""
    parts = tensors(case, subject.device)
    return part_within("merged", _merge_of(subject)(parts), merge_bound([given(part) for part in parts]))


@law("merge-commutes", lambda _: part_lists(least=2, order=True))
def merge_commutes(subject: Subject, case: Parts) -> float:
    """Any order of the parts gives the same result."""
    parts = tensors(case, subject.device)
    due = merge_bound([given(part) for part in parts])
    shuffled = list(parts)
    random.Random(sum(case.order)).shuffle(shuffled)
    margin = part_within("in another order", _merge_of(subject)(shuffled), due)
    return max(margin, part_within("reversed", _merge_of(subject)(parts[::-1]), due))


@law("merge-associates", lambda _: part_lists(least=3, most=6))
def merge_associates(subject: Subject, case: Parts) -> float:
    """((a b) c) ... and a (b (c ...)) agree."""
    parts = tensors(case, subject.device)
    count = len(parts) - 1
    left, due_left = _nested(_merge_of(subject), parts, [0] * count)
    right, due_right = _nested(_merge_of(subject), parts, range(count - 1, -1, -1))
    return max(part_within("from the left", left, due_left), part_within("from the right", right, due_right))


@law("merge-tree", lambda _: part_lists(least=2, order=True))
def merge_tree_law(subject: Subject, case: Parts) -> float:
    """Any tree of merges agrees with merging all parts at once."""
    parts = tensors(case, subject.device)
    nested, due = _nested(_merge_of(subject), parts, case.order)
    margin = part_within("as a tree", nested, due)
    at_once = merge_bound([given(part) for part in parts])
    return max(margin, part_within("at once", _merge_of(subject)(parts), at_once))


@law("merge-identity", lambda _: part_lists(order=True), tolerance=BITS)
def merge_identity(subject: Subject, case: Parts) -> float:
    """An empty part (0, -inf) changes no bit, wherever it stands."""
    parts = tensors(case, subject.device)
    merge, nothing = _merge_of(subject), empty_part(parts[0])
    # A merge may pass a single part through: two are merged in any case.
    plain = merge([*parts, parts[-1]])
    for at in {0, len(parts) // 2, len(parts)}:
        more = merge([*parts[:at], nothing, *parts[at:], parts[-1]])
        no_bit_moves(f"with an empty part at {at}", plain, more)
    return 0.0


@law("merge-nothing", lambda _: part_lists(most=6), tolerance="bits")
def merge_nothing(subject: Subject, case: Parts) -> float:
    """Empty parts alone give (0, -inf), and nothing ever becomes NaN."""
    parts = tensors(case, subject.device)
    nothing = empty_part(parts[0])
    no_bit_moves("of empty parts", _merge_of(subject)([nothing] * (len(parts) + 1)), nothing)
    merged = _merge_of(subject)([*parts, nothing])
    if bool(merged.out.isnan().any()) or bool(merged.lse.isnan().any()):
        raise LawBroken(
            f"merged with an empty part: NaN (out {merged.out.tolist()}, lse {float(merged.lse)})"
        )
    return 0.0


@law("merge-shift", lambda _: part_lists(shift=64), tolerance=DERIVED + "; both sides")
def merge_shift(subject: Subject, case: Parts) -> float:
    """A common shift of every lse moves the merged lse by as much, and nothing else."""
    # Levels are multiples of 1/64: shifting them rounds nothing.
    plain, moved = (tensors(replace(case, shift=s), subject.device) for s in (0, case.shift))
    at_zero, at_shift = (merge_bound([given(part) for part in parts]) for parts in (plain, moved))
    result = _merge_of(subject)(plain)
    due = BoundedPart(
        result.out.double(),
        result.lse.double() + case.shift,
        at_zero.bound + at_shift.bound,
        at_zero.lse_bound + at_shift.lse_bound,
    )
    return part_within(f"shifted by {case.shift}", _merge_of(subject)(moved), due)


@law("merge-far-apart", lambda _: far_parts())
def merge_far_apart(subject: Subject, case: Parts) -> float:
    """Parts whose lse differ by 100 and more neither overflow nor vanish: the heaviest is the result."""
    parts = tensors(case, subject.device)
    return part_within("far apart", _merge_of(subject)(parts), merge_bound([given(part) for part in parts]))
