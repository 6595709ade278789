"""Arms without evidence: the oracle's attention, a kernel's; and the logits of a runner's windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from verify.kernels.call import checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.registry import build_kernel
from verify.model.layer_call import AttentionPass, LayerCall
from verify.model.runner import Runner


class ExactArm:
    """float64 attention; returns None in the layer `fails_at`."""

    def __init__(self, name: str = "exact", *, fails_at: int | None = None) -> None:
        self.name, self.fails_at = name, fails_at

    def attend(self, call: LayerCall) -> torch.Tensor | None:
        if call.layer == self.fails_at:
            return None
        checked = checked_call(
            call.q,
            call.k,
            call.v,
            kv_len=call.kv_len,
            keys=call.keys,
            **call.settings.options(call.q.device),
        )
        return exact_attention(checked).out.float()


def logits_of(
    runner: Runner, tokens: np.ndarray, arms: Sequence[AttentionPass], scored: range, **options: Any
) -> dict[str, torch.Tensor]:
    """Name -> [windows that it took, scored, vocabulary]."""
    found: dict[str, list[torch.Tensor]] = {}
    slices = runner.run_group(torch.from_numpy(tokens), arms, scored=scored, whole_vocabulary=True, **options)
    for piece in slices:
        for name, values in piece.logits.items():
            found.setdefault(name, []).append(values[: len(piece.rows)].clone())
    return {name: torch.cat(parts).unflatten(0, (-1, len(scored))) for name, parts in found.items()}


def relative(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> float:
    """Greatest difference over the greatest magnitude of b."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / np.abs(b).max())


class KernelArm:
    """A kernel of ours by its specification, on the decode or the prefill path."""

    def __init__(self, spec: str, path: str) -> None:
        self.name, self.path, self.kernel = f"{spec} {path}", path, build_kernel(spec)

    def attend(self, call: LayerCall) -> torch.Tensor | None:
        checked = checked_call(
            call.q,
            call.k,
            call.v,
            kv_len=call.kv_len,
            keys=call.keys,
            path=self.path,
            **call.settings.options(call.q.device),
        )
        return self.kernel.run(checked).out
