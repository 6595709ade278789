"""Right kernels as people write them, each rounding in its own way: none of them may ever be called broken.

Every function keeps the contract of a `py:` kernel and runs on the inputs' device. They share one tiled
online softmax whose roundings are arguments; those that do not (`sdpa`, `plain`, `in_float64`) say so.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
# ln 2 * 3, as llama.cpp's CUDA kernel adds it to the maximum so that float16 sums have headroom.
GGML_OFFSET = 3 * 0.6931


def exp_by_cubic(x: torch.Tensor) -> torch.Tensor:
    """2^whole times a cubic of the rest, 9e-5 off at most: FlashAttention 4's, beside the GPU's own."""
    y = x * math.log2(math.e)
    whole = torch.floor(y.clamp(min=-150.0))
    f = y.clamp(min=-150.0) - whole
    poly = 1.0 + f * (0.695146143436431 + f * (0.227564394474029 + f * 0.077119089663028))
    return torch.where(x == -math.inf, torch.zeros_like(x), torch.ldexp(poly, whole.to(torch.int32)))


def exp_by_two(x: torch.Tensor) -> torch.Tensor:
    """exp(x) as 2^(x log2 e), the one exponential that a GPU has."""
    return torch.exp2(x * math.log2(math.e))


@dataclass(frozen=True)
class Roundings:
    """How a right kernel computes; the defaults are a textbook kernel in float32."""

    p: torch.dtype = torch.float16  # type of P as it enters the second product
    result: torch.dtype = torch.float32  # type that comes back
    accumulator: torch.dtype = torch.float32  # type of the sum of P V, rounded to after every tile
    query: torch.dtype | None = None  # type that the scaled query is rounded to, None where it is not
    tile: int = 64  # keys a tile
    parts: int = 1  # equal pieces of the KV range, merged at the end
    merge: str = "sequence"  # sequence, tree, or any (another order at each call)
    offset: float = 0.0  # added to the maximum
    stale: float = 0.0  # a maximum that grew by less is not taken over (FlashAttention 4)
    sum_of_rounded_p: bool = False  # whether the denominator adds up the rounded P
    exp: Callable[[torch.Tensor], torch.Tensor] = torch.exp


def _logits(q, k, kv_len, scale, window, softcap, alibi, query) -> torch.Tensor:
    """[B, Hq, T, S] in float32, -inf where a row does not see a key."""
    ratio = q.shape[2] // k.shape[2]
    keys = k.float().repeat_interleave(ratio, 2)
    x = q.float() * scale
    x = torch.einsum("bthd,bshd->bhts", x if query is None else x.to(query).float(), keys)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    place = torch.arange(k.shape[1], device=q.device)
    length = kv_len.to(q.device)[:, None, :, None]
    if alibi is not None:
        x = x - alibi.to(q.device).float()[None, :, None, None] * (length - 1 - place)
    seen = place < length
    if window is not None:
        seen = seen & (place >= length - window)
    return x.masked_fill(~seen, -math.inf)


def _part(x: torch.Tensor, v: torch.Tensor, how: Roundings) -> Pair:
    """(o, lse) of some keys: x [B, H, T, n], v [B, H, n, Dv]."""
    m = torch.full((*x.shape[:3], 1), -math.inf, device=x.device)
    total = torch.zeros_like(m)
    acc = torch.zeros(*x.shape[:3], v.shape[-1], dtype=how.accumulator, device=x.device)
    for first in range(0, x.shape[3], how.tile):
        tile = x[..., first : first + how.tile]
        new = torch.maximum(m, tile.amax(-1, keepdim=True))
        if how.stale:
            new = torch.where(torch.isfinite(m) & (new - m < how.stale), m, new)
        base = torch.where(torch.isinf(new), torch.zeros_like(new), new + how.offset)
        fade = torch.where(torch.isinf(m), torch.zeros_like(m), how.exp(m + how.offset - base))
        p = torch.where(torch.isinf(tile), torch.zeros_like(tile), how.exp(tile - base))
        rounded = p.to(how.p).float()
        total = total * fade + (rounded if how.sum_of_rounded_p else p).sum(-1, keepdim=True)
        product = rounded @ v[..., first : first + how.tile, :].float()
        acc = (acc.float() * fade + product).to(how.accumulator)
        m = new
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    lse = torch.where(empty, torch.full_like(m, -math.inf), m + how.offset + torch.log(safe))
    return torch.where(empty, torch.zeros_like(acc, dtype=torch.float32), acc.float() / safe), lse


def _merge(a: Pair, b: Pair) -> Pair:
    top = torch.maximum(a[1], b[1])
    base = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    wa, wb = torch.exp(a[1] - base), torch.exp(b[1] - base)
    total = wa + wb
    safe = torch.where(total == 0, torch.ones_like(total), total)
    lse = torch.where(total == 0, torch.full_like(total, -math.inf), base + torch.log(safe))
    return (a[0] * wa + b[0] * wb) / safe, lse


def tiled(
    q, k, v, *, kv_len, scale, how, sliding_window=None, softcap=None, sinks=None, alibi_slopes=None
) -> Pair:
    """Attention with the roundings of `how`: out [B, T, Hq, Dv] and lse [B, T, Hq]."""
    x = _logits(q, k, kv_len, scale, sliding_window, softcap, alibi_slopes, how.query)
    values = v.repeat_interleave(q.shape[2] // k.shape[2], 2).permute(0, 2, 1, 3)
    keys = x.shape[3]
    edges = [i * keys // how.parts for i in range(how.parts + 1)]
    pieces = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    parts = [_part(x[..., a:b], values[..., a:b, :], how) for a, b in pieces]
    if sinks is not None:
        one = torch.zeros_like(parts[0][0])
        parts.append((one, sinks.to(q.device).float()[None, :, None, None].expand_as(parts[0][1])))
    if how.merge == "any":
        parts = [parts[i] for i in torch.randperm(len(parts)).tolist()]
    while how.merge == "tree" and len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [_merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    out, lse = functools.reduce(_merge, parts)
    return out.transpose(1, 2).to(how.result), lse.squeeze(-1).transpose(1, 2)


def _kernel(**roundings):
    """A `py:` kernel of these roundings, with every option of the contract."""

    def attend(q, k, v, *, kv_len, scale, sliding_window=None, softcap=None, sinks=None, alibi_slopes=None):
        more = {"sliding_window": sliding_window, "softcap": softcap, "alibi_slopes": alibi_slopes}
        how = Roundings(**roundings)
        return tiled(q, k, v, kv_len=kv_len, scale=scale, how=how, sinks=sinks, **more)

    return attend


textbook = _kernel()
textbook_f16 = _kernel(result=torch.float16)
textbook_bf16 = _kernel(result=torch.bfloat16)
float32_p = _kernel(p=torch.float32)
bf16_p = _kernel(p=torch.bfloat16)
small_tiles = _kernel(tile=16)
large_tiles = _kernel(tile=256)
sequence_of_parts = _kernel(parts=7)
tree_of_parts = _kernel(parts=7, merge="tree")
parts_in_any_order = _kernel(parts=7, merge="any")
sums_rounded_p = _kernel(sum_of_rounded_p=True)
half_query = _kernel(query=torch.float16)
half_query_half_result = _kernel(query=torch.float16, result=torch.float16)
float16_sums = _kernel(accumulator=torch.float16)
float16_sums_in_parts = _kernel(accumulator=torch.float16, parts=8)
# llama.cpp's CUDA kernel for tensor cores, and with float32 sums; and an offset of three nats.
ggml_offset_float16_sums = _kernel(accumulator=torch.float16, offset=GGML_OFFSET)
ggml_offset = _kernel(offset=GGML_OFFSET)
three_nats_offset = _kernel(offset=3.0)
# FlashAttention 4: a maximum that grew by less than 8 bits is not taken over.
lazy_rescale = _kernel(stale=8 * math.log(2), result=torch.float16)
lazy_rescale_f32 = _kernel(stale=8 * math.log(2))
exp2 = _kernel(exp=exp_by_two)
cubic_exponential = _kernel(exp=exp_by_cubic)


def plain(q, k, v, *, kv_len, scale):
    """Softmax and a product in float32, no tiles, no lse: what a reader writes first."""
    x = _logits(q, k, kv_len, scale, None, None, None, None)
    weights = torch.softmax(x, -1).nan_to_num(0.0)
    values = v.float().repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bhts,bshd->bthd", weights, values)


def in_float64(q, k, v, *, kv_len, scale):
    """The formula in float64: closer to exact than any kernel."""
    ratio = q.shape[2] // k.shape[2]
    x = torch.einsum("bthd,bshd->bhts", q.double(), k.double().repeat_interleave(ratio, 2)) * scale
    hidden = torch.arange(k.shape[1], device=q.device) >= kv_len.to(q.device)[:, None, :, None]
    weights = torch.softmax(x.masked_fill(hidden, -math.inf), -1).nan_to_num(0.0)
    return torch.einsum("bhts,bshd->bthd", weights, v.double().repeat_interleave(ratio, 2)).float()


def sdpa(q, k, v, *, kv_len, scale):
    """torch's own operator with a mask, as most wrappers call it; its result has the inputs' type."""
    ratio = q.shape[2] // k.shape[2]
    heads = [x.repeat_interleave(ratio if x is not q else 1, 2).transpose(1, 2) for x in (q, k, v)]
    seen = torch.arange(k.shape[1], device=q.device) < kv_len.to(q.device)[:, None, :, None]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale)
    return out.transpose(1, 2).nan_to_num(0.0)
