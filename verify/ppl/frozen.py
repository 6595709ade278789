"""Frozen casts: the kernel's own error, carried through the model, and nothing else.

A model that runs freely amplifies any difference at its casts: one rounding of noise flips the rounding of
some q, k or v of the next layer to the neighbouring float16, which is worth more than the kernel's whole
error. Where that is the measure, kernels that differ by a factor of two look alike. So at each layer, with q,
k, v of the exact arm before rounding, q~, k~, v~ after it, and r = q~ - q and so on the roundings themselves:

    e     = kernel(q~, k~, v~) - exact(q~, k~, v~)          the kernel's error, on real inputs
    arm'  = exact(q' + r_q, k' + r_k, v' + r_v) + e         with q', k', v' of the frozen arm, not rounded

The exact arm's roundings are applied to every arm as constants: they cancel, and what an arm's logits lie off
is e of all layers, propagated. An arm with e = 0 is the exact arm to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from verify.arms.arm import Arm, FirstResult, Place, common_cache, floor_noise, kernel_call
from verify.arms.attempt import attempt
from verify.arms.own_error import InPlace, Measured
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.exact import exact_attention
from verify.model.runner import LayerCall
from verify.ppl.record import FROZEN_SUFFIX

# A fault planted in a kernel's result: the call, the oracle's result and the kernel's (both float64) to what
# is added to the kernel's.
Fault = Callable[[Call, AttentionOutput, torch.Tensor], torch.Tensor]


def frozen_name(arm: str) -> str:
    """The name of an arm's pass with frozen casts."""
    return arm + FROZEN_SUFFIX


def carried(arms: Sequence[Arm]) -> list[Arm]:
    """The arms that have a pass with frozen casts: every kernel's but the control's, and the floor."""
    return [arm for arm in arms if arm.role == "floor" or (arm.kernel is not None and arm.role != "control")]


class Teacher:
    """Gives every kernel the exact arm's inputs, and keeps what the frozen passes need of one layer.

    arms: those whose kernels are measured, and the floor; faults: planted in the result of `victim`.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        in_place: InPlace,
        *,
        seed: int = 0,
        faults: Mapping[str, Fault] | None = None,
        victim: str = "",
    ) -> None:
        self.arms = carried(arms)
        self.in_place, self.seed = in_place, seed
        self.faults, self.victim = faults or {}, victim
        self.common_cache = common_cache(self.arms)
        # What each kernel gave in the first layer, where the arms that run freely are given the same call.
        self.first: dict[str, FirstResult] = {}
        # By pass: the error [B, T, H, Dv]; and the roundings of q, k and v, float64.
        self.errors: dict[str, torch.Tensor] = {}
        self.roundings: tuple[torch.Tensor, ...] = ()

    def __call__(self, call: LayerCall, oracle: torch.Tensor) -> None:
        """Measure every kernel on this layer's exact inputs; `oracle` is float64 attention on them."""
        assert call.unrounded is not None
        self.roundings = tuple(
            a.double() - b.double() for a, b in zip((call.q, call.k, call.v), call.unrounded, strict=True)
        )
        self.errors.clear()
        measured = []
        for arm in self.arms:
            if arm.kernel is None:
                self.errors[frozen_name(arm.name)] = floor_noise(call, oracle, self.seed)
            elif not arm.failed:
                measured += self._measure(call, arm, oracle)
        self.in_place(call, measured)

    def _measure(self, call: LayerCall, arm: Arm, oracle: torch.Tensor) -> list[Measured]:
        """One kernel's errors; none where it fails."""
        assert arm.kernel is not None
        whole = kernel_call(call, arm.path)
        tried = attempt(arm.kernel, whole)
        tried.check_memory(arm.spec)
        if tried.output is None:
            arm.findings.failure = tried.failure
            arm.findings.failure_place = Place(call.window, call.layer)
            return []
        results = {arm.name: tried.output.out.double()}
        if arm.name == self.victim and self.faults:
            exactly = exact_attention(whole)
            for name, fault in self.faults.items():
                results[name] = results[arm.name] + fault(whole, exactly, results[arm.name])
        # Its arithmetic answers for what its own cache holds; what the cache loses is distance all the same,
        # unless all have it.
        own = arm.kernel.held(whole)
        exact = oracle if own is whole else exact_attention(own, with_lse=False).out
        aim = exact if self.common_cache else oracle
        if call.layer == 0:
            error = float((results[arm.name] - exact).norm())
            self.first[arm.name] = FirstResult(call.window, tried.output.out, error)
        for name, result in results.items():
            self.errors[frozen_name(name) if name == arm.name else name] = result - aim
        errors = {name: result - exact for name, result in results.items()}
        return [Measured(arm, own, own is not whole, exact, errors)]


class FrozenRunner:
    """A pass with frozen casts, as the model's runner sees it."""

    def __init__(
        self, name: str, arm: Arm, teacher: Teacher, seen: Callable[[str, LayerCall], None] | None = None
    ) -> None:
        self.name, self.arm, self.teacher, self.seen = name, arm, teacher, seen

    def attend(self, call: LayerCall) -> torch.Tensor | None:
        if self.arm.failed or call.unrounded is None:
            return None
        if self.seen is not None:
            self.seen(self.name, call)
        q, k, v = (x.double() + r for x, r in zip(call.unrounded, self.teacher.roundings, strict=True))
        inner = kernel_call(call._replace(q=q, k=k, v=v), self.arm.path)
        out = exact_attention(inner, with_lse=False).out + self.teacher.errors[self.name]
        return out if call.x is not None and call.x.dtype == torch.float64 else out.float()
