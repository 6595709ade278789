"""llama.cpp's attention on CUDA from 8,192 keys on, emulated in plain torch; and paths of libraries.

`mma` follows fattn-mma-f16.cuh as it is known to compute for text generation. A part of the keys is a
block's (stream-k: parts of whole tiles of 64 keys). In each tile four warps take 16 keys each and keep a
maximum, a sum and an accumulator of their own. The maximum is raised by 3 * 0.6931, P is rounded to float16,
the matrix product of 16 keys is added to a float16 accumulator and rounded, and a rescale rounds it as well.
Warps, and then parts, are merged as they are, without a division; l is summed in float32 from P before it was
rounded.
As `py:` candidates: this file imports nothing of ours.
"""

import itertools
import math

import torch

OFFSET = 3 * 0.6931
TILE, WARPS, KEYS = 64, 4, 16
PARTS = 11
# From this length on mainline takes the matrix kernel, where more than four query heads share a KV head.
SWITCH = 8192


def logits(q, k, kv_len, scale):
    """float32 [B, T, Hq, S], -inf where a row does not see."""
    ratio = q.shape[2] // k.shape[2]
    s = torch.einsum("bthd,bshd->bths", q.float(), k.float().repeat_interleave(ratio, 2)) * scale
    return s.masked_fill(torch.arange(k.shape[1]) >= kv_len.long()[..., None, None], -math.inf)


def bounds(keys, parts):
    """Bounds of parts of whole tiles, as even as can be."""
    tiles = -(-keys // TILE)
    return sorted({tiles * i // parts * TILE for i in range(parts)} | {tiles * TILE})


def mma(q, k, v, *, kv_len, scale, parts=PARTS, acc=torch.float16, warps=WARPS, offset=OFFSET, without=()):
    """without: keys that are left out, as a fault has it."""
    s = logits(q, k, kv_len, scale)
    if without:
        s[..., list(without)] = -math.inf
    cut = bounds(s.shape[-1], parts)
    longest = max(b - a for a, b in itertools.pairwise(cut)) // TILE
    ratio = q.shape[2] // k.shape[2]
    wide = v.float().repeat_interleave(ratio, 2).transpose(1, 2)  # [B, Hq, S, Dv]
    x = s.transpose(1, 2)  # [B, Hq, T, S]
    room = cut[-1] - x.shape[-1]
    x = torch.nn.functional.pad(x, (0, room), value=-math.inf)
    wide = torch.nn.functional.pad(wide, (0, 0, 0, room))
    shape = (*x.shape[:3], len(cut) - 1, warps)
    m = torch.full(shape, -1e30)
    l = torch.zeros(shape)
    a = torch.zeros(*shape, wide.shape[-1])
    each = TILE // warps
    for t in range(longest):
        # Tile t of every part; a part that has none repeats keys that weigh nothing.
        first = torch.tensor([p + t * TILE for p in cut[:-1]])
        has = torch.tensor([p + t * TILE < e for p, e in itertools.pairwise(cut)])
        at = (first.clamp(max=x.shape[-1] - TILE)[:, None] + torch.arange(TILE)).view(-1, warps, each)
        y = x[..., at].masked_fill(~has[:, None, None], -math.inf)  # [B, Hq, T, parts, warps, 16]
        new = torch.maximum(m, y.amax(-1) + offset)
        old = torch.exp(m - new)
        old = torch.where(m - new >= -20.0, old, 0.0)
        p = torch.exp(y - new[..., None])
        l = l * old + p.sum(-1)
        a = (a * old.to(acc).float()[..., None]).to(acc).float()
        p = p.half().float()
        for i in range(0, each, KEYS):
            product = torch.einsum(
                "bhtpwk,bhpwkd->bhtpwd", p[..., i : i + KEYS], wide[:, :, at[..., i : i + KEYS]]
            )
            a = (a + product).to(acc).float()
        m = new
    top = m.flatten(3).amax(-1)[..., None, None]
    weight = torch.exp(m - top)
    total = (l * weight).sum((-2, -1))
    out = (a * weight[..., None]).sum((-3, -2)) / total[..., None]
    return out.transpose(1, 2)


def vector(q, k, v, *, kv_len, scale):
    """Its kernel for shorter rows, as seen: everything in float32, no offset."""
    s = logits(q, k, kv_len, scale)
    p = torch.exp(s - s.amax(-1, keepdim=True))
    wide = v.float().repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bths,bshd->bthd", p, wide) / p.sum(-1, keepdim=True)


def mainline(q, k, v, *, kv_len, scale):
    """Both, by length."""
    chosen = mma if k.shape[1] >= SWITCH else vector
    return chosen(q, k, v, kv_len=kv_len, scale=scale)


def f32_sums(q, k, v, *, kv_len, scale):
    """The same walk with float32 accumulators."""
    return mma(q, k, v, kv_len=kv_len, scale=scale, acc=torch.float32)


def one_part(q, k, v, *, kv_len, scale):
    return mma(q, k, v, kv_len=kv_len, scale=scale, parts=1, warps=1)


def drops_a_key(q, k, v, *, kv_len, scale, parts=PARTS):
    """A fault: one key is left out."""
    return mma(q, k, v, kv_len=kv_len, scale=scale, parts=parts, without=(k.shape[1] // 3,))


def one_head_off(q, k, v, *, kv_len, scale, parts=PARTS):
    """A fault: one head comes out 0.1 % too large."""
    out = mma(q, k, v, kv_len=kv_len, scale=scale, parts=parts)
    out[:, :, -1] *= 1.001
    return out


def rounded_tf32(x):
    """float32 of 11 bits, to nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def narrow_sums(q, k, v, *, kv_len, scale, kind=rounded_tf32, divided=False, out=torch.float32):
    """A textbook kernel whose sums are rounded after every 16 keys; divided: P is, by l, before."""
    s = logits(q, k, kv_len, scale)
    p = torch.exp(s - s.amax(-1, keepdim=True))
    l = p.sum(-1, keepdim=True)
    p = (p / l if divided else p).half().float()
    wide = v.float().repeat_interleave(q.shape[2] // k.shape[2], 2)
    a = p.new_zeros(*s.shape[:3], v.shape[-1])
    for i in range(0, k.shape[1], KEYS):
        a = kind(a + torch.einsum("bths,bshd->bthd", p[..., i : i + KEYS], wide[:, i : i + KEYS]))
    return (a if divided else a / l).to(out)


def matrix_products(q, k, v, *, kv_len, scale, lanes=32, split=1):
    """Attention by two matrix products of a library, as sdpa's `math` on a GPU: probabilities are divided by
    l in float32 before the second one. That fuses multiplication and addition, each of its lanes takes every
    so many keys, and each of its splits a range of them; their sums are added up."""
    p = torch.softmax(logits(q, k, kv_len, scale), -1)
    wide = v.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    room = -k.shape[1] % (lanes * split)
    p = torch.nn.functional.pad(p, (0, room)).double().unflatten(-1, (split, -1, lanes))
    wide = torch.nn.functional.pad(wide, (0, 0, 0, 0, 0, room)).unflatten(1, (split, -1, lanes))
    a = wide.new_zeros(*p.shape[:4], lanes, v.shape[-1])
    for i in range(p.shape[4]):
        # One rounding to float32 a step: products of 24 and 11 bits are exact in float64.
        product = torch.einsum("bthkl,bklhd->bthkld", p[..., i, :], wide[:, :, i])
        a = (a + product).float().double()
    return a.float().sum(4).sum(3).half()
