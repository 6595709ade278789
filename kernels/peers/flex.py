"""torch's FlexAttention: compiled on CUDA, in plain torch on a CPU (torch itself calls that unfused).

Options of a call are its own modifications of the score and of the mask. A row gets all keys and hides those
that it does not see, so that rows of every length run one compiled kernel.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

from verify.kernels.call import Call, Result
from verify.kernels.catalogue import FLEX_CAPABILITIES
from verify.kernels.peers.peer import Launch, PeerKernel, PeerRows

UNCOMPILED_NOTE = "the compiled kernel did not run: `flex` ran in plain torch (no CUDA device)"
# Shapes and modifications that are compiled before torch gives up and, unnoticed, computes another way.
_MOST_COMPILED = 256


@functools.cache
def _compiled() -> Callable[..., Any]:
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_COMPILED)
    # `fullgraph` makes giving up an error.
    compiled: Callable[..., Any] = torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)
    return compiled


class FlexKernel(PeerKernel):
    whole_cache = True

    def __init__(self, spec: str) -> None:
        super().__init__(spec, FLEX_CAPABILITIES, f"torch {torch.__version__}")

    def run(self, call: Call) -> Result:
        if not call.q.is_cuda and UNCOMPILED_NOTE not in self.notes:
            self.notes.append(UNCOMPILED_NOTE)
        return super().run(call)

    def prepare(self, rows: PeerRows) -> Launch:
        q, k, v = (x.transpose(1, 2) for x in (rows.q, rows.k, rows.v))
        options: dict[str, Any] = {
            "scale": rows.call.scale,
            "enable_gqa": True,
            "score_mod": _score_mod(rows),
            "block_mask": _block_mask(rows),
        }
        if hasattr(flex, "AuxRequest"):
            options["return_aux"] = flex.AuxRequest(lse=True)
        else:
            options["return_lse"] = True
        attend: Any = _compiled() if q.is_cuda else flex.flex_attention

        def launch() -> tuple[torch.Tensor, torch.Tensor]:
            with warnings.catch_warnings():
                # That it is not compiled on a CPU is in our notes.
                warnings.simplefilter("ignore")
                out, aux = attend(q, k, v, **options)
            lse = aux if isinstance(aux, torch.Tensor) else aux.lse
            return out[0].transpose(0, 1), lse[0].transpose(0, 1)

        return launch


def _block_mask(rows: PeerRows) -> Any:
    """Which keys each row sees; None where all rows see all keys, as a caller without a mask has it."""
    kv_len, window = rows.kv_len, rows.call.sliding_window
    keys = rows.k.shape[1]
    if window is None and int(kv_len.min()) == keys:
        return None

    def seen(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        visible = j < kv_len[0, i]
        return visible if window is None else visible & (j >= kv_len[0, i] - window)

    return flex.create_block_mask(seen, None, None, rows.q.shape[1], keys, device=str(rows.q.device))


def _score_mod(rows: PeerRows) -> Callable[..., torch.Tensor] | None:
    softcap, slopes, kv_len = rows.call.softcap, rows.call.alibi_slopes, rows.kv_len
    if softcap is None and slopes is None:
        return None

    def modified(
        s: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if slopes is not None:
            s = s + slopes[h] * (j - (kv_len[0, i] - 1))
        return s

    return modified
