"""Laws of the forms of a call: pages, packed tokens, several query tokens, masks and lists of keys.

The same keys in another form give the same answer: to the bit where a kernel promises the same bits and does
the same sums, as it does where only places, or what is not to be read, change; else within both budgets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from verify.kernels.call import AttentionOutput, Call, Result
from verify.kernels.exact import exact_attention
from verify.kernels.judging.families import FAR_PAGES
from verify.kernels.judging.hidden_keys import POISON
from verify.kernels.judging.other_forms import in_pages, listed, masked, packed, with_tree
from verify.laws.cases import Problem
from verify.laws.draws import BY_PLACE, formed_problems, trees
from verify.laws.law import LawBroken, Subject, laws, no_form, no_several
from verify.laws.tolerance import Seen, against_exact, agree, no_bit_moves, seen

BOTH = "both results' own error budgets (kernels/budget/bound.py)"
SAME_RUN = "bits, where two runs of one call have the same; else " + BOTH
SAME_SUMS = "bits, where both ran one binary and the same cuts; else " + BOTH
law = laws("forms", SAME_RUN)

# Families in which a row's result is not small beside its budget at other places of keys.
WITHOUT = ("near-overflow",)


def _in_pages(call: Call, page: int, **more: object) -> Call:
    """In pages whose last rests are finite: a kernel may read those, and must not count them."""
    return in_pages(call, page, **{"unnamed": POISON, "rest": POISON, **more})  # type: ignore[arg-type]


def _same(subject: Subject, what: str, a: Call, b: Call, *, rows: slice | None = None) -> float:
    """Two calls of which only that changes which no sum sees. rows: of the batch, those looked at."""
    lse, kernel, its = subject.capabilities.lse, subject.kernel, slice(None) if rows is None else rows
    one, two = kernel.run(a), kernel.run(b)
    if subject.capabilities.deterministic:
        return no_bit_moves(what, _of(one, its), _of(two, its), lse=lse)
    pair = (seen(kernel, a, one), seen(kernel, b, two))
    return agree(what, *(Seen(*(x[its] for x in each)) for each in pair), lse=lse)


def _of(result: Result, rows: slice) -> AttentionOutput:
    return AttentionOutput(result.out[rows], result.lse[rows])


def _like(subject: Subject, what: str, a: Call, b: Call, a_shape: Sequence[int] = ()) -> float:
    """Two calls of the same answer; bits where the kernel states that it did the same sums for both.
    a_shape: [B, T] of the rows of a, where they are packed."""
    kernel, has = subject.kernel, subject.capabilities
    one, two = kernel.run(a), kernel.run(b)
    first, second = seen(kernel, a, one), seen(kernel, b, two)
    if a_shape:
        first = Seen(*(x[0].unflatten(0, tuple(a_shape)) for x in first))
    if has.plans and has.deterministic and _ran(one) == _ran(two):
        pair = (AttentionOutput(x.out, x.lse) for x in (first, second))
        no_bit_moves(what, *pair, lse=has.lse)
    return agree(what, first, second, lse=has.lse)


def _ran(result: Result) -> set[tuple[object, ...]]:
    """What computed the rows, by their keys."""
    return {(n_kv, s.kernel, s.binary, s.head_groups, s.cuts) for _, n_kv, s in result.launched.rows}


@law("any-form", formed_problems, tolerance="the kernel's own error budget", unless=no_form)
def any_form(subject: Subject, problem: Problem) -> float:
    """Every result is within its rounding budget of softmax(QK)V in float64, in any forms at once."""
    call, has, which = problem.call(subject.device), subject.capabilities, problem.twist
    if has.key_list and which & 1:
        call = listed(call, order=which, most=max(call.shape.keys // 2, 1))
    if has.mask and which & 2:
        generator = torch.Generator().manual_seed(which)
        shape = (len(call.q), 1, call.shape.rows, call.shape.keys)
        # The first key is seen, so that a row which may see none is one that has none.
        mask = torch.rand(shape, generator=generator) < 0.7
        mask[..., 0] = True
        call = replace(call, mask=mask.to(subject.device)).checked()
    if has.paged and which & 4:
        call = _in_pages(call, problem.page, seed=which)
    if has.packed and which & 8:
        tokens = [max(call.shape.rows - b % 2, 0) for b in range(len(call.q))]
        call = packed(call, tokens)
    return against_exact(subject.kernel, call, lse=has.lse)


@law("pages-permuted", formed_problems, needs=("paged",))
def pages_permuted(subject: Subject, problem: Problem) -> float:
    """Where pages lie is of no consequence."""
    call = problem.call(subject.device)
    two = (_in_pages(call, problem.page, seed=seed) for seed in (0, problem.twist + 1))
    return _same(subject, "pages in another order", *two)


@law("page-size", formed_problems, needs=("paged",), tolerance=SAME_SUMS)
def page_size(subject: Subject, problem: Problem) -> float:
    """Keys in pages are the keys of one tensor, whatever the size of pages."""
    call = problem.call(subject.device)
    paged = _in_pages(call, problem.page, seed=problem.twist)
    return _like(subject, f"pages of {problem.page}", paged, call)


@law("far-pages", formed_problems, needs=("paged",))
def far_pages(subject: Subject, problem: Problem) -> float:
    """Pages whose numbers do not fit 16 bits, and whose keys lie far behind the first page, are pages."""
    small = replace(problem, kv_heads=1, k_size=min(problem.k_size, 64), v_size=min(problem.v_size, 64))
    page = 1 if subject.capabilities.page_sizes is None else problem.page
    call = small.call(subject.device)
    two = (_in_pages(call, page, seed=problem.twist, above=above) for above in (0, FAR_PAGES))
    return _same(subject, "pages from 65,536 on", *two)


@law("shared-prefix", formed_problems, needs=("paged", "ragged"))
def shared_prefix(subject: Subject, problem: Problem) -> float:
    """Pages that several sequences share are as copies of them."""
    call = replace(problem, batch=max(problem.batch, 2), fewer=()).call(subject.device)
    page, shared = problem.page, min(int(call.kv_len.max()) // problem.page, 2)
    k, v = call.k.clone(), call.v.clone()
    for x in (k, v):
        x[1:, : shared * page] = x[:1, : shared * page]
    call = replace(call, k=k, v=v)
    two = (_in_pages(call, page, seed=problem.twist, shared=count) for count in (0, shared))
    return _same(subject, "a shared prefix", *two)


@law("table-tails", formed_problems, needs=("paged",))
def table_tails(subject: Subject, problem: Problem) -> float:
    """Entries of a table behind a sequence's last page are not looked at: -1, 2^31 - 1, another's page."""
    call = problem.call(subject.device)
    paged = [
        _in_pages(call, problem.page, seed=problem.twist, stale=stale)
        for stale in ((0,), (-1,), (2**31 - 1,), (1, -1, 2))
    ]
    return max(_same(subject, "other tails of tables", paged[0], other) for other in paged[1:])


@law("unnamed-pages", formed_problems, needs=("paged",))
def unnamed_pages(subject: Subject, problem: Problem) -> float:
    """What lies in pages that no table names is not read: it may be NaN."""
    call = problem.call(subject.device)
    two = (_in_pages(call, problem.page, seed=problem.twist, unnamed=x) for x in (1.0, math.nan))
    return _same(subject, "NaN in pages that no table names", *two)


@law("last-page", formed_problems, needs=("paged",))
def last_page(subject: Subject, problem: Problem) -> float:
    """What the rest of a last page holds changes nothing."""
    call = problem.call(subject.device)
    two = (_in_pages(call, problem.page, seed=problem.twist, rest=x) for x in (POISON, -3.0))
    return _same(subject, "another rest of the last page", *two)


@law("other-pages", formed_problems, needs=("paged",))
def other_pages(subject: Subject, problem: Problem) -> float:
    """What the pages of other sequences hold changes no bit of a sequence."""
    batch = max(problem.batch, 2)
    fewer = problem.fewer if problem.batch == batch else ()
    call = replace(problem, batch=batch, fewer=fewer).call(subject.device)
    paged, b = _in_pages(call, problem.page, seed=problem.twist), problem.twist % batch
    assert paged.block_table is not None
    needed = -(-int(call.kv_len[b].max()) // problem.page)
    own = torch.zeros(len(paged.k), dtype=torch.bool, device=paged.k.device)
    own[paged.block_table[b, :needed].long()] = True
    k, v = (
        torch.where(own[:, None, None, None] | (x.abs() == POISON), x, x * -0.5) for x in (paged.k, paged.v)
    )
    return _same(subject, "other sequences' pages", paged, replace(paged, k=k, v=v), rows=slice(b, b + 1))


@law("no-keys", formed_problems, needs=("ragged", "empty_rows"), unless=no_form)
def no_keys(subject: Subject, problem: Problem) -> float:
    """A sequence without keys among others is 0 with an lse of -inf, or of the sink, and the others are as
    without it; in pages where the kernel has them, and with no token of its own where tokens are packed."""
    call, has = problem.call(subject.device), subject.capabilities
    at = problem.twist % (problem.batch + 1)
    before = [*range(at), *range(at, problem.batch)]
    index = torch.tensor([*range(at), 0, *range(at, problem.batch)], device=call.q.device)
    kv_len = call.kv_len[index].clone()
    kv_len[at] = 0
    more = replace(call, q=call.q[index], k=call.k[index], v=call.v[index], kv_len=kv_len)
    if has.paged:
        more, call = (_in_pages(x, problem.page, seed=problem.twist) for x in (more, call))
    found, alone = subject.kernel.run(more), seen(subject.kernel, call)
    due = torch.full_like(found.lse[at], -math.inf)
    if call.sinks is not None:
        due = call.sinks.float().expand_as(due)
    if bool((found.out[at] != 0).any()) or (has.lse and not torch.allclose(found.lse[at], due)):
        raise LawBroken(f"sequence {at} has no key: expected out 0, lse -inf or the sink")
    others = torch.tensor([i + (i >= at) for i in before], device=call.q.device)
    together = Seen(*(x[others] for x in seen(subject.kernel, more, found)))
    margin = agree("the other sequences", together, alone, lse=has.lse)
    if has.packed:
        tokens = [0 if b == at else call.shape.rows for b in range(problem.batch + 1)]
        rows = seen(subject.kernel, packed(more, tokens))
        flat = Seen(*(x[0].unflatten(0, (problem.batch, -1)) for x in rows))
        margin = max(margin, agree("the others, of a sequence without tokens", flat, alone, lse=has.lse))
    return margin


@law(
    "sequence-alone",
    formed_problems,
    needs=("packed", "ragged"),
    tolerance="bits, where the kernel promises those of a row alone; else " + BOTH,
)
def sequence_alone(subject: Subject, problem: Problem) -> float:
    """A sequence alone is the sequence among packed ones of other lengths and numbers of tokens."""
    call, has = problem.call(subject.device), subject.capabilities
    rows, draws = call.shape.rows, random.Random(problem.twist)
    tokens = [draws.randint(0, rows) for _ in range(problem.batch)]
    tokens[problem.twist % problem.batch] = rows
    if has.paged:
        call = _in_pages(call, problem.page, seed=problem.twist)
    together, margin, first = seen(subject.kernel, packed(call, tokens)), 0.0, 0
    for b, count in enumerate(tokens):
        own = slice(b, b + 1)
        whole: Call = replace(
            call,
            q=call.q[own],
            kv_len=call.kv_len[own],
            k=call.k if has.paged else call.k[own],
            v=call.v if has.paged else call.v[own],
            block_table=None if call.block_table is None else call.block_table[own],
        )
        its = Seen(*(x[:, first : first + count] for x in together))
        first += count
        if not count:
            continue
        alone = seen(subject.kernel, packed(whole, [count]))
        if has.row_alone and call.path == "decode":
            pair = (AttentionOutput(x.out, x.lse) for x in (its, alone))
            no_bit_moves(f"sequence {b} alone", *pair, lse=has.lse)
        margin = max(margin, agree(f"sequence {b} alone", its, alone, lse=has.lse))
    return margin


@law(
    "several-rows",
    lambda subject: formed_problems(subject, path="several"),
    unless=no_several,
    tolerance=SAME_SUMS,
)
def several_rows(subject: Subject, problem: Problem) -> float:
    """Rows of a call of several query tokens are the same rows one by one."""
    call, has, kernel = problem.call(subject.device), subject.capabilities, subject.kernel
    together, margin = kernel.run(call), 0.0
    every = seen(kernel, call, together)
    for t in range(call.shape.rows):
        one = call.of_rows(torch.tensor([t], device=call.q.device))
        alone = kernel.run(one)
        row = Seen(*(x[:, t : t + 1] for x in every))
        if has.plans and has.row_alone and _ran(alone) <= _ran(together):
            no_bit_moves(f"row {t} alone", AttentionOutput(row.out, row.lse), alone, lse=has.lse)
        margin = max(margin, agree(f"row {t} alone", row, seen(kernel, one, alone), lse=has.lse))
    return margin


@law("tree", trees, needs=("mask",), tolerance=BOTH)
def tree(subject: Subject, problem: Problem) -> float:
    """Drafts of a tree, by a mask, are each path through it alone, one key after another."""
    drawn, draws = problem.call(subject.device), random.Random(problem.twist)
    rows, n = drawn.shape.rows, problem.n_kv[0]
    parents = [draws.randint(-1, t - 1) for t in range(rows)]
    together, margin = seen(subject.kernel, with_tree(drawn, parents)), 0.0
    for leaf in set(range(rows)) - set(parents):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        nodes = torch.tensor(path, device=drawn.q.device)
        keys = torch.cat((torch.arange(n - rows, device=nodes.device), n - rows + nodes))
        lengths = torch.arange(n - rows + 1, n - rows + len(path) + 1, device=nodes.device)
        alone = replace(
            drawn,
            q=drawn.q[:, nodes],
            k=drawn.k[:, keys],
            v=drawn.v[:, keys],
            kv_len=lengths.int().expand(len(drawn.q), -1).contiguous(),
        )
        its = Seen(*(x[:, nodes] for x in together))
        what = f"path {path}"
        lse = subject.capabilities.lse
        margin = max(margin, agree(what, its, seen(subject.kernel, alone), lse=lse))
    return margin


@law(
    "mask-of-lengths",
    lambda subject: formed_problems(subject, without=("alibi", *WITHOUT)),
    needs=("mask",),
    tolerance="bits, where both ran one binary and one part; else " + BOTH,
)
def mask_of_lengths(subject: Subject, problem: Problem) -> float:
    """A mask that says which keys a row's length and window leave is that length and window."""
    call, has, kernel = problem.call(subject.device), subject.capabilities, subject.kernel
    other = masked(call, numbers=bool(problem.twist % 2))
    one, two = kernel.run(other), kernel.run(call)
    cuts = [{(s.kernel, s.binary, len(s.cuts) <= 2) for _, _, s in x.launched.rows} for x in (one, two)]
    whole = cuts[0] == cuts[1] and all(one_part for *_, one_part in cuts[0])
    if has.plans and has.row_alone and whole:
        no_bit_moves("lengths by a mask", one, two, lse=has.lse)
    return agree("lengths by a mask", seen(kernel, other, one), seen(kernel, call, two), lse=has.lse)


