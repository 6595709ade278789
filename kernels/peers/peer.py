"""What kernels of other libraries share: a launch a row, refusals, the launch trace."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import torch

from verify.kernels.budget.arithmetic import Arithmetic, loosest, loosest_of, no_tighter_than
from verify.kernels.call import AttentionOutput, AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import Capabilities
from verify.kernels.errors import KernelFailure, SpecError
from verify.kernels.kernel import Kernel, ReadyCall
from verify.kernels.trace import Launched, Signature

# One launch: out [T, Hq, Dv] in the library's own dtype, lse [T, Hq] as natural logarithm, or None.
Launch = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]


class PeerRows(NamedTuple):
    """Rows of one sequence that a library gets in one launch, and the keys that they see.

    q [1, T, Hq, Dk], k [1, n, Hkv, Dk], v [1, n, Hkv, Dv]; kv_len [1, T]. On the decode path T is 1, and n is
    that row's kv_len unless the library wants the whole cache (`PeerKernel.whole_cache`).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_len: torch.Tensor
    call: Call


class PeerKernel(Kernel):
    """A kernel of another library. On the decode path every row is a launch of its own, on its own keys."""

    # Whether a row's launch gets all keys and hides some, instead of its own keys alone.
    whole_cache = False

    def __init__(self, spec: str, capabilities: Capabilities, version: str) -> None:
        super().__init__(spec)
        self._capabilities, self.version = capabilities, version

    @abstractmethod
    def prepare(self, rows: PeerRows) -> Launch:
        """The launch for some rows, so that nothing but the library's kernel is left to run."""

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        # Libraries document float32 accumulators, and hardly more.
        return loosest("f16", acc="f32")

    def arithmetic_of(self, call: Call) -> Arithmetic:
        return self.identified_of(call) or no_tighter_than(loosest_of(call.q.dtype, acc="f32"), self.seen)

    def run(self, call: Call) -> Result:
        self._check(call)
        shape = call.shape
        out = call.q.new_zeros((*call.q.shape[:3], shape.v_size), dtype=torch.float32)
        lse = call.q.new_full(call.q.shape[:3], math.nan, dtype=torch.float32)
        for b, rows, launch in self._launches(call):
            found, found_lse = launch()
            out[b, rows] = found.float()
            if found_lse is not None:
                lse[b, rows] = found_lse.float()
        # How a library cuts a call is its own affair: its signature is its name and version.
        tokens = 1 if call.path == "decode" else call.shape.rows
        signature = Signature(
            kernel=self.spec, binary=self.version, head_groups=(), cuts=(), launch="one", tokens=tokens
        )
        return Result(out, lse, Launched.every_row(call.path, call.kv_len, signature))

    def ready(self, call: Call) -> ReadyCall:
        """For one row, the library's kernel alone: its result stays in its own dtype, lse may be missing."""
        ready = super().ready(call)  # compiles
        launches = [launch for _, _, launch in self._launches(call)]
        if len(launches) != 1:
            return ready
        no_lse = call.q.new_full(call.q.shape[:3], math.nan, dtype=torch.float32)

        def launch() -> AttentionOutput:
            out, lse = launches[0]()
            return AttentionOutput(out[None], no_lse if lse is None else lse[None])

        return ready._replace(launch=launch)

    def _check(self, call: Call) -> None:
        reason = self.capabilities().refuses(call)
        if reason is None and call.plan is not None:
            reason = self.capabilities().lacks("plans")
        if reason is not None:
            raise KernelFailure("unsupported", f"{self.spec}: {reason}")

    def _launches(self, call: Call) -> list[tuple[int, slice, Launch]]:
        """Every launch of a call, with the sequence and the rows that it computes."""
        found = []
        for b, lengths in enumerate(call.kv_len.tolist()):
            k, v = call.k[b : b + 1], call.v[b : b + 1]
            ranges = [slice(t, t + 1) for t in range(len(lengths))]
            if call.path == "prefill":
                ranges = [slice(0, len(lengths))]
            for rows in ranges:
                n = call.shape.keys if self.whole_cache else max(lengths[rows])
                q, kv_len = call.q[b : b + 1, rows], call.kv_len[b : b + 1, rows]
                q, its_k, its_v = (aligned(x) for x in (q, k[:, :n], v[:, :n]))
                found.append((b, rows, self.prepare(PeerRows(q, its_k, its_v, kv_len, call))))
        return found


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x where vector loads may read it: each head's numbers begin at a multiple of 16 bytes; else a copy.

    Kernels of libraries read 16 bytes at a time and do not ask; elsewhere the device faults, and the process
    is of no more use.
    """
    steps = [x.data_ptr(), *(s * x.element_size() for s in x.stride()[:-1])]
    return x.clone(memory_format=torch.contiguous_format) if any(step % 16 for step in steps) else x


def refuse(spec: str, reason: str | None) -> None:
    """Raises SpecError if there is a reason."""
    if reason is not None:
        raise SpecError(f"kernel {spec!r}: cannot run here: {reason}")


def version_of(distribution: str) -> str:
    """Name and version of what is installed."""
    return f"{distribution} {metadata.version(distribution)}"
