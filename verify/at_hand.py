"""Tensors at hand: exact attention, its budget, merging, and `assert_attention` for a test.

    import verify
    verify.assert_attention(q, k, v, out, causal=True)

Shapes are those of the layout: bshd is q [B, T, Hq, Dk], k [B, S, Hkv, Dk], v [B, S, Hkv, Dv]; bhsd has heads
before rows; thd, [T, H, D], is one sequence, or with `cu_seqlens` several after one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Unpack

import torch

from verify.call_options import CallOptions, back, call_of, canonical
from verify.check import AttentionMismatch
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import Budget, error_budget
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.exact import exact_attention as exact_of
from verify.kernels.judging.blame import key_to_blame, smallest_weight
from verify.kernels.judging.detectors import SUSPICIONS, Measures, findings, measure
from verify.kernels.merge import Part, from_base2, merge_sequential, merge_tree
from verify.machine.errors import UsageError
from verify.stated import arithmetic_for, stated_arithmetic


class ExactAttention(NamedTuple):
    """Exact attention in the layout that was asked for.

    out: float64, as q with v's head size; lse: float64, natural logarithm of the sum of exp(logit), sinks
    included, [B, T, Hq] (bshd), [B, Hq, T] (bhsd), [T, Hq] (thd)."""

    out: torch.Tensor
    lse: torch.Tensor


def exact_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    **options: Unpack[CallOptions],
) -> ExactAttention:
    """softmax(scale * q k^T) v in float64: the oracle.

    q, k, v: float16, bfloat16, float32 or float64, of one device; query heads a multiple of KV heads; in the
        order of layout: "bshd" [B, T, H, D], "bhsd" [B, H, T, D], or "thd" [T, H, D].
    kv_len: keys that each row sees, [B, T], or [B], or one number; default all keys, or with `causal` a
        triangle whose last row sees the last key. scale: default Dk^-1/2.
    sliding_window: a row sees its newest keys alone, so many. softcap: c tanh(s / c) of every logit.
    sinks: [Hq], a logit a head with no value. alibi_slopes: [Hq], slope * (key - newest key) is added.
    mask: [B or 1, Hq or 1, T, S], True where a key is seen, or numbers that are added to logits.
    keys: [B, T, K] int32, the row sees these keys alone, -1 is none.
    block_table: [B, pages] int32; k and v are pages [P, page, H, D] (bhsd [P, H, page, D]), kv_len is needed.
    cu_seqlens: [B + 1] int32 with layout thd, where sequences begin in q [sum T, Hq, Dk]; k and v are
        [B, S, H, D], pages, or with cu_seqlens_k, [B + 1] int32, [sum S, H, D].

    Raises UsageError where shapes, lengths or options do not fit.

    >>> import torch
    >>> q, k, v = torch.zeros(1, 1, 2, 4), torch.zeros(1, 3, 1, 4), torch.ones(1, 3, 1, 4)
    >>> out, lse = exact_attention(q, k, v)
    >>> out.shape, out.dtype, round(float(lse[0, 0, 0]), 4)
    (torch.Size([1, 1, 2, 4]), torch.float64, 1.0986)
    """
    call, layout = call_of(q, k, v, options), options.get("layout", "bshd")
    with torch.no_grad():
        found = exact_of(call)
    return ExactAttention(back(found.out, layout), back(found.lse, layout))


def budget(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    arithmetic: str | Arithmetic | None = None,
    out_dtype: torch.dtype = torch.float32,
    **options: Unpack[CallOptions],
) -> Budget:
    """What a right kernel may err by, element by element: `bound`, and what it usually errs by: `expected`.

    arithmetic: "f32" (default) or "f16" sums, options ("p=f16,acc=f32"), or an `Arithmetic`; all that is not
    said is as loose as can be. out_dtype: type of the result. The rest as of `exact_attention`.

    Returns a named tuple in float64: out, lse (exact), bound, lse_bound, size (sum_j p_j |v_j|), vacuous (a
    row whose bound says nothing), expected, quadrature; in the order of `layout`. Raises UsageError.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> q, k, v = (torch.randn(1, n, 2, 16, generator=g).half() for n in (1, 33, 33))
    >>> b = budget(q, k, v)
    >>> bool((b.bound > b.expected).all()), bool((b.bound < 0.02).all())
    (True, True)
    """
    call, layout = call_of(q, k, v, options), options.get("layout", "bshd")
    with torch.no_grad():
        found = error_budget(call, arithmetic_for(stated_arithmetic(arithmetic), q.dtype, out_dtype))
    return Budget(**{name: back(x, layout) for name, x in found._asdict().items()})


def merge(
    *parts: tuple[torch.Tensor, torch.Tensor],
    base: float = math.e,
    order: Literal["sequential", "tree"] = "sequential",
) -> Part:
    """Attention over the union of the parts' keys: o = sum_i w_i o_i / sum_i w_i, w_i = exp(lse_i - max lse).

    parts: (out [..., D], lse [...]), at least one; (0, -inf) is a part of no keys. base: of the lse's
    logarithm, e or 2; the result's is the same. order: of the sums.
    Raises UsageError.

    >>> import torch
    >>> a = torch.ones(1, 2), torch.zeros(1)
    >>> b = 3 * torch.ones(1, 2), torch.zeros(1)
    >>> merge(a, b).out.tolist()
    [[2.0, 2.0]]
    >>> float(merge(a, b, base=2).lse)
    1.0
    """
    if not parts:
        raise UsageError("merge: expected at least one part (out, lse)")
    if base not in (math.e, 2):
        raise UsageError(f"base={base}: expected e (default) or 2")
    made = []
    for i, (out, lse) in enumerate(parts):
        if out.shape[:-1] != lse.shape or out.shape != parts[0][0].shape:
            raise UsageError(
                f"merge: part {i}: out {list(out.shape)}, lse {list(lse.shape)}: expected out [..., D] and"
                " lse [...] of one shape in every part"
            )
        made.append(Part(out, from_base2(lse) if base == 2 else lse))
    found = merge_tree(made) if order == "tree" else merge_sequential(made)
    return found._replace(lse=found.lse / math.log(2.0)) if base == 2 else found


def assert_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    lse: torch.Tensor | None = None,
    arithmetic: str | Arithmetic | None = None,
    distinct: bool = True,
    **options: Unpack[CallOptions],
) -> str:
    """Passes if out is attention of q, k, v within the rounding that its arithmetic allows.

    out: [B, T, Hq, Dv] in the order of `layout`, any float type; lse: [B, T, Hq] ([B, Hq, T] in bhsd, [T, Hq]
    in thd), natural logarithm. arithmetic: "f32" or "f16" sums, options, or an `Arithmetic`; default: float32
    sums, all else as loose as can be. distinct: logits of a row differ; False for inputs that repeat keys,
    whose roundings add up. The rest as of `exact_attention`.

    Returns one sentence: what it saw, and the smallest fault that it would still have seen. Raises
    AttentionMismatch (an AssertionError) that names row, head, element, key, and the ratio to the budget;
    UsageError where the tensors do not fit.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> q, k, v = (torch.randn(1, n, 2, 16, generator=g).half() for n in (1, 33, 33))
    >>> out = exact_attention(q, k, v).out
    >>> print(assert_attention(q, k, v, out.half())[:31])
    attention within its budget: la
    >>> assert_attention(q, k, v, exact_attention(q, k, v, kv_len=32).out)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    verify.check.AttentionMismatch: ...as if key 32 were not seen...
    """
    call, layout = call_of(q, k, v, options), options.get("layout", "bshd")
    stated = stated_arithmetic(arithmetic)
    arithmetic_ = arithmetic_for(stated, q.dtype, out.dtype)
    given, its = canonical(out, layout), None if lse is None else canonical(lse, layout)
    expected = (*call.q.shape[:3], call.shape.v_size)
    for name, x, shape in (("out", given, expected), ("lse", its, expected[:3])):
        if x is not None and tuple(x.shape) != shape:
            wanted = list(back(torch.empty(shape, device="meta"), layout).shape)
            raise UsageError(f"{name}: expected shape {wanted} (layout={layout}), got {list(x.shape)}")
        if x is not None and x.device != call.q.device:
            raise UsageError(f"{name}: on {x.device}, q is on {call.q.device}")
    with torch.no_grad():
        due = error_budget(call, arithmetic_)
        result = AttentionOutput(given, due.lse if its is None else its)  # types as they came
        measures = measure(call, result, arithmetic_, distinct=distinct, budget=due)
        faults = [f for f in findings(measures) if f.detector not in SUSPICIONS]
        if faults:
            raise AttentionMismatch(_mismatch(call, result, due, measures, faults, stated))
        return _seen(call, due, measures)


def _mismatch(
    call: Call,
    result: AttentionOutput,
    due: Budget,
    measures: Measures,
    faults: Sequence[Any],
    stated: Arithmetic | str | None,
) -> str:
    b, t, h, element = measures.worst
    got, exact = float(result.out[measures.worst]), float(due.out[measures.worst])
    bound, n = float(due.bound[measures.worst]), int(call.kv_len[b, t])
    lines = [f"not attention: {'; '.join(fault.said for fault in faults)}"]
    lines.append(
        f"worst at sequence {b}, row {t} ({n} keys), head {h}, element {element}: got {got:.9g}, exact"
        f" {exact:.9g}, {abs(got - exact) / bound if bound else math.inf:.3g} times its budget of {bound:.3g}"
    )
    if (blamed := key_to_blame(call, b, t, h, result.out[b, t, h], due.out[b, t, h])) is not None:
        lines.append(blamed)
    if stated is None and not _is_fault("f16", call, result):
        lines.append("float32 sums are assumed; arithmetic='f16', if it sums in float16, allows this much")
    return "\n".join(lines)


def _is_fault(stated: str, call: Call, result: AttentionOutput) -> bool:
    """Whether it is one in another arithmetic too."""
    arithmetic = arithmetic_for(stated, call.q.dtype, result.out.dtype)
    found = findings(measure(call, result, arithmetic, distinct=False))
    return any(f.detector not in SUSPICIONS for f in found)


def _seen(call: Call, due: Budget, measures: Measures) -> str:
    """What passed, and what would not have."""
    if bool(due.vacuous.all()):
        return (
            "attention as far as can be told: no budget says anything of this arithmetic at so many keys; an"
            " error of an eighth of a row would have been seen"
        )
    said = f"attention within its budget: largest error {measures.budget:.3g} of it"
    weight = smallest_weight(call, due)
    least = [f"a key that is lost with more than {weight:.2g} of a row's weight"]
    if measures.gain_limit == measures.gain_limit:
        least.append(f"a common factor of 1 + {measures.gain_limit:.2g}")
    return f"{said}; would have seen {', '.join(least)}"
