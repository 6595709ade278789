"""Measuring the kernels of a run: each gets the exact arm's own q, k and v, layer by layer.

What it errs there is its own error: the in-place evidence rests on it, and the passes with frozen casts
(`verify.ppl.frozen`) carry it through the model. Faults can be planted in a kernel's result.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch

from verify.arms.arm import Arm, ArmRunner, FirstResult, common_cache, floor_noise, kernel_call
from verify.arms.attempt import attempt
from verify.arms.own_error import InPlace, Measured
from verify.arms.single_tokens import SingleTokens, WholeCall
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.exact import exact_attention
from verify.model.layer_call import LayerCall
from verify.ppl.record import frozen_name

# Of so many calls, at random layers and windows, one is asked twice.
ASKED_AGAIN = 4

# A fault planted in a kernel's result: the call, the oracle's result and the kernel's (both float64) to what
# is added to the kernel's.
Fault = Callable[[Call, AttentionOutput, torch.Tensor], torch.Tensor]


def is_measured(arm: Arm) -> bool:
    """Whether an arm is measured, and has a pass with frozen casts: every kernel's but the control's, and
    the floor."""
    return arm.role == "floor" or (arm.kernel is not None and arm.role != "control")


class KernelMeasurer:
    """Measures kernels on the exact arm's inputs, and keeps what the frozen passes need of one layer.

    runners: of all arms; those of `is_measured` are taken. faults: planted in the result of the
    arm `planted_in`, by the name of their pass.

    single_tokens: asks kernels that are not computed as if alone.
    first_results: filled with what each kernel gave in the first layer, where the arms that run freely are
    given the same call. errors: by frozen pass, [B, T, H, Dv] float64; roundings: of q, k and v, float64.
    """

    def __init__(
        self,
        runners: Sequence[ArmRunner],
        in_place: InPlace,
        *,
        single_tokens: SingleTokens | None = None,
        first_results: dict[str, FirstResult] | None = None,
        seed: int = 0,
        faults: Mapping[str, Fault] | None = None,
        planted_in: str = "",
    ) -> None:
        self.runners = [one for one in runners if is_measured(one.arm)]
        self.in_place, self.single_tokens, self.seed = in_place, single_tokens, seed
        self.faults, self.planted_in = faults or {}, planted_in
        self.common_cache = common_cache(one.arm for one in self.runners)
        self.first_results = {} if first_results is None else first_results
        self.errors: dict[str, torch.Tensor] = {}
        self.roundings: tuple[torch.Tensor, ...] = ()
        # Kernels' calls of the layer at hand.
        self._done: list[WholeCall] = []

    def measure(self, call: LayerCall, oracle: torch.Tensor) -> None:
        """Measure every kernel on this layer's exact inputs; `oracle` is float64 attention on them."""
        assert call.unrounded is not None
        self.roundings = tuple(
            a.double() - b.double() for a, b in zip((call.q, call.k, call.v), call.unrounded[:3], strict=True)
        )
        self.errors.clear()
        self._done.clear()
        measured = []
        for one in self.runners:
            if one.arm.kernel is None:
                self.errors[frozen_name(one.name)] = floor_noise(call, oracle, self.seed)
            elif not one.failed:
                measured += self._measure(call, one, oracle)
        self._check_beyond(call)
        self.in_place(call, measured)

    def _check_beyond(self, call: LayerCall) -> None:
        """What overflows, where the reference's kernel does not on the same inputs."""
        outs = {one.runner.name: one.out for one in self._done}
        for one in self._done:
            if one.runner.arm.reference is not None:
                one.runner.check_beyond(call, one.out, outs.get(one.runner.arm.reference))

    def ask_single_tokens(self, call: LayerCall) -> None:
        """Ask the rows of the layer that was just measured alone, of kernels that may do otherwise there."""
        if self._done and self.single_tokens is not None:
            sample = self.in_place.sample
            self.single_tokens.ask(call, self._done, sample.ordinal(call.window), sample.runs)

    def _measure(self, call: LayerCall, one: ArmRunner, oracle: torch.Tensor) -> list[Measured]:
        """One kernel's errors; none where it fails."""
        arm = one.arm
        assert arm.kernel is not None
        whole = kernel_call(call, arm.path)
        tried = attempt(arm.kernel, whole)
        tried.check_memory(arm.spec)
        if tried.output is None:
            one.fail(tried.failure, call)
            return []
        if call.layer > 0 and asked_again(self.seed, call.window, call.layer):
            self._ask_again(call, one, whole, tried.output.out, oracle)
        results = {arm.name: tried.output.out.double()}
        if arm.name == self.planted_in and self.faults:
            exactly = exact_attention(whole)
            for name, fault in self.faults.items():
                results[name] = results[arm.name] + fault(whole, exactly, results[arm.name])
        # Its arithmetic answers for what its own cache holds; what the cache loses is distance all the same,
        # unless all have it.
        own = arm.kernel.held(whole)
        exact = oracle if own is whole else exact_attention(own, with_lse=False).out
        aim = exact if self.common_cache else oracle
        errors = {name: result - exact for name, result in results.items()}
        if call.layer == 0:
            error = errors[arm.name].norm()
            self.first_results[arm.name] = FirstResult(call.window, tried.output.out, error)
        for name, result in results.items():
            carried = errors[name] if aim is exact else result - aim
            self.errors[frozen_name(name) if name == arm.name else name] = carried
        if arm.role in ("baseline", "candidate"):
            self._done.append(
                WholeCall(runner=one, whole=whole, own=own, exact=exact, aim=aim, out=tried.output.out)
            )
        return [
            Measured(
                arm=arm,
                own=own,
                alone=own is not whole,
                exact=exact,
                given=oracle,
                errors=errors,
                lse=tried.output.lse if arm.kernel.capabilities().lse else None,
            )
        ]

    def _ask_again(
        self, call: LayerCall, one: ArmRunner, whole: Call, first: torch.Tensor, oracle: torch.Tensor
    ) -> None:
        """The same call once more: a second result that lies farther off than sums in another order do."""
        assert one.arm.kernel is not None
        again = attempt(one.arm.kernel, whole)
        again.check_memory(one.arm.spec)
        if again.output is not None:
            one.note_again(call, first, again.output.out, lambda: (first.double() - oracle).norm())


def asked_again(seed: int, window: int, layer: int) -> bool:
    """Whether the call of this layer and window is asked twice: one of ASKED_AGAIN, drawn by seed."""
    return zlib.crc32(f"again/{seed}/{window}/{layer}".encode()) % ASKED_AGAIN == 0