@law("list-of-all", formed_problems, needs=("key_list",), tolerance=SAME_SUMS)
def list_of_all(subject: Subject, problem: Problem) -> float:
    """A row that lists all its keys, in their order, is the row."""
    call = problem.call(subject.device)
    return _like(subject, "a list of all keys", listed(call), call)


@law("list-order", formed_problems, needs=("key_list",), tolerance=BOTH)
def list_order(subject: Subject, problem: Problem) -> float:
    """The order of a list, and holes in it, are of no consequence: windows and ALiBi go by places."""
    call, lse = problem.call(subject.device), subject.capabilities.lse
    other = seen(subject.kernel, listed(call, order=problem.twist))
    return agree("a list in another order", other, seen(subject.kernel, call), lse=lse)


@law(
    "list-recall",
    lambda subject: formed_problems(subject, without=(*BY_PLACE, "sinks", "softcap", *WITHOUT)),
    needs=("key_list",),
    tolerance="2 w max|v|, w the weight of what is left out, and " + BOTH,
)
def list_recall(subject: Subject, problem: Problem) -> float:
    """A list leaves out what it leaves out: the result moves by 2 w max|v| at most, w = 1 - exp(lse of the
    list - lse of all), and the lse of the list is no larger."""
    call, kernel, has = problem.call(subject.device), subject.kernel, subject.capabilities
    few = listed(call, order=problem.twist, most=max(call.shape.keys // 2, 1))
    part, whole = seen(kernel, few), seen(kernel, call)
    # By the oracle, which needs no lse of the kernel.
    lost = -torch.expm1(_exact_lse(few) - _exact_lse(call)).clamp(max=0.0)
    lost = torch.where(few.n_kv[..., None] == 0, 1.0, lost)
    largest = torch.where(call.v.abs() == POISON, 0, call.v).double().abs().flatten(1).amax(1)
    room = (2 * lost * largest[:, None, None])[..., None]
    moved = part._replace(bound=part.bound + room, lse=whole.lse, lse_bound=torch.zeros_like(whole.lse))
    margin = agree("what is left out", moved, whole, lse=False)
    if has.lse and bool((part.lse > whole.lse + part.lse_bound + whole.lse_bound).any()):
        raise LawBroken("the lse of fewer keys is larger than that of all")
    return margin


def _exact_lse(call: Call) -> torch.Tensor:
    return exact_attention(call).lse


@law(
    "v-in-k",
    lambda subject: formed_problems(subject).map(partial(_with_room, subject)),
    needs=("v_size",),
    tolerance=SAME_SUMS,
)
def v_in_k(subject: Subject, problem: Problem) -> float:
    """Values that are columns of keys, in the same memory, are values in a memory of their own."""
    call = problem.call(subject.device)
    first = (problem.twist % 2) * (call.shape.k_size - call.shape.v_size)
    inside = replace(call, v=call.k[..., first : first + call.shape.v_size])
    apart = replace(call, v=inside.v.clone())
    return _like(subject, f"V in columns from {first} of K", inside, apart)


def _with_room(subject: Subject, problem: Problem) -> Problem:
    """With values at most half as wide as keys, so that they lie in them; whole blocks of a cache."""
    v_size = max(16, subject.capabilities.size_multiple)
    return replace(problem, k_size=max(problem.k_size, 2 * v_size), v_size=v_size)
