"""torch's scaled_dot_product_attention, through one of its backends; whichever was asked for, or none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from verify.kernels.call import Call, Result
from verify.kernels.catalogue import SDPA_CAPABILITIES
from verify.kernels.errors import KernelFailure
from verify.kernels.here import NO_CUDA, has_cuda
from verify.kernels.peers.peer import Launch, PeerKernel, PeerRows, refuse
from verify.kernels.plans.spec import Spec

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def why_not_sdpa(variant: str) -> str | None:
    """Why a backend cannot run here, or None if it can."""
    if "cpu" not in SDPA_CAPABILITIES[variant].devices and not has_cuda():
        return NO_CUDA
    return None


class SdpaKernel(PeerKernel):
    """One backend. `efficient` has one KV head a query head: they are repeated before the launch."""

    def __init__(self, spec: str, variant: str) -> None:
        super().__init__(spec, SDPA_CAPABILITIES[variant], f"torch {torch.__version__}")
        self.variant = variant

    @classmethod
    def from_spec(cls, spec: Spec) -> SdpaKernel:
        refuse(spec.text, why_not_sdpa(spec.target))
        return cls(spec.text, spec.target)

    def run(self, call: Call) -> Result:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                return super().run(call)
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                reason = f"{self.spec}: torch has no kernel for this call: {_reasons(said)}"
                raise KernelFailure("unsupported", reason) from None

    def prepare(self, rows: PeerRows) -> Launch:
        q, k, v = (x.transpose(1, 2) for x in (rows.q, rows.k, rows.v))
        if self.variant == "efficient":
            k, v = (x.repeat_interleave(rows.call.shape.ratio, dim=1) for x in (k, v))
        mask = None
        if rows.call.path == "prefill":
            mask = torch.arange(k.shape[2], device=q.device) < rows.kv_len[0, :, None]
        backend, scale = _BACKENDS[self.variant], rows.call.scale
        grouped, waived = self.variant != "efficient", not self.capabilities().deterministic

        def launch() -> tuple[torch.Tensor, None]:
            with sdpa_kernel([backend]), _determinism_waived(waived):
                found = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped
                )
            return found[0].transpose(0, 1), None

        return launch


@contextmanager
def _determinism_waived(waived: bool) -> Iterator[None]:
    """Within it, torch may choose what it does not call deterministic."""
    mode = torch.get_deterministic_debug_mode()
    if waived and mode:
        torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        if waived and mode:
            torch.set_deterministic_debug_mode(mode)


def _reasons(said: Sequence[warnings.WarningMessage]) -> str:
    """What torch warned about while it refused a call, once a process for some of it."""
    told = [str(warning.message).split(" (Triggered")[0] for warning in said]
    # "... not used because:" is a heading; backends that were not asked for are disabled.
    told = [text for text in told if "not used because" not in text and "disabled" not in text]
    return " ".join("; ".join(told).split()) or "it does not say why"
