"""Faults of the code around a kernel: a right kernel that is asked for another call than it was given.

They run at the speed of the kernel itself, so that a whole model can be run with one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import Capabilities
from verify.kernels.kernel import Kernel


class AlteredKernel(Kernel):
    """`inner`, given `alter(call)` in the place of each call. Its budget is that of a right kernel."""

    def __init__(self, spec: str, inner: Kernel, alter: Callable[[Call], Call]) -> None:
        super().__init__(spec)
        self.inner, self.alter = inner, alter

    def run(self, call: Call) -> Result:
        return self.inner.run(self.alter(call))

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return self.inner.arithmetic(shape, path)

    def capabilities(self) -> Capabilities:
        return self.inner.capabilities()

    def close(self) -> None:
        self.inner.close()


def newest_key_unseen(call: Call) -> Call:
    """Every row that sees two keys or more sees one less: an off-by-one."""
    fewer = torch.where(call.kv_len > 1, call.kv_len - 1, call.kv_len)
    return replace(call, kv_len=fewer)


def oldest_key_twice(call: Call) -> Call:
    """The second key is the first one's copy: a page read twice, its neighbour never."""
    k, v = (torch.cat((x[:, :1], x[:, :1], x[:, 2:]), 1) if x.shape[1] > 1 else x for x in (call.k, call.v))
    return replace(call, k=k, v=v)


def next_heads_keys(call: Call) -> Call:
    """Query heads read the next KV head's keys and values. Raises ValueError where there is one alone."""
    if call.shape.kv_heads < 2:
        raise ValueError("one KV head: there is no other to read")
    return replace(call, k=call.k.roll(-1, 2), v=call.v.roll(-1, 2))


def scaled(by: float) -> Callable[[Call], Call]:
    """Logits times `by`: a wrong softmax scale."""
    return lambda call: replace(call, scale=call.scale * by)
