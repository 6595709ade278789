"""A probe: a call whose right answer is known, and what is wrong with a kernel's result of it.

Where a probe demands bits, its result is due to the bit from every kernel that states an arithmetic which
promises them (`Arithmetic.promises_bits`), and from others to a few units of the types that they may have
(`one_key_tolerance`); where it demands a budget, `error_budget` of its call bounds the error, or a closed
form of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import Budget, error_budget
from verify.kernels.call import AttentionOutput, Call, checked_call
from verify.kernels.errors import KernelFailure
from verify.kernels.judging.figures import another_origin, budget_ratio
from verify.kernels.judging.hidden_keys import POISON
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import FLOAT_TYPES, NUMBER_TYPES
from verify.kernels.plans.plan import Plan

Demand = Literal["bits", "budget"]
# Of the one column, or the code word, by which a query asks for keys.
AMPLITUDE = 64.0
# What sums of one term and exact zeros are allowed for, relative.
ONE_KEY_SUMS = 2.0**-10
# Logits of keys that a probe does not mean, below the ones it does.
LOW = -128.0


class ProbeFailure(NamedTuple):
    """One wrong element."""

    probe: str  # its name
    demand: Demand  # what was due
    sequence: int  # of the call
    row: int  # of the sequence; -1: none alone
    head: int  # query head
    key: int  # whose value was due; -1: no single one
    part: int  # of the KV parts, that holds the key; -1: not known
    n_kv: int  # keys that the row sees
    what: str  # in words
    expected: float  # of the first wrong column
    got: float  # of the first wrong column

    def __str__(self) -> str:
        key = f", key {self.key}" if self.key >= 0 else ""
        part = f", part {self.part}" if self.part >= 0 else ""
        return (
            f"probe {self.probe} ({self.demand}): {self.what} of sequence {self.sequence}, row {self.row}"
            f" (n_kv {self.n_kv}), head {self.head}{key}{part}: expected {self.expected:.9g},"
            f" got {self.got:.9g}"
        )


@dataclass(frozen=True)
class Probe:
    """A call and what is due."""

    name: str  # unique
    demand: Demand  # how the result is held against it
    call: Call  # that the kernel gets
    out: torch.Tensor | None = None  # [B, T, Hq, Dv] float64; None: the oracle says it
    lse: torch.Tensor | None = None  # [B, T, Hq] float64; None: the oracle says it
    keys: torch.Tensor | None = None  # [B, T, Hq]: the key whose value is due, -1 for none
    # Allowed error of out, by arithmetic; None: the budget.
    bound: Callable[[Call, Arithmetic], torch.Tensor] | None = None


def check(probe: Probe, kernel: Kernel, *, plan: Plan | None = None, most: int = 8) -> list[ProbeFailure]:
    """Run a probe; the first failures, at most this many. A kernel that fails is a failure of its own."""
    call = probe.call if plan is None else replace(probe.call, plan=plan)
    try:
        result = kernel.run(call)
    except KernelFailure as failure:
        return [
            ProbeFailure(
                probe=probe.name,
                demand=probe.demand,
                sequence=-1,
                row=-1,
                head=-1,
                key=-1,
                part=-1,
                n_kv=0,
                what=str(failure),
                expected=math.nan,
                got=math.nan,
            )
        ]
    arithmetic = kernel.arithmetic_of(call)
    return judge(probe, result, arithmetic, most=most)


def on_cache(probe: Probe, held: Call) -> Probe:
    """The probe as a kernel with a quantised cache sees it: exact on what its cache holds, within its budget.

    held: `Kernel.held` of the probe's call; a kernel without such a cache gets the probe as it is.
    """
    return probe if held is probe.call else Probe(probe.name, "budget", held, keys=probe.keys)


def judge(
    probe: Probe,
    result: AttentionOutput,
    arithmetic: Arithmetic,
    *,
    most: int = 8,
    budget: Budget | None = None,
) -> list[ProbeFailure]:
    """What is wrong with the result of a probe. budget: of the probe's call, if it is known already."""
    call, got = probe.call, result.out.double()
    out, lse = probe.out, probe.lse
    lse_wrong = torch.zeros(result.lse.shape, dtype=torch.bool, device=got.device)
    if probe.demand == "bits":
        assert out is not None
        # Values, not bit patterns: -0 is 0.
        due = out.to(FLOAT_TYPES[arithmetic.out].dtype).double()
        wrong = ~(got == due)
        if not arithmetic.promises_bits:
            wrong &= ~((got - due).abs() <= one_key_tolerance(arithmetic, call) * due.abs())
        if lse is not None:
            # -inf to the bit; a finite one may have passed through another base and back.
            near = 2.0**-20 * (1 + lse.abs())
            if not arithmetic.promises_bits:
                near = near + NUMBER_TYPES[arithmetic.p].u
            near = (result.lse.double() - lse).abs() <= near
            lse_wrong = ~((result.lse.double() == lse) | (torch.isfinite(lse) & near))
    else:
        budget = budget or error_budget(call, arithmetic)
        out, lse = budget.out if out is None else out, budget.lse
        bound = budget.bound if probe.bound is None else probe.bound(call, arithmetic)
        wrong = budget_ratio(got - out, bound) > 1
        lse_error = torch.where(result.lse.double() == lse, 0.0, result.lse.double() - lse)
        lse_wrong = budget_ratio(lse_error, budget.lse_bound) > 1
        lse_wrong &= not another_origin(call, result.lse, budget)
    assert out is not None
    failures = []
    for b, t, h in wrong.any(-1).nonzero()[:most].tolist():
        column = int(wrong[b, t, h].nonzero()[0])
        failures.append(_failure(probe, arithmetic, (b, t, h), f"column {column}", out[b, t, h, column],
                                 got[b, t, h, column]))  # fmt: skip
    for b, t, h in lse_wrong.nonzero()[: most - len(failures)].tolist():
        assert lse is not None
        failures.append(_failure(probe, arithmetic, (b, t, h), "lse", lse[b, t, h], result.lse[b, t, h]))
    return failures


