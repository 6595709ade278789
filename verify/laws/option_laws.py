"""Laws of a call's options: each is something else that attention can be given, and gives the same.

The identities are exact: a scale that is a power of two, columns of q and k that hold numbers without
rounding. Two results may differ by both their budgets.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from verify.kernels.call import Call
from verify.laws.attention_laws import BOTH
from verify.laws.cases import Problem
from verify.laws.draws import problems, twisted
from verify.laws.law import Subject, laws, quantises_keys
from verify.laws.tolerance import agree, seen

# Families that leave the call's options alone.
PLAIN = ("gaussian", "needles", "one-sign", "peaked", "flat", "tiny")
# Beyond every logit: a cap or a window that does nothing; a sink that weighs nothing.
WIDE_CAP, LOW_SINK = 2.0**20, -1e4
law = laws("options", BOTH)


def _own_column(problem: Problem, device: torch.device) -> Call:
    """A call whose first column of q and k is free (0 in k), at a scale of 1/4 or 1/8."""
    call = problem.call(device)
    k = call.k.clone()
    k[..., 0] = 0.0
    return replace(call, k=k, scale=0.25 if problem.k_size < 64 else 0.125)


@law(
    "sliding-window",
    lambda subject: twisted(problems(subject, only=PLAIN, rows=1, path="decode"), st.integers(1, 200)),
    needs=("sliding_window",),
)
def sliding_window(subject: Subject, problem: Problem) -> float:
    """A window of w is attention over the newest w keys alone; one as long as the row is no window."""
    call, n, has = problem.call(subject.device), max(problem.n_kv), subject.capabilities
    w = min(problem.twist, n)
    newest = replace(
        call,
        k=call.k[:, n - w : n].contiguous(),
        v=call.v[:, n - w : n].contiguous(),
        kv_len=torch.full_like(call.kv_len, w),
    )
    windowed = seen(subject.kernel, replace(call, sliding_window=w))
    margin = agree(f"window {w}", windowed, seen(subject.kernel, newest), lse=has.lse)
    wide = seen(subject.kernel, replace(call, sliding_window=n + problem.twist))
    return max(margin, agree("a wide window", wide, seen(subject.kernel, call), lse=has.lse))


@law(
    "softcap",
    lambda subject: twisted(problems(subject, only=PLAIN, least=1), st.integers(0, 4)),
    needs=("softcap",),
    unless=quantises_keys,
)
def softcap(subject: Subject, problem: Problem) -> float:
    """Far beyond the cap only the sign of a logit counts; a cap far beyond every logit is none."""
    has, cap = subject.capabilities, 2.0**problem.twist
    call = _own_column(problem, subject.device)
    wide = seen(subject.kernel, replace(call, softcap=WIDE_CAP))
    margin = agree("a wide cap", wide, seen(subject.kernel, call), lse=has.lse)
    keys = torch.arange(call.shape.keys, device=call.q.device)
    signs = torch.where(keys * 7 % 5 < 2, 1.0, -1.0).view(1, -1, 1)
    q, capped, beyond = torch.zeros_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.k)
    q[..., 0] = 4.0
    # tanh(20 + ...) is 1 to the last bit, in float64 too.
    capped[..., 0] = signs * cap / (4 * call.scale)
    beyond[..., 0] = signs * (20 + keys % 4).view(1, -1, 1) * cap / (4 * call.scale)
    a = seen(subject.kernel, replace(call, q=q, k=beyond, softcap=cap))
    b = seen(subject.kernel, replace(call, q=q, k=capped))
    return max(margin, agree(f"beyond a cap of {cap:g}", a, b, lse=has.lse))


@law(
    "sinks",
    lambda subject: twisted(problems(subject, only=PLAIN, path="decode"), st.integers(-3, 6)),
    needs=("sinks",),
    unless=quantises_keys,
)
def sinks(subject: Subject, problem: Problem) -> float:
    """A sink is one more key whose value is 0; a sink far below every logit is none."""
    call, has = _own_column(problem, subject.device), subject.capabilities
    heads = torch.arange(call.shape.q_heads, device=call.q.device)
    level = problem.twist + (heads * 3 % 7) / 4.0
    q = call.q.clone()
    q[..., 0] = level.to(q.dtype)
    key, value = torch.zeros_like(call.k[:, :1]), torch.zeros_like(call.v[:, :1])
    key[..., 0] = 1 / call.scale
    one_more = replace(
        call,
        q=q,
        k=torch.cat((key, call.k), 1),
        v=torch.cat((value, call.v), 1),
        kv_len=call.kv_len + 1,
    )
    with_sinks = seen(subject.kernel, replace(call, q=q, sinks=level.float()))
    margin = agree("sinks", with_sinks, seen(subject.kernel, one_more), lse=has.lse)
    # Of a row that sees nothing, even a low sink is all there is.
    if min(problem.n_kv):
        low = seen(subject.kernel, replace(call, q=q, sinks=torch.full_like(level.float(), LOW_SINK)))
        margin = max(margin, agree("low sinks", low, seen(subject.kernel, replace(call, q=q)), lse=has.lse))
    return margin


@law(
    "alibi",
    lambda subject: twisted(
        problems(subject, only=PLAIN, path="decode", lengths=(1, 2, 3, 16, 17, 64, 65, 200)),
        st.integers(0, 7),
    ),
    needs=("alibi",),
    unless=quantises_keys,
)
def alibi(subject: Subject, problem: Problem) -> float:
    """ALiBi is one more column, the position of a key times the slope; slopes of 0 are none."""
    call, has = _own_column(problem, subject.device), subject.capabilities
    heads = torch.arange(call.shape.q_heads, device=call.q.device)
    slopes = 2.0 ** -((heads + problem.twist) % 8 + 1.0)
    q, k = call.q.clone(), call.k.clone()
    q[..., 0] = slopes.to(q.dtype)
    # Positions up to 256, times 4 or 8: exact in bfloat16 too.
    k[..., 0] = (torch.arange(call.shape.keys, device=q.device) / call.scale).view(1, -1, 1).to(k.dtype)
    with_slopes = seen(subject.kernel, replace(call, q=q, alibi_slopes=slopes))
    column = seen(subject.kernel, replace(call, q=q, k=k))
    # Slopes count from the newest key, the column from the first.
    newest = (call.kv_len - 1).double()[..., None] * slopes.double()
    due = column._replace(lse=column.lse - newest)
    margin = agree("slopes", with_slopes, due, lse=has.lse)
    none = seen(subject.kernel, replace(call, q=q, alibi_slopes=torch.zeros_like(slopes)))
    return max(margin, agree("slopes of 0", none, seen(subject.kernel, replace(call, q=q)), lse=has.lse))
