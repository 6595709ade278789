"""Laws of attention: identities that hold for any right kernel, whatever its tiles, cuts and groups are.

Two results that exact arithmetic would make equal may differ by both their budgets; where nothing that is
computed changes, by no bit. None of them asks the oracle, except the two that say so.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import torch
from hypothesis import strategies as st

from verify.kernels.bits import same_bits
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.judging.hidden_keys import POISON
from verify.laws.cases import Problem
from verify.laws.draws import BY_PLACE, SEEDS, planned_problems, problems, twisted
from verify.laws.law import FIRST_CALL, Cases, LawBroken, Subject, has_one_path, laws, quantises_keys
from verify.laws.tolerance import Seen, against_exact, agree, no_bit_moves, seen

OWN = "the kernel's own error budget (kernels/budget/bound.py)"
BOTH = "both results' own error budgets (kernels/budget/bound.py)"
BITS = "bits: nothing that is computed changes"
law = laws("attention", BOTH)


@law("within-budget", problems, tolerance=OWN)
def within_budget(subject: Subject, problem: Problem) -> float:
    """Every result is within its rounding budget of softmax(QK)V in float64."""
    return against_exact(subject.kernel, problem.call(subject.device), lse=subject.capabilities.lse)


@law("first-call", lambda subject: st.just(replace(subject.simplest, n_kv=FIRST_CALL)), tolerance=OWN)
def first_call(subject: Subject, problem: Problem) -> float:
    """The first call of all is within its budget too: its workspace was filled."""
    if isinstance(subject.first, Exception):
        raise subject.first
    if subject.first is not None:
        problem = replace(subject.simplest, n_kv=FIRST_CALL)
    call = problem.call(subject.device)
    return against_exact(subject.kernel, call, subject.first, lse=subject.capabilities.lse)


@law("large-values", lambda subject: problems(subject, only=["near-overflow"]), tolerance=OWN)
def large_values(subject: Subject, problem: Problem) -> float:
    """Keys and values near the largest float16 overflow nowhere."""
    return against_exact(subject.kernel, problem.call(subject.device), lse=subject.capabilities.lse)


@law(
    "head-groups",
    lambda subject: planned_problems(subject, groups=True),
    tolerance=BOTH + "; bits where every grouping ran one binary and the same cuts",
    needs=("head_groups",),
)
def head_groups(subject: Subject, problem: Problem) -> float:
    """Any composition of r into head groups gives what one group gives."""
    call = problem.call(subject.device)
    heads = {"heads": "+".join(map(str, problem.groups))}
    whole, split = subject.variant({"heads": str(problem.ratio)}), subject.variant(heads)
    results = [kernel.run(call) for kernel in (split, whole)]
    a, b = (seen(kernel, call, result) for kernel, result in zip((split, whole), results, strict=True))
    margin = agree(f"heads={heads['heads']}", a, b, lse=subject.capabilities.lse)
    ran = [{(s.kernel, s.binary, s.cuts) for _, _, s in result.launched.rows} for result in results]
    if ran[0] == ran[1] and subject.capabilities.plans:
        no_bit_moves(f"heads={heads['heads']}, one binary", *results, lse=subject.capabilities.lse)
    return margin


# Another plan, and the same result: one law for each part of a plan.
OTHER_PLANS: dict[str, tuple[str, Cases]] = {
    "kv-parts": (
        "Any number of KV parts gives what one part gives.",
        lambda subject: planned_problems(subject, parts=True),
    ),
    "groups-and-parts": (
        "Head groups and KV parts together change nothing but rounding.",
        lambda subject: planned_problems(subject, groups=True, parts=True),
    ),
    "tile-sizes": (
        "Keys a tile are of no consequence but to rounding.",
        lambda subject: planned_problems(subject, block=True),
    ),
}


def variants_agree(subject: Subject, problem: Problem) -> float:
    """The plan of the problem against the subject's own."""
    call = problem.call(subject.device)
    plain, planned = subject.kernel, subject.variant(problem.options)
    return agree(f"{problem.options}", seen(planned, call), seen(plain, call), lse=subject.capabilities.lse)


for _name, (_says, _drawn) in OTHER_PLANS.items():
    law(_name, _drawn, needs=("plans",), says=_says)(variants_agree)


