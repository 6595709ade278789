"""Laws of parts: what a kernel says of pieces of the KV range, merged by `kernels.merge`, is the whole.

They need nothing of a kernel but its lse, and so test its base, its empty parts and its last keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from verify.kernels.budget.bound import error_budget
from verify.kernels.budget.merge_bound import BoundedPart, merge_bound
from verify.kernels.call import Call
from verify.kernels.merge import Part, merge_sequential
from verify.laws.cases import Problem
from verify.laws.draws import BY_PLACE, cut_problems, problems
from verify.laws.law import Subject, laws
from verify.laws.tolerance import Seen, against_exact, agree, seen

EVERY_CUT_OF = (1, 2, 3, 5, 9)
DERIVED = "each piece's own budgets of out and lse through merge_bound, and the budget of the whole"
law = laws("parts", DERIVED)


def pieces(call: Call, cuts: Sequence[int]) -> list[Call]:
    """The call over keys 0 .. cut 1, cut 1 .. cut 2, ...; a sink belongs to the first piece alone."""
    last = int(call.kv_len.max())
    found: list[Call] = []
    for first, end in pairwise([0, *cuts, last]):
        # At least one key is held, even where none is seen.
        keys = slice(min(first, call.shape.keys - 1), max(end, min(first, call.shape.keys - 1) + 1))
        k, v = call.k[:, keys].contiguous(), call.v[:, keys].contiguous()
        kv_len = (call.kv_len - first).clamp(0, end - first)
        sinks = None if first or found else call.sinks
        found.append(replace(call, k=k, v=v, kv_len=kv_len, sinks=sinks))
    return found


def _merged(subject: Subject, call: Call, cuts: Sequence[int]) -> Seen:
    """The merge of the kernel's own results on the pieces, with what it may be off by."""
    parts, due = [], []
    for piece in pieces(call, cuts):
        if not subject.capabilities.empty_rows and not bool(piece.kv_len.all()):
            continue
        result = subject.kernel.run(piece)
        parts.append(Part(result.out.float(), result.lse.float()))
        budget = error_budget(subject.kernel.held(piece), subject.kernel.arithmetic_of(piece))
        due.append(BoundedPart(budget.out, budget.lse, budget.bound, budget.lse_bound))
    bounded = merge_bound(due)
    merged = merge_sequential(parts)
    return Seen(merged.out.double(), merged.lse.double(), bounded.bound, bounded.lse_bound)


@law("parts-merge", cut_problems, needs=("lse",))
def parts_merge(subject: Subject, problem: Problem) -> float:
    """Attention over pieces of the KV range, merged, is attention over the whole, wherever the cuts lie."""
    call = problem.call(subject.device)
    whole = seen(subject.kernel, call)
    return agree(f"cut at {list(problem.cuts)}", _merged(subject, call, problem.cuts), whole, lse=True)


@law(
    "parts-every-cut",
    lambda subject: problems(subject, without=BY_PLACE, rows=1, path="decode", lengths=EVERY_CUT_OF),
    needs=("lse",),
)
def parts_every_cut(subject: Subject, problem: Problem) -> float:
    """Of a short row, every single position of a cut gives the whole, the ends (an empty part) included."""
    call = problem.call(subject.device)
    whole = seen(subject.kernel, call)
    margins = [
        agree(f"cut at {cut}", _merged(subject, call, (cut,)), whole, lse=True)
        for cut in range(max(problem.n_kv) + 1)
    ]
    return max(margins)


@law(
    "parts-far-apart",
    lambda subject: problems(
        subject, only=["gaussian"], rows=1, path="decode", least=2, lengths=(2, 3, 17, 65, 130)
    ),
    needs=("lse",),
)
def parts_far_apart(subject: Subject, problem: Problem) -> float:
    """Pieces whose lse differ by 100 merge into the heavier one, whichever comes first."""
    call = problem.call(subject.device)
    middle = max(problem.n_kv) // 2
    margins = []
    for low, high in ((slice(None, middle), slice(middle, None)), (slice(middle, None), slice(None, middle))):
        k, q = call.k.clone(), call.q.clone()
        # One column gives half of the keys 100 nats more: scale * 16 * k = 100.
        q[..., 0], k[:, low, :, 0], k[:, high, :, 0] = 16.0, 0.0, 100.0 / (16.0 * call.scale)
        far = replace(call, q=q, k=k)
        margins.append(
            agree("far apart", _merged(subject, far, (middle,)), seen(subject.kernel, far), lse=True)
        )
    return max(margins)


@law(
    "lse-exact",
    problems,
    tolerance="the lse's own budget (kernels/budget/bound.py): to another base it is off by a factor",
    needs=("lse",),
)
def lse_exact(subject: Subject, problem: Problem) -> float:
    """The log-sum-exp is in natural logarithm, sinks included, and as exact as the arithmetic allows."""
    call = problem.call(subject.device)
    return against_exact(subject.kernel, call, out=False, lse=True)
