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
from verify.kernels.numbers import FLOAT_TYPES
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


def _given(subject: Subject, part: Part) -> BoundedPart:
    """A part that is exact as it stands, or as nearly as the merge's own type can have it."""
    exact, kind = given(part), FLOAT_TYPES[subject.kernel.merge_out]
    return exact._replace(bound=kind.u * exact.out.abs() + kind.tau)


def _bound(subject: Subject, parts: Sequence[BoundedPart]) -> BoundedPart:
    """What is due of one merge; of several that follow each other, where it merges two parts at a time."""
    kernel = subject.kernel
    if not kernel.merges_pairs:
        return merge_bound(parts)
    due, *others = parts
    for part in others:
        due = merge_bound([due, part], kernel.merge_u, kernel.merge_out, of_lse=True)
    return due


def _due(subject: Subject, parts: Sequence[Part]) -> BoundedPart:
    return _bound(subject, [_given(subject, part) for part in parts])


def _merge_of(subject: Subject) -> Merge:
    assert subject.merge is not None
    return subject.merge


def _nested(subject: Subject, parts: Sequence[Part], order: Sequence[int]) -> tuple[Part, BoundedPart]:
    """Two neighbours at a time, the place of each merge drawn: the result, and what is due."""
    merge = _merge_of(subject)
    level, due = list(parts), [_given(subject, part) for part in parts]
    for i in order:
        level[i : i + 2] = [merge(level[i : i + 2])]
        due[i : i + 2] = [_bound(subject, due[i : i + 2])]
    return level[0], due[0]


@law("merge-exact", lambda s: part_lists(shift=64, empties=s.capabilities.empty_rows))
def merge_exact(subject: Subject, case: Parts) -> float:
    """Merged parts are the exact softmax-weighted mean, and their lse is the natural logarithm of the sum."""
    parts = tensors(case, subject.device)
    return part_within("merged", _merge_of(subject)(parts), _due(subject, parts))


@law("merge-commutes", lambda s: part_lists(least=2, order=True, empties=s.capabilities.empty_rows))
def merge_commutes(subject: Subject, case: Parts) -> float:
    """Any order of the parts gives the same result."""
    parts = tensors(case, subject.device)
    shuffled = list(parts)
    random.Random(sum(case.order)).shuffle(shuffled)
    margin = 0.0
    for what, other in (("in another order", shuffled), ("reversed", parts[::-1])):
        margin = max(margin, part_within(what, _merge_of(subject)(other), _due(subject, other)))
    return margin


@law("merge-associates", lambda s: part_lists(least=3, most=6, empties=s.capabilities.empty_rows))
def merge_associates(subject: Subject, case: Parts) -> float:
    """((a b) c) ... and a (b (c ...)) agree."""
    parts = tensors(case, subject.device)
    count = len(parts) - 1
    left, due_left = _nested(subject, parts, [0] * count)
    right, due_right = _nested(subject, parts, range(count - 1, -1, -1))
    return max(part_within("from the left", left, due_left), part_within("from the right", right, due_right))


@law("merge-tree", lambda s: part_lists(least=2, order=True, empties=s.capabilities.empty_rows))
def merge_tree_law(subject: Subject, case: Parts) -> float:
    """Any tree of merges agrees with merging all parts at once."""
    parts = tensors(case, subject.device)
    nested, due = _nested(subject, parts, case.order)
    margin = part_within("as a tree", nested, due)
    return max(margin, part_within("at once", _merge_of(subject)(parts), _due(subject, parts)))


@law("merge-identity", lambda s: part_lists(order=True, empties=s.capabilities.empty_rows), tolerance=BITS)
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


@law("merge-nothing", lambda s: part_lists(most=6, empties=s.capabilities.empty_rows), tolerance="bits")
def merge_nothing(subject: Subject, case: Parts) -> float:
    """Empty parts alone give (0, -inf), and nothing ever becomes NaN."""
    parts = tensors(case, subject.device)
    nothing = empty_part(parts[0])
    if subject.capabilities.empty_rows:
        no_bit_moves("of empty parts", _merge_of(subject)([nothing] * (len(parts) + 1)), nothing)
    elif all(bool(torch.isneginf(part.lse)) for part in parts):
        return 0.0
    merged = _merge_of(subject)([*parts, nothing])
    if bool(merged.out.isnan().any()) or bool(merged.lse.isnan().any()):
        raise LawBroken(
            f"merged with an empty part: NaN (out {merged.out.tolist()}, lse {float(merged.lse)})"
        )
    return 0.0


@law(
    "merge-shift",
    lambda s: part_lists(shift=64, empties=s.capabilities.empty_rows),
    tolerance=DERIVED + "; both sides",
)
def merge_shift(subject: Subject, case: Parts) -> float:
    """A common shift of every lse moves the merged lse by as much, and nothing else."""
    # Levels are multiples of 1/64: shifting them rounds nothing.
    plain, moved = (tensors(replace(case, shift=s), subject.device) for s in (0, case.shift))
    at_zero, at_shift = (_due(subject, parts) for parts in (plain, moved))
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
    return part_within("far apart", _merge_of(subject)(parts), _due(subject, parts))