@law(
    "plan-runs",
    lambda subject: planned_problems(subject, groups=True, parts=True, path="decode"),
    tolerance="equality: the launch trace against the plan",
    needs=("plans",),
)
def plan_runs(subject: Subject, problem: Problem) -> float:
    """What was asked for is what ran: head groups that sum to r, parts that cover the row once."""
    assert subject.plan is not None
    call = problem.call(subject.device)
    kernel, plan = subject.variant(problem.options), subject.plan(problem.options)
    rows: Counter[int] = Counter()
    for (_, n_kv, ran), count in kernel.run(call).launched.rows.items():
        rows[n_kv] += count
        due = plan.at(call.shape.asked("decode").of_keys(n_kv))
        if (ran.head_groups, ran.cuts) != (due.head_groups, due.cuts):
            raise LawBroken(
                f"at n_kv {n_kv}: asked for head groups {due.head_groups} and cuts {due.cuts}, the trace says"
                f" {ran.head_groups} and {ran.cuts}"
            )
    if rows != Counter(call.kv_len.flatten().tolist()):
        raise LawBroken(f"the trace has rows of n_kv {dict(rows)}, asked for were {call.kv_len.tolist()}")
    return 0.0


@law(
    "values-scaled",
    lambda subject: twisted(
        problems(subject, without=("near-overflow", "denormal", "tiny")), st.integers(1, 3)
    ),
    tolerance=BOTH + "; a power of two rounds nothing by itself",
)
def values_scaled(subject: Subject, problem: Problem) -> float:
    """V times a power of two is the result times that power, and the same lse."""
    call, factor = problem.call(subject.device), 2.0**problem.twist
    v = torch.where(call.v.abs() == POISON, call.v, call.v * factor)
    plain, scaled = seen(subject.kernel, call), seen(subject.kernel, replace(call, v=v))
    due = plain._replace(out=plain.out * factor, bound=plain.bound * factor)
    return agree(f"V times 2^{problem.twist}", scaled, due, lse=subject.capabilities.lse)


def _rows(x: Seen, heads: torch.Tensor) -> Seen:
    """Query heads in another order."""
    return Seen(*(y[:, :, heads] for y in x))


@law("heads-permuted", lambda subject: twisted(problems(subject), st.integers(0, SEEDS)))
def heads_permuted(subject: Subject, problem: Problem) -> float:
    """KV heads, and query heads within each, in another order give the results in that order."""
    call, order = problem.call(subject.device), random.Random(problem.twist)
    kv = list(range(problem.kv_heads))
    order.shuffle(kv)
    heads = []
    for h in kv:
        inside = list(range(problem.ratio))
        order.shuffle(inside)
        heads += [h * problem.ratio + i for i in inside]
    index = torch.tensor(heads, device=call.q.device)
    by_kv = torch.tensor(kv, device=call.q.device)
    moved = replace(
        call,
        q=call.q[:, :, index],
        k=call.k[:, :, by_kv],
        v=call.v[:, :, by_kv],
        sinks=None if call.sinks is None else call.sinks[index],
        alibi_slopes=None if call.alibi_slopes is None else call.alibi_slopes[index],
    )
    plain = _rows(seen(subject.kernel, call), index)
    return agree(f"heads {heads}", seen(subject.kernel, moved), plain, lse=subject.capabilities.lse)


@law(
    "keys-permuted",
    lambda subject: twisted(
        problems(subject, without=BY_PLACE, rows=1, path="decode"), st.integers(0, SEEDS)
    ),
)
def keys_permuted(subject: Subject, problem: Problem) -> float:
    """The order of the keys that a row sees is of no consequence."""
    call, n = problem.call(subject.device), max(problem.n_kv)
    order = list(range(n))
    random.Random(problem.twist).shuffle(order)
    index = torch.tensor([*order, *range(n, call.shape.keys)], device=call.q.device)
    moved = replace(call, k=call.k[:, index], v=call.v[:, index])
    return agree("keys in another order", seen(subject.kernel, moved), seen(subject.kernel, call),
                 lse=subject.capabilities.lse)  # fmt: skip


@law(
    "logits-shifted",
    lambda subject: twisted(
        problems(subject, without=("sinks", "softcap", "near-overflow")), st.integers(-64, 64)
    ),
    unless=quantises_keys,
)
def logits_shifted(subject: Subject, problem: Problem) -> float:
    """A number added to every logit moves the lse by as much, and nothing else."""
    call, seen_keys = problem.call(subject.device), max(problem.n_kv)
    q, k = call.q.clone(), call.k.clone()
    q[..., 0] = 1.0
    k[:, :seen_keys, :, 0] = 0.0
    plain = seen(subject.kernel, replace(call, q=q, k=k))
    k = k.clone()
    k[:, :seen_keys, :, 0] = float(problem.twist)
    moved = seen(subject.kernel, replace(call, q=q, k=k))
    due = plain._replace(lse=plain.lse + call.scale * problem.twist)
    return agree(f"logits plus {call.scale * problem.twist:g}", moved, due, lse=subject.capabilities.lse)


