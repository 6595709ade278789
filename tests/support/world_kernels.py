"""Right kernels of the world in plain torch, each with the roundings, the form or the manners of one that
people run. As `py:` candidates: this file imports nothing of ours.
"""

import math
import random

import torch

OFFSET = 3 * 0.6931  # what llama.cpp's CUDA kernels add to the maximum


def logits(q, k, kv_len, scale, window=None, softcap=None, slopes=None):
    """float32 [B, T, Hq, S], -inf where a row does not see."""
    ratio = q.shape[2] // k.shape[2]
    s = torch.einsum("bthd,bshd->bths", q.float(), k.float().repeat_interleave(ratio, 2)) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    position = torch.arange(k.shape[1], device=q.device)
    last = kv_len.long()[..., None, None] - 1
    if slopes is not None:
        s = s + slopes.view(1, 1, -1, 1) * (position - last)
    hidden = position > last
    if window is not None:
        hidden = hidden | (position <= last - window)
    return s.masked_fill(hidden, -math.inf)


def walked(s, v, *, tile=64, offset=0.0, stale=0.0, acc=torch.float32, p=torch.float16, sinks=None):
    """The online softmax over tiles of keys: out and lse."""
    ratio = s.shape[2] // v.shape[2]
    v = v.float().repeat_interleave(ratio, 2)
    m = torch.full(s.shape[:3], -math.inf)
    l = torch.zeros(s.shape[:3])
    a = torch.zeros(*s.shape[:3], v.shape[-1])
    for first in range(0, s.shape[-1], tile):
        x = s[..., first : first + tile]
        new = torch.maximum(m, x.amax(-1))
        if stale:
            new = torch.where(torch.isfinite(m) & (new - m < stale), m, new)
        shift = torch.where(torch.isfinite(new), new, 0.0) + offset
        old = torch.exp(m + offset - shift)
        weights = torch.exp(x - shift[..., None])
        l = l * old + weights.sum(-1)
        product = torch.einsum("bths,bshd->bthd", weights.to(p).float(), v[:, first : first + tile])
        a = (a * old[..., None] + product).to(acc).float()
        m = new
    lse = torch.where(l > 0, torch.where(torch.isfinite(m), m, 0.0) + offset + torch.log(l), -math.inf)
    out = a / torch.where(l > 0, l, 1.0)[..., None]
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.expand_as(lse))
        out, lse = out * torch.exp(lse - total)[..., None], total
    return out, lse


def plain(q, k, v, *, kv_len, scale, sliding_window=None, softcap=None, sinks=None, alibi_slopes=None):
    s = logits(q, k, kv_len, scale, sliding_window, softcap, alibi_slopes)
    return walked(s, v, sinks=sinks)


def offset_f16_sums(q, k, v, *, kv_len, scale):
    """llama.cpp's MMA kernel on CUDA."""
    return walked(logits(q, k, kv_len, scale), v, offset=OFFSET, acc=torch.float16)


def offset_f32_sums(q, k, v, *, kv_len, scale):
    return walked(logits(q, k, kv_len, scale), v, offset=OFFSET)


def offset_3(q, k, v, *, kv_len, scale):
    return walked(logits(q, k, kv_len, scale), v, offset=3.0)


def conditional_rescale(q, k, v, *, kv_len, scale):
    """FlashAttention-4: the maximum stays while it would grow by less than 8 octaves."""
    return walked(logits(q, k, kv_len, scale), v, stale=8 * math.log(2.0))


def returns_f16(q, k, v, *, kv_len, scale):
    out, lse = walked(logits(q, k, kv_len, scale), v)
    return out.half(), lse


def returns_bf16(q, k, v, *, kv_len, scale):
    out, lse = walked(logits(q, k, kv_len, scale), v)
    return out.bfloat16(), lse


def finished_in_any_order(q, k, v, *, kv_len, scale):
    """Parts are merged in the order in which they finish."""
    s, keys = logits(q, k, kv_len, scale), k.shape[1]
    parts = [(a, min(a + 16, keys)) for a in range(0, keys, 16)]
    random.shuffle(parts)
    out = lse = None
    for a, b in parts:
        more, its = walked(s[..., a:b], v[:, a:b])
        if out is None:
            out, lse = more, its
            continue
        total = torch.logaddexp(lse, its)
        safe = torch.where(torch.isfinite(total), total, 0.0)
        w, x = (torch.exp(one - safe)[..., None] for one in (lse, its))
        out, lse = out * w + more * x, total
    return out, lse


def nothing_for_no_key(q, k, v, *, kv_len, scale):
    """softmax of nothing is NaN: no care for n_kv = 0."""
    s = logits(q, k, kv_len, scale)
    ratio = q.shape[2] // k.shape[2]
    out = torch.einsum("bths,bshd->bthd", s.softmax(-1), v.float().repeat_interleave(ratio, 2))
    return out, s.logsumexp(-1)


def overflows(q, k, v, *, kv_len, scale):
    """A value that no float16 holds, for large values of V."""
    out, lse = plain(q, k, v, kv_len=kv_len, scale=scale)
    return torch.where(out.abs() > 4e4, math.inf, out), lse


def alibi_from_the_first_key(q, k, v, *, kv_len, scale, alibi_slopes=None):
    """The same weights, another origin: the lse is shifted by slope * (n_kv - 1)."""
    out, lse = plain(q, k, v, kv_len=kv_len, scale=scale, alibi_slopes=alibi_slopes)
    if alibi_slopes is not None:
        lse = lse + alibi_slopes * (kv_len[..., None] - 1)
    return out, lse


def alibi_of_another_slope(q, k, v, *, kv_len, scale, alibi_slopes=None):
    """Wrong: slopes half as steep, in out and lse."""
    half = None if alibi_slopes is None else alibi_slopes / 2
    return plain(q, k, v, kv_len=kv_len, scale=scale, alibi_slopes=half)


def latent(q, k, v, *, kv_len, scale):
    """MLA: one cache; V is its first columns, and what is given as V is not looked at."""
    return walked(logits(q, k, kv_len, scale), k[..., : v.shape[3]])


# Forms of one right kernel.


class Attention(torch.nn.Module):
    def forward(self, q, k, v, *, kv_len, scale, softcap=None):
        return plain(q, k, v, kv_len=kv_len, scale=scale, softcap=softcap)


module = Attention()


def decorated(function):
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


@decorated
def behind_args(q, k, v, *, kv_len, scale, sliding_window=None):
    return plain(q, k, v, kv_len=kv_len, scale=scale, sliding_window=sliding_window)


def ignores_the_rest(q, k, v, *, kv_len, scale, sinks=None, **rest):
    """Takes anything, and looks at sinks alone."""
    return plain(q, k, v, kv_len=kv_len, scale=scale, sinks=sinks)


def ignores_sinks_by_name(q, k, v, *, kv_len, scale, sinks=None):
    """Wrong: it says that it takes sinks."""
    return plain(q, k, v, kv_len=kv_len, scale=scale)


class BuiltIn:
    """Says nothing of its arguments, and takes none by name, as a function of an extension."""

    __signature__ = 0

    def __call__(self, q, k, v, kv_len, scale, /):
        return plain(q, k, v, kv_len=kv_len, scale=scale)


built_in = BuiltIn()


@torch.library.custom_op("world_kernels::attend", mutates_args=())
def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_len: torch.Tensor, scale: float
) -> torch.Tensor:
    return plain(q, k, v, kv_len=kv_len, scale=scale)[0]


operator = torch.ops.world_kernels.attend
