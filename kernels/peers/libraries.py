"""Decode kernels of FlashInfer, flash-attn and xFormers, as their documentation says they are called."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch

from verify.kernels.catalogue import LIBRARY_CAPABILITIES
from verify.kernels.here import LIBRARIES, why_not_library
from verify.kernels.merge import from_base2
from verify.kernels.peers.peer import Launch, PeerKernel, PeerRows, refuse, version_of
from verify.kernels.plans.spec import Spec


class LibraryKernel(PeerKernel):
    """One of `LIBRARY_CAPABILITIES`, by its name."""

    def __init__(self, spec: str, name: str) -> None:
        module, distribution = LIBRARIES[name]
        super().__init__(spec, LIBRARY_CAPABILITIES[name], version_of(distribution))
        self._prepare = functools.partial(_PREPARE[name], import_module(module))

    @classmethod
    def from_spec(cls, spec: Spec) -> LibraryKernel:
        refuse(spec.text, why_not_library(spec.name))
        return cls(spec.text, spec.name)

    def prepare(self, rows: PeerRows) -> Launch:
        launch: Launch = self._prepare(rows)
        return launch


def _flashinfer(library: Any, rows: PeerRows) -> Launch:
    """single_decode_with_kv_cache; its lse is a base-2 logarithm, its window counts the keys to the left."""
    q, k, v, window = rows.q[0, 0], rows.k[0], rows.v[0], rows.call.sliding_window

    def launch() -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = library.single_decode_with_kv_cache(
            q, k, v, kv_layout="NHD", use_tensor_cores=True, sm_scale=rows.call.scale,
            window_left=-1 if window is None else window - 1,
            logits_soft_cap=rows.call.softcap, return_lse=True,
        )  # fmt: skip
        return out[None], from_base2(lse)[None]

    return launch


def _flash_attn(library: Any, rows: PeerRows) -> Launch:
    """flash_attn_with_kvcache, the split-KV decode kernel; its window counts the keys to the left."""
    window, slopes = rows.call.sliding_window, rows.call.alibi_slopes
    lengths = rows.kv_len[0].to(torch.int32)

    def launch() -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = library.flash_attn_with_kvcache(
            rows.q, rows.k, rows.v, cache_seqlens=lengths, softmax_scale=rows.call.scale, causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=rows.call.softcap or 0.0, alibi_slopes=None if slopes is None else slopes.float(),
            return_softmax_lse=True,
        )  # fmt: skip
        return out[0], lse[0].transpose(0, 1)

    return launch


def _xformers(library: Any, rows: PeerRows) -> Launch:
    """memory_efficient_attention on [B, T, groups, heads, D], with KV heads expanded, not copied."""
    attend = import_module("xformers.ops").memory_efficient_attention
    shape = rows.call.shape
    q = rows.q.unflatten(2, (shape.kv_heads, shape.ratio))
    k, v = (x[:, :, :, None].expand(-1, -1, -1, shape.ratio, -1) for x in (rows.k, rows.v))

    def launch() -> tuple[torch.Tensor, None]:
        return attend(q, k, v, scale=rows.call.scale)[0].flatten(1, 2), None

    return launch


_PREPARE = {"flashinfer": _flashinfer, "flash_attn": _flash_attn, "xformers": _xformers}