@law(
    "masked-keys",
    lambda subject: twisted(problems(subject), st.integers(1, 20)),
    tolerance=f"{BITS}; with more keys held, where the kernel promises no bits of a row alone, {BOTH}",
)
def masked_keys(subject: Subject, problem: Problem) -> float:
    """Keys that no row sees change nothing, whatever they hold and however many there are."""
    call, n, has = problem.call(subject.device), max(problem.n_kv), subject.capabilities
    margin = 0.0
    if problem.spare:
        k, v = call.k.clone(), call.v.clone()
        k[:, n:], v[:, n:] = -3.0, 3.0
        other = replace(call, k=k, v=v)
        if has.deterministic:
            a, b = subject.kernel.run(call), subject.kernel.run(other)
            no_bit_moves("other masked keys", a, b, lse=has.lse)
        else:
            pair = seen(subject.kernel, call), seen(subject.kernel, other)
            margin = agree("other masked keys", *pair, lse=has.lse)
    behind = call.v.new_full((call.v.shape[0], problem.twist, *call.v.shape[2:]), POISON)
    longer = replace(
        call,
        k=torch.cat((call.k, call.k[:, :1].expand(-1, problem.twist, -1, -1)), 1),
        v=torch.cat((call.v, behind), 1),
    )
    if has.row_alone and call.path == "decode":
        no_bit_moves("more masked keys", subject.kernel.run(call), subject.kernel.run(longer), lse=has.lse)
    else:
        more_keys = agree(
            "more masked keys", seen(subject.kernel, longer), seen(subject.kernel, call), lse=has.lse
        )
        margin = max(margin, more_keys)
    return margin


@law("both-paths", lambda subject: problems(subject, path="decode"), unless=has_one_path)
def both_paths(subject: Subject, problem: Problem) -> float:
    """A row of the prefill path is the row of the decode path."""
    call = problem.call(subject.device)
    prefill = seen(subject.kernel, replace(call, path="prefill"))
    return agree("prefill", prefill, seen(subject.kernel, call), lse=subject.capabilities.lse)


@law(
    "row-alone",
    lambda subject: problems(subject, path="" if "decode" not in subject.capabilities.paths else "decode"),
    tolerance="bits, where the kernel promises it; else " + BOTH,
)
def row_alone(subject: Subject, problem: Problem) -> float:
    """A row alone is the row in its batch."""
    call, has = problem.call(subject.device), subject.capabilities
    together, margin, differ = seen(subject.kernel, call), 0.0, False
    promised = has.row_alone and call.path == "decode"
    for b in range(problem.batch):
        for t in range(len(problem.n_kv)):
            one = _row_of(call, b, t)
            alone = seen(subject.kernel, one)
            row = Seen(*(x[b : b + 1, t : t + 1] for x in together))
            what = f"sequence {b}, row {t} alone"
            if promised:
                pair = (AttentionOutput(x.out, x.lse) for x in (row, alone))
                no_bit_moves(what, *pair, lse=has.lse)
            differ |= not same_bits(alone.out, row.out)
            margin = max(margin, agree(what, alone, row, lse=has.lse))
    if not promised:
        subject.bits("row-alone", differ=differ)
    return margin


def _row_of(call: Call, b: int, t: int) -> Call:
    return replace(
        call,
        q=call.q[b : b + 1, t : t + 1],
        k=call.k[b : b + 1],
        v=call.v[b : b + 1],
        kv_len=call.kv_len[b : b + 1, t : t + 1],
    )


@law(
    "other-sequences",
    lambda subject: twisted(several_of_all(subject), st.integers(0, SEEDS)),
    tolerance="bits, where two runs of one call have the same; else " + BOTH,
)
def other_sequences(subject: Subject, problem: Problem) -> float:
    """What other sequences and other KV heads hold changes no bit of a row."""
    call, has = problem.call(subject.device), subject.capabilities
    b, h = problem.twist % problem.batch, problem.twist // problem.batch % problem.kv_heads
    kept = {
        "q": slice(h * problem.ratio, (h + 1) * problem.ratio),
        "k": slice(h, h + 1),
        "v": slice(h, h + 1),
    }

    def changed(name: str) -> torch.Tensor:
        # Of the same magnitude, so that sums in float16 hold it.
        given: torch.Tensor = getattr(call, name)
        found = torch.where(given.abs() == POISON, given, given * -0.5)
        found[b, :, kept[name]] = given[b, :, kept[name]]
        return found

    other = replace(call, q=changed("q"), k=changed("k"), v=changed("v"))
    results = [subject.kernel.run(x) for x in (call, call, other)]
    mine = [AttentionOutput(x.out[b, :, kept["q"]], x.lse[b, :, kept["q"]]) for x in results]
    what = f"other contents than sequence {b}'s, KV head {h}'s"
    if same_bits(results[0].out, results[1].out):
        return no_bit_moves(what, mine[0], mine[2], lse=has.lse)
    pair = [seen(subject.kernel, call, results[0]), seen(subject.kernel, other, results[2])]
    rows = [Seen(*(x[b : b + 1, :, kept["q"]] for x in one)) for one in pair]
    return agree(what, *rows, lse=has.lse)


