"""What every kernel provides: its result for a call, its arithmetic, and what it can be asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.cache_types import AS_GIVEN, CacheSpec
from verify.kernels.call import AttentionOutput, AttentionPath, Call, Result, Shape, checked_call
from verify.kernels.capabilities import Capabilities
from verify.kernels.errors import KernelFailure
from verify.kernels.merge import Merge
from verify.kernels.numbers import U_F32
from verify.kernels.stored import held
from verify.kernels.trace import Launched


class ReadyCall(NamedTuple):
    """A call that can be launched many times; launched: what each launch of it launches, counted once."""

    launch: Callable[[], AttentionOutput]
    launched: Launched


class Kernel(ABC):
    """A kernel that was built from a specification.

    `spec` is the text it was built from, `notes` what a reader of the verdict must know (a fallback that ran
    in its place, say), `cache` its own KV cache, `AS_GIVEN` where keys and values stay what they are;
    `as_if_alone` whether rows of the decode path are computed as if alone by how it is built, which tests
    hold: any other may choose by the tokens of a call, and is asked single ones (`verify.arms.alone`).
    """

    cache: CacheSpec = AS_GIVEN
    as_if_alone = False

    # Of its merge, where it is one of pairs: its unit roundoff, and the type that its results are rounded to.
    merges_pairs, merge_u, merge_out = False, U_F32, "f32"

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.notes: list[str] = []
        # What was read off a kernel that states nothing (`verify.kernels.identify`), by call; None for a call
        # that nothing was read of.
        self.identified: Callable[[Call], Arithmetic | None] | None = None
        # What was read, of any call.
        self.seen: Sequence[Arithmetic] = ()
        # Notes that are true as long as nothing was read.
        self.until_read: list[str] = []

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None = None,
        **options: Any,
    ) -> Result:
        """Attention of these arguments (`verify.kernels.call`); `plan` overrides the specification's.

        Packed tokens [sum T, Hq, Dk] give out [1, sum T, Hq, Dv]. Raises ValueError on inputs that do not fit
        together, KernelFailure if the kernel fails on good ones or does not take them.
        """
        return self.run(checked_call(q, k, v, **options))

    def refuse_forms(self, call: Call) -> None:
        """Raises KernelFailure, one line, where the call has a form that this kernel does not take."""
        reason = self.capabilities().refuses_form(call)
        if reason is not None:
            raise KernelFailure("unsupported", f"{self.spec}: {reason}")

    @abstractmethod
    def run(self, call: Call) -> Result:
        """What an implementation provides: compute the call, and say what was launched for it."""

    def ready(self, call: Call) -> ReadyCall:
        """The call, run once; host work that need not be repeated is not done again at each launch."""
        return ReadyCall(lambda: self.run(call), self.run(call).launched)

    @abstractmethod
    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        """The roundings of this kernel at this shape: what its error budget is derived from."""

    def arithmetic_of(self, call: Call) -> Arithmetic:
        """The same for one call: a kernel that computes and answers in its inputs' type knows it here."""
        return self.arithmetic(call.shape, call.path)

    def budgets_follow(
        self, identified: Callable[[Call], Arithmetic | None], seen: Sequence[Arithmetic] = ()
    ) -> None:
        """From now on, from what was read off it; notes that said that none could are gone.

        seen: what was read, of any call: what is assumed of calls that nothing was read of is no tighter.
        """
        self.identified, self.seen = identified, seen
        self.notes = [note for note in self.notes if note not in self.until_read]

    def identified_of(self, call: Call) -> Arithmetic | None:
        """What was read off it about such a call, if anything was."""
        return None if self.identified is None else self.identified(call)

    def result_type(self, call: Call) -> str:
        """The type that its results are numbers of, `f32`, `f16` or `bf16`, whatever holds them here. A
        foreign kernel shows it when it has run."""
        return self.arithmetic_of(call).out

    def capabilities(self) -> Capabilities:
        """What this kernel can be asked for. An implementation that has less than everything says so."""
        return Capabilities()

    def refuses(self, call: Call) -> str | None:
        """Why a call is beyond this kernel, or None if it is not; nothing is run for it."""
        return self.capabilities().refuses(call)

    def held(self, call: Call) -> Call:
        """The call with keys and values as this kernel's own cache holds them: what its budget is for.

        A kernel whose specification has a `cache=` answers for its arithmetic on these numbers, expanded to
        the call's own type: a kernel that does not round them so counts it in u_k and u_v. What storing them
        costs is measured as distance to `call`, and judged as such.
        """
        cache = self.cache.at(call.layer)
        return call if cache.as_given else held(call, cache)

    def merger(self) -> Merge | None:
        """The merge that this kernel combines its parts by, where it can be called by itself."""
        return None

    def forgive(self) -> None:
        """Ask a kernel again that hung: one in a process of its own is not asked twice by itself."""
        return None

    def close(self) -> None:
        """Give back what the kernel holds outside this process."""
        return None
