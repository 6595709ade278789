"""Tensor parallel: what each of N GPUs computes of an attention layer, and a kernel called once on each.

Engines that share a layer out (ik_llama.cpp's split mode `graph`) give every GPU some of the KV heads and the
query heads that read them. A plan is made from the KV heads of a GPU: where they are fewer, a policy splits
at greater lengths, and `kv=auto` cuts the KV range into more parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from verify.kernels.budget.arithmetic import Arithmetic, Depths
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import Capabilities
from verify.kernels.kernel import Kernel
from verify.kernels.merge import Merge
from verify.kernels.trace import Launched


def shares(total: int, gpus: int, unit: int = 1) -> list[range]:
    """What each GPU holds of 0 ... total - 1: consecutive, as equal as whole units allow; some may be empty.

    shares(8, 2) is [0 ... 3, 4 ... 7]; shares(3, 2) is [0, 1 ... 2]. The last unit may be cut short.
    """
    units = -(-total // unit)
    edges = [min(i * units // gpus * unit, total) for i in range(gpus + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


@dataclass(frozen=True)
class _OfAnyGpu(Arithmetic):
    """The arithmetic of a row on whichever GPU: the greatest depth that it has on one of them."""

    gpus: tuple[Arithmetic, ...] = ()

    def depths(self, n_kv: int) -> Depths:
        depths = [gpu.depths(n_kv)._asdict() for gpu in self.gpus]
        return Depths(**{name: max(of_gpu[name] for of_gpu in depths) for name in Depths._fields})


def _of_any_gpu(found: list[Arithmetic]) -> Arithmetic:
    return _OfAnyGpu(**vars(found[0]), gpus=tuple(found)) if len(found) > 1 else found[0]


class TensorParallelKernel(Kernel):
    """A kernel called once a GPU, in their order, on its KV heads and the query heads that read them.

    Heads do not mix in attention, so results lie side by side. Launches of all GPUs are counted: a row of a
    call once on each. The GPUs are of the engine that is reproduced: one device runs them all.
    """

    def __init__(self, spec: str, inner: Kernel, gpus: int) -> None:
        super().__init__(spec)
        self.inner, self.gpus = inner, gpus
        self.notes, self.cache = inner.notes, inner.cache
        self.as_if_alone = inner.as_if_alone
        self.binary: str = getattr(inner, "binary", "")

    def run(self, call: Call) -> Result:
        """Raises ValueError where there are fewer KV heads than GPUs."""
        of_gpus = [self.inner.run(part) for part in _calls(call, self.gpus)]
        return Result(
            torch.cat([gpu.out for gpu in of_gpus], 2),
            torch.cat([gpu.lse for gpu in of_gpus], 2),
            Launched.together(gpu.launched for gpu in of_gpus),
        )

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        counts = {len(heads) for heads in _heads(shape, self.gpus)}
        return _of_any_gpu([self.inner.arithmetic(_of_heads(shape, n), path) for n in sorted(counts)])

    def arithmetic_of(self, call: Call) -> Arithmetic:
        found = {}
        for heads in _heads(call.shape, self.gpus):
            asking = slice(0, len(heads) * call.shape.ratio)
            own = replace(
                call,
                q=call.q[:, :, asking],
                k=call.k[:, :, : len(heads)],
                v=call.v[:, :, : len(heads)],
                sinks=None if call.sinks is None else call.sinks[asking],
                alibi_slopes=None if call.alibi_slopes is None else call.alibi_slopes[asking],
            )
            found[len(heads)] = self.inner.arithmetic_of(own)
        return _of_any_gpu([found[count] for count in sorted(found)])

    def capabilities(self) -> Capabilities:
        return self.inner.capabilities()

    def held(self, call: Call) -> Call:
        if not self.cache.looks_ahead:
            return self.inner.held(call)
        # A scale of all keys is of those that a GPU has.
        parts = [self.inner.held(part) for part in _calls(call, self.gpus)]
        return replace(call, k=torch.cat([x.k for x in parts], 2), v=torch.cat([x.v for x in parts], 2))

    def merger(self) -> Merge | None:
        return self.inner.merger()

    def forgive(self) -> None:
        self.inner.forgive()

    def close(self) -> None:
        self.inner.close()


def _heads(shape: Shape, gpus: int) -> list[range]:
    """KV heads by GPU. Raises ValueError where one would have none."""
    if shape.kv_heads < gpus:
        raise ValueError(f"k: {shape.kv_heads} KV heads, expected at least one for each of {gpus} GPUs")
    return shares(shape.kv_heads, gpus)


def _of_heads(shape: Shape, kv_heads: int) -> Shape:
    return shape._replace(heads=shape.heads.with_kv(kv_heads))


def _calls(call: Call, gpus: int) -> list[Call]:
    """The call of each GPU."""
    found = []
    for heads in _heads(call.shape, gpus):
        own = slice(heads.start, heads.stop)
        asking = slice(heads.start * call.shape.ratio, heads.stop * call.shape.ratio)
        found.append(
            replace(
                call,
                q=call.q[:, :, asking].contiguous(),
                k=call.k[:, :, own].contiguous(),
                v=call.v[:, :, own].contiguous(),
                sinks=None if call.sinks is None else call.sinks[asking],
                alibi_slopes=None if call.alibi_slopes is None else call.alibi_slopes[asking],
            )
        )
    return found