def several_of_all(subject: Subject) -> st.SearchStrategy[Problem]:
    """Problems of two sequences or KV heads at least."""

    def several(problem: Problem) -> Problem:
        return replace(problem, batch=2) if problem.batch * problem.kv_heads == 1 else problem

    return problems(subject).map(several)


@law(
    "two-runs",
    problems,
    tolerance="bits, where the kernel promises them; else, where other bits are seen, " + BOTH,
)
def two_runs(subject: Subject, problem: Problem) -> float:
    """The same call gives the same bits every time."""
    call, has = problem.call(subject.device), subject.capabilities
    if has.deterministic:
        first = subject.kernel.run(call)
        for run in (2, 3):
            no_bit_moves(f"run {run}", subject.kernel.run(call), first, lse=has.lse)
        return 0.0
    one, margin, differ = seen(subject.kernel, call), 0.0, False
    for run in (2, 3):
        again = seen(subject.kernel, call)
        margin = max(margin, agree(f"run {run}", again, one, lse=has.lse))
        differ |= not torch.equal(again.out, one.out)
    subject.bits("two-runs", differ=differ)
    return margin


@law("other-lengths", problems, tolerance=OWN)
def other_lengths(subject: Subject, problem: Problem) -> float:
    """A call has its own lengths: shorter rows after longer ones in the same shapes, and longer again."""
    call, lse = problem.call(subject.device), subject.capabilities.lse
    shorter = replace(call, kv_len=call.kv_len - call.kv_len // 2)
    subject.kernel.run(call)
    margin = against_exact(subject.kernel, shorter, lse=lse)
    return max(margin, against_exact(subject.kernel, call, lse=lse))


@law("strides", problems, needs=("strided",))
def strides(subject: Subject, problem: Problem) -> float:
    """K and V that lie head by head in memory, or between other numbers, are the same K and V."""
    call = problem.call(subject.device)
    by_head = call.k.transpose(1, 2).contiguous().transpose(1, 2)
    between = torch.stack((call.v, -call.v), dim=3).flatten(3)[..., : call.shape.v_size]
    between.copy_(call.v)
    other = seen(subject.kernel, replace(call, k=by_head, v=between))
    return agree("strided", other, seen(subject.kernel, call), lse=subject.capabilities.lse)


@law(
    "empty-rows",
    lambda subject: problems(subject, without=("sinks",)),
    tolerance="bits of empty rows; others: bits where rows do not depend on others, else " + BOTH,
    needs=("empty_rows", "ragged"),
)
def empty_rows(subject: Subject, problem: Problem) -> float:
    """A row that sees no key is 0 with an lse of -inf, among others or alone, and spoils no other row."""
    call, has = problem.call(subject.device), subject.capabilities
    lengths = call.kv_len.clone()
    lengths[:, -1] = 0
    with_empty, as_given = seen(subject.kernel, replace(call, kv_len=lengths)), seen(subject.kernel, call)
    row = (lengths == 0)[..., None]
    empty = as_given._replace(
        out=torch.zeros_like(as_given.out), lse=torch.full_like(as_given.lse, -torch.inf)
    )
    due = Seen(
        *(
            torch.where(row[..., None] if a.dim() == 4 else row, a, b)
            for a, b in zip(empty, as_given, strict=True)
        )
    )
    if has.row_alone and call.path == "decode":
        return no_bit_moves("empty rows", *(AttentionOutput(*x[:2]) for x in (with_empty, due)), lse=has.lse)
    margin = agree("beside empty rows", with_empty, due, lse=has.lse)
    only = [AttentionOutput(x.out[row[..., 0]], x.lse[row[..., 0]]) for x in (with_empty, due)]
    return max(margin, no_bit_moves("empty rows", *only, lse=has.lse))
