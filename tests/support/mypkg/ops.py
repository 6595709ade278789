"""One right kernel in the forms in which people have one."""

import torch
import torch.nn.functional as F

from .util import masked, shared, softmax_v


def attend(q, k, v, *, kv_len, scale):
    s = torch.einsum("bthd,bshd->bths", q.float(), shared(k, q.shape[2])) * scale
    s = masked(s, (torch.arange(k.shape[1], device=q.device) < kv_len[..., None])[:, :, None])
    return torch.nan_to_num(softmax_v(s, shared(v, q.shape[2])))


class Ops:
    @staticmethod
    def attend(q, k, v, *, kv_len, scale):
        return attend(q, k, v, kv_len=kv_len, scale=scale)


class Attn:
    """Has to be constructed, and is told its block."""

    def __init__(self, block, name="attn"):
        self.block, self.name = block, name

    def __call__(self, q, k, v, *, kv_len, scale):
        return attend(q, k, v, kv_len=kv_len, scale=scale)

    def decode(self, q, k, v, *, kv_len, scale):
        return self(q, k, v, kv_len=kv_len, scale=scale)


class Layer(torch.nn.Module):
    def forward(self, q, k, v, *, kv_len, scale):
        return attend(q, k, v, kv_len=kv_len, scale=scale)


layer = Layer()


def needs_block(q, k, v, *, kv_len, scale, block):
    assert block == 64
    return attend(q, k, v, kv_len=kv_len, scale=scale)


def dense(q, k, v):
    s = torch.einsum("bthd,bshd->bths", q.float(), shared(k, q.shape[2])) * q.shape[-1] ** -0.5
    return softmax_v(s, shared(v, q.shape[2]))


def causal(q, k, v, sm_scale):
    """The last row sees the last key."""
    s = torch.einsum("bthd,bshd->bths", q.float(), shared(k, q.shape[2])) * sm_scale
    rows, keys = q.shape[1], k.shape[1]
    seen = torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None]
    return softmax_v(masked(s, seen[:, None]), shared(v, q.shape[2]))


def square(q, k, v, is_causal=False):
    """A prefill: a triangle that begins at the first key, heads before rows."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


def heads_first(q, k, v, *, kv_len, scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, kv_len=kv_len, scale=scale).transpose(1, 2)


def takes_a_mask(q, k, v, attn_mask, scale):
    s = torch.einsum("bthd,bshd->bths", q.float(), shared(k, q.shape[2])) * scale
    return softmax_v(masked(s, attn_mask.transpose(1, 2)), shared(v, q.shape[2]))


def bf16_only(q, k, v, *, kv_len, scale):
    if q.dtype != torch.bfloat16:
        raise TypeError("bfloat16 alone")
    return attend(q, k, v, kv_len=kv_len, scale=scale)


def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal=False):
    """Tokens of all sequences after one another, as flash-attention's function of that kind."""
    outs = []
    bounds = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False)
    for b, (first, last) in enumerate(bounds):
        start, stop = cu_seqlens_k[b], cu_seqlens_k[b + 1]
        rows, n = last - first, int(stop - start)
        lengths = torch.arange(n - rows + 1, n + 1) if causal else torch.full((rows,), n)
        one = attend(q[None, first:last], k[None, start:stop], v[None, start:stop],
                     kv_len=lengths[None], scale=softmax_scale)  # fmt: skip
        outs.append(one[0])
    return torch.cat(outs)


def no_shared_heads(q, k, v, *, scale):
    assert q.shape[2] == k.shape[2]
    return dense(q, k, v) if scale else None


def paged(q, k_pages, v_pages, block_table, *, kv_len, scale):
    """Keys in pages, as servers have them, and in no other way."""
    page = k_pages.shape[1]
    outs = []
    for b, table in enumerate(block_table):
        used = table[: max(-(-int(kv_len[b].max()) // page), 1)].long().clamp(0, len(k_pages) - 1)
        k, v = (x[used].flatten(0, 1)[None].nan_to_num() for x in (k_pages, v_pages))
        outs.append(attend(q[b : b + 1], k, v, kv_len=kv_len[b : b + 1], scale=scale))
    return torch.cat(outs)


def varlen(q, k, v, cu_seqlens, *, kv_len, scale):
    """Tokens of all sequences after one another: q [sum T, Hq, D], kv_len [sum T]."""
    outs = []
    for b in range(len(cu_seqlens) - 1):
        own = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        outs.append(attend(q[None, own], k[b : b + 1], v[b : b + 1], kv_len=kv_len[None, own], scale=scale))
    return torch.cat(outs, 1)[0]


def any_mask(q, k, v, *, kv_len, scale, attn_mask=None, keys=None):
    """A mask beside lengths, of truth values or numbers, and lists of keys."""
    s = torch.einsum("bthd,bshd->bths", q.float(), shared(k, q.shape[2])) * scale
    s = masked(s, (torch.arange(k.shape[1], device=q.device) < kv_len[..., None])[:, :, None])
    if attn_mask is not None:
        mask = attn_mask.transpose(1, 2)
        s = masked(s, mask) if mask.dtype == torch.bool else s + mask
    if keys is not None:
        listed = torch.zeros((*keys.shape[:2], k.shape[1] + 1), dtype=torch.bool)
        # What is -1 goes into one place more than there are keys.
        listed.scatter_(2, torch.where(keys >= 0, keys, k.shape[1]).long(), True)
        s = masked(s, listed[:, :, None, :-1])
    return torch.nan_to_num(softmax_v(s, shared(v, q.shape[2])))


def says_nothing(q, k, v, **given):
    """Takes pages and masks behind keywords that nobody sees."""
    if "block_table" in given:
        return paged(q, k, v, **given)
    if "mask" in given:
        given["attn_mask"] = given.pop("mask")
    unknown = set(given) - {"kv_len", "scale", "attn_mask"}
    if unknown:
        raise TypeError(f"unknown {unknown}")
    return any_mask(q, k, v, **given)
