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

from collections.abc import Callable

import torch

from verify.arms.arm import ArmRunner, kernel_call
from verify.kernels.exact import exact_attention
from verify.model.layer_call import LayerCall
from verify.ppl.measuring import KernelMeasurer


class FrozenRunner:
    """A pass with frozen casts, as the model's runner sees it.

    free: the arm whose kernel's error it carries; it ends where that fails. measurer: has measured the layer
    at hand. on_call: called with the name and every call.
    """

    def __init__(
        self,
        name: str,
        free: ArmRunner,
        measurer: KernelMeasurer,
        on_call: Callable[[str, LayerCall], None] | None = None,
    ) -> None:
        self.name, self._free, self._measurer, self._on_call = name, free, measurer, on_call

    def attend(self, call: LayerCall) -> torch.Tensor | None:
        if self._free.failed or call.unrounded is None:
            return None
        if self._on_call is not None:
            self._on_call(self.name, call)
        q, k, v = (x.double() + r for x, r in zip(call.unrounded[:3], self._measurer.roundings, strict=True))
        inner = kernel_call(call._replace(q=q, k=k, v=v), self._free.path)
        out = exact_attention(inner, with_lse=False).out + self._measurer.errors[self.name]
        return out if call.x is not None and call.x.dtype == torch.float64 else out.float()
