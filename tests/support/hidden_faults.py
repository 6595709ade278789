"""Kernels that are right on what is mostly drawn, each wrong on one kind of input. As `py:` candidates: this
file imports nothing of ours.

Reports that the faults were seen in are named beside them; the code is our own.
"""

import math

import torch


def visible(q, k, kv_len, window=None):
    """bool [B, T, 1, S]: the keys that a row sees."""
    n = kv_len.long()[..., None, None]
    position = torch.arange(k.shape[1], device=k.device)
    seen = position < n
    return seen if window is None else seen & (position >= n - window)


def logits(q, k, scale, softcap=None):
    """float32 [B, T, Hq, S], nothing hidden."""
    s = torch.einsum("bthd,bshd->bths", q.float(), k.float().repeat_interleave(q.shape[2] // k.shape[2], 2))
    s = s * scale
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def weighted(s, seen, v, sinks=None):
    """softmax over what is seen, times v; a sink is a key of value 0."""
    s = s.masked_fill(~seen, -math.inf)
    top = s.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.view(1, 1, -1, 1))
    top = torch.where(torch.isfinite(top), top, 0.0)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.view(1, 1, -1, 1) - top)
    out = torch.einsum("bths,bshd->bthd", p, v.float().repeat_interleave(s.shape[2] // v.shape[2], 2))
    return out / torch.where(total == 0, 1.0, total)


def right(q, k, v, *, kv_len, scale, sliding_window=None, softcap=None, sinks=None):
    return weighted(logits(q, k, scale, softcap), visible(q, k, kv_len, sliding_window), v, sinks)


def finite_floor(q, k, v, *, kv_len, scale):
    """FlashInfer #4267: the maximum starts at -5e4, on logits before the scale."""
    raw = logits(q, k, 1.0).masked_fill(~visible(q, k, kv_len), -math.inf)
    p = torch.exp((raw - raw.amax(-1, keepdim=True).clamp(min=-5e4)) * scale)
    total = p.sum(-1, keepdim=True)
    out = torch.einsum("bths,bshd->bthd", p, v.float().repeat_interleave(q.shape[2] // v.shape[2], 2))
    return out / torch.where(total == 0, 1.0, total)


def sink_again(q, k, v, *, kv_len, scale, sliding_window=None, sinks=None):
    """ROCm #12227: where a window leaves the first of four parts empty, its sink counts twice."""
    if sinks is None or sliding_window is None:
        return right(q, k, v, kv_len=kv_len, scale=scale, sliding_window=sliding_window, sinks=sinks)
    seen, s = visible(q, k, kv_len, sliding_window), logits(q, k, scale)
    once = weighted(s, seen, v, sinks)
    twice = weighted(s, seen, v, sinks + math.log(2.0))
    empty = (kv_len - sliding_window >= -(-k.shape[1] // 4))[..., None, None]
    return torch.where(empty, twice, once)


def cap_after_mask(q, k, v, *, kv_len, scale, sliding_window=None, softcap=None):
    """ONNX #7867, FlashInfer #350: minus infinity before the window becomes minus the cap."""
    seen = visible(q, k, kv_len, sliding_window)
    if softcap is None or sliding_window is None:
        return weighted(logits(q, k, scale, softcap), seen, v)
    s = torch.where(seen, logits(q, k, scale, softcap), -softcap)
    return weighted(s, visible(q, k, kv_len), v)


def capped_sink(q, k, v, *, kv_len, scale, softcap=None, sinks=None):
    """ROCm #12227, its second half: under a softcap the sink is scaled as a raw logit."""
    scaled = sinks * scale if softcap is not None and sinks is not None else sinks
    return right(q, k, v, kv_len=kv_len, scale=scale, softcap=softcap, sinks=scaled)


def first_length(q, k, v, *, kv_len, scale):
    """jax #23349: every sequence is as long as the first."""
    return right(q, k, v, kv_len=kv_len[:1].expand_as(kv_len), scale=scale)


def third_sequence(q, k, v, *, kv_len, scale):
    """llama.cpp #7903: from the third sequence on, the first's results."""
    out = right(q, k, v, kv_len=kv_len, scale=scale)
    out[2:] = out[:1].clone()
    return out


def many_entries(q, k, v, *, kv_len, scale):
    """aiter #4076: from the ninth row and sequence of a call on, a little of another's result."""
    out = right(q, k, v, kv_len=kv_len, scale=scale)
    flat = out.flatten(0, 1)
    mixed = flat.clone()
    mixed[8:] = 0.97 * flat[8:] + 0.03 * flat[: max(len(flat) - 8, 0)]
    return mixed.view_as(out)


def four_of_prefill(q, k, v, *, kv_len, scale, path):
    """A call of four query tokens, causal: all of them get the first's query."""
    asked = q[:, :1].expand_as(q) if path == "prefill" and q.shape[1] == 4 else q
    return right(asked, k, v, kv_len=kv_len, scale=scale)


def few_of_prefill(q, k, v, *, kv_len, scale, path):
    """llama.cpp #26358: 4 to 8 tokens are packed as if there were one."""
    grouped = q.shape[2] > k.shape[2] and path == "prefill" and 4 <= q.shape[1] <= 8
    asked = torch.cat((q[:, :1], q[:, :1].expand_as(q[:, 1:])), 1) if grouped else q
    return right(asked, k, v, kv_len=kv_len, scale=scale)


def spoiled_by_nan(q, k, v, *, kv_len, scale, sliding_window=None):
    """vLLM #30887: right as long as what no row sees is finite: its weight is 0, and 0 * NaN is NaN."""
    return right(q, k, v, kv_len=kv_len, scale=scale, sliding_window=sliding_window)


def long_bfloat16(q, k, v, *, kv_len, scale):
    """Wrong in bfloat16 from 1,024 keys on: sixteen values are lost."""
    if q.dtype == torch.bfloat16 and k.shape[1] >= 1024:
        v = v.clone()
        v[:, 1000:1016] = 0
    return right(q, k, v, kv_len=kv_len, scale=scale)


def sixteen_heads(q, k, v, *, kv_len, scale):
    """vLLM #42956: of more than 16 query heads a KV head the rest repeats the first."""
    out = right(q, k, v, kv_len=kv_len, scale=scale)
    ratio = q.shape[2] // k.shape[2]
    if ratio <= 16:
        return out
    of_group = out.unflatten(2, (-1, ratio))
    repeated = [of_group[:, :, :, i % 16] for i in range(ratio)]
    return torch.stack(repeated, 3).flatten(2, 3)


def newest_cells(q, k, v, *, kv_len, scale, sliding_window=None):
    """ik_llama.cpp #2186: with a window, K and V are cut to the newest cells that the cache holds."""
    seen = visible(q, k, kv_len, sliding_window)
    if sliding_window is not None:
        kept = -(-(256 + sliding_window) // 256) * 256
        seen = seen & (torch.arange(k.shape[1], device=k.device) >= k.shape[1] - kept)
    return weighted(logits(q, k, scale), seen, v)


_lengths = {}


def captured_lengths(q, k, v, *, kv_len, scale):
    """llama.cpp #21640, FlashInfer #1968: a graph that was captured keeps the lengths that it saw first."""
    kept = _lengths.setdefault((tuple(q.shape), tuple(k.shape)), kv_len.clone())
    return right(q, k, v, kv_len=kept, scale=scale)


def sixteens(q, k, v, *, kv_len, scale):
    """FlashInfer #4299: columns beyond a multiple of 16 are not in the product."""
    d = k.shape[3] // 16 * 16
    return right(q[..., :d], k[..., :d], v, kv_len=kv_len, scale=scale)


def wide_values(q, k, v, *, kv_len, scale):
    """TensorRT-LLM #18244: at head size 256 every second half of a tile of V is the half before."""
    if k.shape[3] == 256:
        j = torch.arange(v.shape[1], device=v.device)
        v = v[:, torch.where(j % 64 < 32, j, j - 32)]
    return right(q, k, v, kv_len=kv_len, scale=scale)


def latent_blocks(q, k, v, *, kv_len, scale):
    """ik_llama.cpp #2031: where K is wider than V, blocks of V are counted in rows of K."""
    if k.shape[3] > v.shape[3]:
        j = torch.arange(v.shape[1], device=v.device)
        v = v[:, (j // 64 * (64 * v.shape[3] // k.shape[3]) + j % 64).clamp(max=v.shape[1] - 1)]
    return right(q, k, v, kv_len=kv_len, scale=scale)


def lengths_of_eight(q, k, v, *, kv_len, scale):
    """Rows are as long as the next multiple of eight."""
    n = ((kv_len + 7) // 8 * 8).clamp(max=k.shape[1])
    return right(q, k, v, kv_len=torch.where(kv_len > 0, n, kv_len), scale=scale)


def neighbours_scale(q, k, v, *, kv_len, scale):
    """kekzl/imp #1314: one step of rounding for all rows and sequences of a call."""
    step = q.float().abs().amax().clamp(min=1e-6) * 2.0**-11
    return right(torch.round(q.float() / step) * step, k, v, kv_len=kv_len, scale=scale)


def masks_by_adding(q, k, v, *, kv_len, scale):
    """Right: torch.finfo(torch.float16).min on what is hidden, as in many models' code."""
    s = logits(q, k, scale) + torch.where(visible(q, k, kv_len), 0.0, -65504.0)
    return weighted(s, torch.ones_like(s, dtype=torch.bool), v)


def hides_nothing(q, k, v, *, kv_len, scale):
    """Keys beyond kv_len are seen."""
    s = logits(q, k, scale)
    return weighted(s, torch.ones_like(s, dtype=torch.bool), v)
