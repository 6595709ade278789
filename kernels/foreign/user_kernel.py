"""What kernels of users have in common, in a process of their own or in ours.

A form, and an arithmetic that is assumed until something is known of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from verify.kernels.budget.arithmetic import Arithmetic, loosest, loosest_of, no_tighter_than
from verify.kernels.cache_types import CacheSpec
from verify.kernels.call import PATHS, AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import Capabilities
from verify.kernels.eager import over_rotation
from verify.kernels.errors import KernelFailure
from verify.kernels.foreign.forms import CALL_FORMS
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import U_F32, type_of
from verify.kernels.trace import Launched, Signature

# What torch calls them; of any other type a result is judged as float32.
RESULT_TYPES = {"float16": "f16", "bfloat16": "bf16"}
# From so many keys on gamma_2n of float16 sums is 1/8: the budget of a kernel with unknown sums says nothing.
VACUOUS_KEYS = 128
# What a callable is given only if it asks for it; without it, a call that needs it is refused.
_OPTIONS_OF_CALLS = ("sliding_window", "softcap", "sinks", "alibi_slopes")


def says_several(code: str) -> bool:
    """Whether code compares a path with the word `several`."""
    return any(f"{quote}several{quote}" in code for quote in "\"'")


def forms_given(call: Call) -> dict[str, torch.Tensor]:
    """What a call has of the forms that a callable may take."""
    given = {name: getattr(call, name) for name in CALL_FORMS}
    return {name: x if name == "mask" else x.to(torch.int32) for name, x in given.items() if x is not None}


class UserKernel(Kernel):
    """A callable of a user.

    `function` is what messages call it, `binary` the hash of its code, `greeting` what its form says of
    itself; `shown` what its last result showed: its type and whether it has an lse; `knows_several` whether
    its code has the word.
    """

    def __init__(
        self,
        spec: str,
        function: str,
        *,
        binary: str,
        greeting: Mapping[str, Any],
        acc: str | None = None,
        p: str | None = None,
        deterministic: bool | None = None,
        row_alone: bool = False,
        stated: Arithmetic | None = None,
        knows_several: bool = True,
    ) -> None:
        super().__init__(spec)
        self._knows_several = knows_several
        self.function, self.binary, self.acc, self.p = function, binary, acc, p
        self.deterministic, self.row_alone = deterministic, row_alone
        self.stated, self.greeting = stated, greeting
        self._takes: tuple[str, ...] = tuple(greeting["takes"])
        self._dtypes: tuple[str, ...] = tuple(greeting["dtypes"])
        self._way: str = greeting["way"]
        self._forms: tuple[str, ...] = tuple(greeting["forms"])
        self._one_head_each: bool = greeting["one_head_each"]
        if left_out := greeting["left_out"]:
            why = ", ".join(f"{name} ({reason})" for name, reason in left_out.items())
            self.notes.append(f"{spec}: does not say what it takes; asked, it does not take {why}: left out")
        if greeting["said"]:
            self.notes.append(f"{spec}: {'; '.join(greeting['said'])}")

    @property
    @abstractmethod
    def shown(self) -> Mapping[str, Any]:
        """`dtype` and `lse` of the last result; empty before."""

    @abstractmethod
    def answer(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of a call that it takes, float32, where the call's tensors lie; lse NaN for none."""

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        own = self._returning(self.stated or self._with_p(loosest("f16", acc=self.acc)))
        return self._over_cache(own, self.cache.at(None), shape, torch.float16)

    def arithmetic_of(self, call: Call) -> Arithmetic:
        own = self._returning(self.stated or self._with_p(loosest_of(call.q.dtype, acc=self.acc)))
        own = self.identified_of(call) or no_tighter_than(own, self.seen)
        return self._over_cache(own, self.cache.at(call.layer), call.shape, call.q.dtype)

    @staticmethod
    def _over_cache(own: Arithmetic, cache: CacheSpec, shape: Shape, dtype: torch.dtype) -> Arithmetic:
        """Numbers of the cache that it says it has may be rounded to its inputs' type."""
        if cache.as_given:
            return own
        kind = type_of(dtype)
        u = U_F32 if kind is None or kind.name == "f32" else kind.u
        own = replace(own, u_k=max(own.u_k, u), u_v=max(own.u_v, u))
        return over_rotation(own, cache, shape, dtype)

    def _with_p(self, assumed: Arithmetic) -> Arithmetic:
        """A P that its author says is of another type than the inputs."""
        return assumed if self.p is None else replace(assumed, p=self.p)

    def _returning(self, assumed: Arithmetic) -> Arithmetic:
        """The type that came back is known; a float32 that came back may hold numbers of a narrower one."""
        came_back = RESULT_TYPES.get(self.shown.get("dtype", ""))
        return assumed if came_back is None else replace(assumed, out=came_back)

    def result_type(self, call: Call) -> str:
        return RESULT_TYPES.get(self.shown.get("dtype", ""), "f32")

    def capabilities(self) -> Capabilities:
        # Whether it returns the lse, it shows when it runs: until then it is taken to.
        return Capabilities(
            lse=self.shown.get("lse", True),
            sliding_window="sliding_window" in self._takes,
            softcap="softcap" in self._takes,
            sinks="sinks" in self._takes,
            alibi="alibi_slopes" in self._takes,
            plans=False,
            head_groups=False,
            deterministic=bool(self.deterministic),
            row_alone=self.row_alone,
            strided=False,
            zero_for_empty_rows=False,
            ragged=self._way in ("kv_len", "mask", "none", "causal"),
            paths=("prefill",) if self._way == "square" else PATHS,
            paged="block_table" in self._forms,
            packed="cu_seqlens" in self._forms,
            mask="mask" in self._forms,
            key_list="keys" in self._forms,
            dtypes=self._dtypes or Capabilities().dtypes,
            ratios=(1,) if self._one_head_each else None,
        )

    def path_word(self, call: Call) -> AttentionPath:
        """What a callable that asks for the path is told. One that was written for two words is told that
        some tokens of a sequence are a prompt's: the third it would take for one token's."""
        return "prefill" if call.path == "several" and not self._knows_several else call.path

    def run(self, call: Call) -> Result:
        self.refuse_forms(call)
        for name in _OPTIONS_OF_CALLS:
            if getattr(call, name) is not None and name not in self._takes:
                raise KernelFailure("unsupported", f"{self.function}: does not take {name}, which is needed")
        dtype = str(call.q.dtype).removeprefix("torch.")
        if self._dtypes and dtype not in self._dtypes:
            raise KernelFailure("unsupported", f"{self.function}: takes {self._dtypes[0]}, not {dtype}")
        if self._one_head_each and call.shape.ratio != 1:
            raise KernelFailure("unsupported", f"{self.function}: takes as many KV heads as query heads")
        out, lse = self.answer(call)
        self._say_what_is_vacuous(call)
        # A foreign kernel does not say how it cut the call: its signature is its code.
        signature = Signature(
            kernel=self.called,
            binary=self.binary,
            head_groups=(),
            cuts=(),
            launch="one",
            tokens=call.shape.rows,
        )
        return Result(out, lse, Launched.every_row(call.path, call.n_kv, signature))

    @property
    def called(self) -> str:
        """What traces call it."""
        return f"py:{self.function}"

    def _say_what_is_vacuous(self, call: Call) -> None:
        """Once, that no budget applies, and what to state."""
        known = self.acc is not None or self.stated is not None or self.identified is not None
        vacuous = not known and call.q.dtype != torch.bfloat16
        if vacuous and call.kv_len.numel() and int(call.kv_len.max()) >= VACUOUS_KEYS:
            note = (
                f"{self.spec}: nothing is stated of its sums, so from {VACUOUS_KEYS} keys on no rounding"
                " budget applies; add acc=f32 to the specification if it accumulates in float32"
            )
            if note not in self.notes:
                self.notes.append(note)
                self.until_read.append(note)