def one_key_tolerance(a: Arithmetic, call: Call) -> float:
    """What a row may err by, relative to its value, whose weight lies on one key, where no bits are due.

    The key's P may be no power of two (an offset on the maximum): rounded in the numerator and not in l.
    Accumulator, partial results, what a cache holds and the result may be rounded too. l passes gamma_dl, but
    all other keys add exact zeros: that is capped where it would hide another key's value, whole units away.
    """
    most = int(call.n_kv.max()) if call.kv_len.numel() else 0
    passed = a.depths(most).d_l * a.u
    rounded = NUMBER_TYPES[a.p].u + FLOAT_TYPES[a.out].u + a.u_acc + a.u_part + a.u_v
    return rounded + min(passed / (1 - passed) if passed < 1 else math.inf, ONE_KEY_SUMS)


def _failure(
    probe: Probe,
    a: Arithmetic,
    at: tuple[int, int, int],
    what: str,
    expected: torch.Tensor,
    got: torch.Tensor,
) -> ProbeFailure:
    b, t, h = at
    n = int(probe.call.n_kv[b, t])
    key = -1 if probe.keys is None else int(probe.keys[b, t, h])
    part = -1
    if key >= 0 and a.cuts_at is not None:
        part = sum(bound <= key for bound in a.cuts_at(n)[1:-1])
    return ProbeFailure(
        probe=probe.name,
        demand=probe.demand,
        sequence=b,
        row=t,
        head=h,
        key=key,
        part=part,
        n_kv=n,
        what=what,
        expected=float(expected),
        got=float(got),
    )


def call_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    sizes: InputSizes,
    device: torch.device | str,
    *,
    strided: bool = False,
    **options: Any,
) -> Call:
    """The call of q, k, v and lengths [B, T], in the sizes' type; strided: K and V lie head by head.

    Where V lies in K, its numbers stand in K's first columns, and queries ask by the others alone.
    """
    q, k, v = (x.to(sizes.dtype).to(device) for x in (q, k, v))
    if sizes.v_in_k:
        q, k = q.clone(), k.clone()
        q[..., : sizes.heads.v_size], k[..., : sizes.heads.v_size] = 0, v
    if strided:
        k, v = _head_by_head(k), _head_by_head(v)
    if sizes.v_in_k:
        v = k[..., : sizes.heads.v_size]
    kv_len = lengths.to(torch.int32).contiguous().to(device)
    return checked_call(q, k, v, kv_len=kv_len, scale=sizes.scale, path=sizes.path, **options)


def _head_by_head(x: torch.Tensor) -> torch.Tensor:
    """The same [B, S, H, D] in another memory order, beginning 2 elements into its memory."""
    b, s, h, d = x.shape
    memory = x.new_full((x.numel() + 2,), POISON)
    view = memory[2:].view(b, h, s, d).transpose(1, 2)
    view.copy_(x)
    return view
