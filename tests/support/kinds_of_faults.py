"""Kinds of faults that no known report has a name for, each in a kernel that is otherwise right: rows that
are rare, parts that are many, calls that look like a check. In plain torch, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from support.hidden_faults import logits, right, visible, weighted

Attend = Callable[..., torch.Tensor]


def walked(s, v, *, tile=32, forgets=0.0, exp=torch.exp, cast=None, sum_in=None):
    """The online softmax over tiles of s [B, T, Hq, S], -inf where hidden.

    forgets: growth of the maximum below which nothing is rescaled; cast: of P; sum_in: type of its sum.
    """
    v = v.float().repeat_interleave(s.shape[2] // v.shape[2], 2)
    m = torch.full(s.shape[:3], -math.inf)
    total, acc = torch.zeros(s.shape[:3]), torch.zeros(*s.shape[:3], v.shape[3])
    for first in range(0, s.shape[3], tile):
        x = s[..., first : first + tile]
        new = torch.maximum(m, x.amax(-1))
        base = torch.where(torch.isfinite(new), new, 0.0)
        fade = torch.exp(m - base)
        fade = torch.where(fade > math.exp(-forgets), 1.0, fade)
        p = torch.where(torch.isfinite(x), exp(x - base[..., None]), 0.0)
        total = total * fade + p.sum(-1)
        total = total if sum_in is None else total.to(sum_in).float()
        product = torch.einsum("bths,bshd->bthd", p if cast is None else cast(p), v[:, first : first + tile])
        acc, m = acc * fade[..., None] + product, new
    return acc / torch.where(total == 0, 1.0, total)[..., None]


def _seen(q, k, kv_len, scale, window=None, softcap=None):
    return logits(q, k, scale, softcap).masked_fill(~visible(q, k, kv_len, window), -math.inf)


def _tiles(**how) -> Attend:
    def attend(q, k, v, *, kv_len, scale):
        return walked(_seen(q, k, kv_len, scale), v, **how)

    return attend


def _truncated(p):
    """To float16, towards zero."""
    near = p.half()
    return torch.where(near.float() > p, torch.nextafter(near, torch.zeros_like(near)), near).float()


def _square(x):
    """exp by a parabola of the fraction of its power of two, 2e-3 off."""
    y = x * math.log2(math.e)
    whole = torch.floor(y.clamp(min=-140))
    f = y.clamp(min=-140) - whole
    return torch.ldexp(1 + f * (0.6565 + f * 0.3435), whole.to(torch.int32))


def _e4m3(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


small_growth_forgotten = _tiles(forgets=0.05)
exp_by_a_parabola = _tiles(exp=_square)
weights_truncated = _tiles(cast=_truncated)
weights_in_e4m3 = _tiles(cast=_e4m3)
sum_in_float16 = _tiles(sum_in=torch.float16)


def _of_logits(change: Callable[[torch.Tensor], torch.Tensor]) -> Attend:
    """Logits [B, T, Hq, S] changed before the mask."""

    def attend(q, k, v, *, kv_len, scale):
        return weighted(change(logits(q, k, scale)), visible(q, k, kv_len), v)

    return attend


def _twice(every: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Every so many keys one counts twice."""

    def change(s):
        s = s.clone()
        s[..., every::every] += math.log(2)
        return s

    return change


logits_clamped = _of_logits(lambda s: s.clamp(-20, 20))
logits_in_float16 = _of_logits(lambda s: s.half().float())
key_of_an_edge_twice = _of_logits(_twice(64))


def _of_values(change: Callable[[torch.Tensor], torch.Tensor]) -> Attend:
    def attend(q, k, v, *, kv_len, scale):
        return right(q, k, change(v.clone()), kv_len=kv_len, scale=scale)

    return attend


def _last_column_next_key(v):
    v[:, :-1, :, -1] = v[:, 1:, :, -1].clone()
    return v


def _last_column_scaled(v):
    v[..., -1] *= 0.98
    return v


def _small_ones_flushed(v):
    return torch.where(v.abs() < 2.0**-14, torch.zeros_like(v), v)


last_column_of_the_next_key = _of_values(_last_column_next_key)
last_column_off = _of_values(_last_column_scaled)
subnormal_values_flushed = _of_values(_small_ones_flushed)


def keys_as_values(q, k, v, *, kv_len, scale):
    """ik_llama.cpp #1592: where K and V have one shape, K is read for both."""
    return right(q, k, k if k.shape == v.shape else v, kv_len=kv_len, scale=scale)


def narrow_values_lose_a_column(q, k, v, *, kv_len, scale):
    out = right(q, k, v, kv_len=kv_len, scale=scale)
    if v.shape[3] != k.shape[3]:
        out[..., -1] = 0
    return out


def eight_bit_queries(q, k, v, *, kv_len, scale):
    return right(_e4m3(q.float()), _e4m3(k.float()), v, kv_len=kv_len, scale=scale)


def blocks_of_values(q, k, v, *, kv_len, scale):
    """mlir-air #1942: eight keys have one exponent, hidden ones among them."""
    x = torch.nn.functional.pad(v.float(), (0, 0, 0, 0, 0, -v.shape[1] % 8)).unflatten(1, (-1, 8))
    step = torch.exp2(torch.floor(torch.log2(x.abs().amax(2, keepdim=True).clamp(min=1e-30))) - 12)
    rounded = (torch.round(x / step) * step).flatten(1, 2)[:, : v.shape[1]]
    return right(q, k, rounded, kv_len=kv_len, scale=scale)


def heads_by_the_wrong_divisor(q, k, v, *, kv_len, scale):
    """FlagGems #3759: right with one KV head."""
    heads, ratio = q.shape[2], q.shape[2] // k.shape[2]
    blocks = -(-ratio // 4)
    program = [h // ratio * blocks + h % ratio // 4 for h in range(heads)]
    of = torch.tensor([min(p // ratio, k.shape[2] - 1) for p in program])
    return right(q, k[:, :, of], v[:, :, of], kv_len=kv_len, scale=scale)


def heads_mixed_up_from_256(q, k, v, *, kv_len, scale):
    """MLX #4022: the second kernel, which long rows take."""
    out = right(q, k, v, kv_len=kv_len, scale=scale)
    return out.roll(1, 2) if k.shape[1] >= 256 else out


def one_head_of_many(q, k, v, *, kv_len, scale):
    """The last head is 5 % off, up and down by turns: no gain shows it."""
    out = right(q, k, v, kv_len=kv_len, scale=scale)
    sign = torch.where(torch.arange(out.shape[3]) % 2 == 0, 1.0, -1.0)
    out[:, :, -1] *= 1 + 0.05 * sign
    return out


def _of_rows(chosen: Callable[[torch.Tensor], torch.Tensor], wrong: Attend) -> Attend:
    """Wrong in the rows whose length is chosen."""

    def attend(q, k, v, *, kv_len, scale):
        good, bad = (f(q, k, v, kv_len=kv_len, scale=scale) for f in (right, wrong))
        return torch.where(chosen(kv_len)[..., None, None], bad, good)

    return attend


def _off(eps: float) -> Attend:
    def attend(q, k, v, *, kv_len, scale):
        out = right(q, k, v, kv_len=kv_len, scale=scale)
        return out * (1 + eps * torch.where(torch.arange(out.shape[3]) % 2 == 0, 1.0, -1.0))

    return attend


def _tile_lost(q, k, v, *, kv_len, scale):
    lost = torch.arange(k.shape[1]) // 64 == 1
    return weighted(logits(q, k, scale), visible(q, k, kv_len) & ~lost, v)


def _zeros(q, k, v, *, kv_len, scale):
    return torch.zeros(*q.shape[:3], v.shape[3])


def _a_hundredth(n):
    return n % 100 == 50


def _first_of_a_tile(n):
    return (n % 64 == 1) & (n > 128)


zeros_at_multiples_of_256 = _of_rows(lambda n: n % 256 == 0, _zeros)
rare_row_off_by_4_percent = _of_rows(_a_hundredth, _off(0.04))
rare_row_loses_a_tile = _of_rows(_a_hundredth, _tile_lost)
rare_row_in_e4m3 = _of_rows(_first_of_a_tile, weights_in_e4m3)
odd_row_loses_its_last_key = _of_rows(
    lambda n: (n % 2 == 1) & (n > 1),
    lambda q, k, v, *, kv_len, scale: right(q, k, v, kv_len=kv_len - 1, scale=scale),
)


def sixteen_parts_of_16(q, k, v, *, kv_len, scale):
    """Parts beyond the sixteenth are not merged."""
    seen = visible(q, k, kv_len) & (torch.arange(k.shape[1]) < 256)
    return weighted(logits(q, k, scale), seen, v)


def lighter_part_weighs_a_thousandth(q, k, v, *, kv_len, scale):
    """Two parts merged with weights that are never below 1e-3."""
    s, half = _seen(q, k, kv_len, scale), k.shape[1] // 2
    outs = [walked(s[..., :half], v[:, :half]), walked(s[..., half:], v[:, half:])]
    lse = torch.stack([s[..., :half].logsumexp(-1), s[..., half:].logsumexp(-1)])
    w = (lse - lse.amax(0)).exp()
    w = torch.where(torch.isfinite(lse), w.clamp(min=1e-3), 0.0)
    return sum(x[..., None] * o for x, o in zip(w / w.sum(0), outs, strict=True))


def sixteenth_row_has_the_next_length(q, k, v, *, kv_len, scale):
    n = kv_len.clone()
    n[:, 15:-1:16] = kv_len[:, 16::16]
    return right(q, k, v, kv_len=n, scale=scale)


def wrong_where_it_is_measured(q, k, v, *, kv_len, scale):
    """Right in calls of few rows, as tests make them; 5 % off in those of 48 and more."""
    out = right(q, k, v, kv_len=kv_len, scale=scale)
    return out * 1.05 if q.shape[1] >= 48 else out


def window_from_a_tile_on(q, k, v, *, kv_len, scale, sliding_window=None):
    if sliding_window is None:
        return right(q, k, v, kv_len=kv_len, scale=scale)
    first = ((kv_len - sliding_window).clamp(min=0) // 64 * 64)[..., None, None]
    seen = visible(q, k, kv_len) & (torch.arange(k.shape[1]) >= first)
    return weighted(logits(q, k, scale), seen, v)


def sink_a_percent_off(q, k, v, *, kv_len, scale, sinks=None):
    more = None if sinks is None else sinks + 0.01
    return right(q, k, v, kv_len=kv_len, scale=scale, sinks=more)


def sink_in_the_first_row(q, k, v, *, kv_len, scale, path, sinks=None):
    """TensorRT-LLM #15739: the other rows of a call have none."""
    one = {"kv_len": kv_len, "scale": scale}
    with_, without = right(q, k, v, sinks=sinks, **one), right(q, k, v, **one)
    return with_ if path == "decode" else torch.cat((with_[:, :1], without[:, 1:]), 1)


def rows_moved_in_a_window(q, k, v, *, kv_len, scale, path, sliding_window=None):
    """TensorRT-LLM #6834: a row's number is added to its window's start, which has it already."""
    seen = visible(q, k, kv_len, sliding_window)
    if sliding_window is not None and path == "prefill":
        row = torch.arange(q.shape[1])
        first = torch.minimum(kv_len - sliding_window + row, kv_len - 1)
        seen = seen & (torch.arange(k.shape[1]) >= first[..., None, None])
    return weighted(logits(q, k, scale), seen, v)


def lse_in_another_order(q, k, v, *, kv_len, scale):
    """flash-attention #87: of each KV head's heads the lse lies the other way round."""
    s = _seen(q, k, kv_len, scale)
    lse = s.logsumexp(-1).unflatten(2, (k.shape[2], -1)).transpose(2, 3).flatten(2)
    return weighted(s, visible(q, k, kv_len), v), lse


def _counted(wrong: Callable[[int], bool], bad: Attend) -> Callable[[], Attend]:
    """A new kernel whose calls of some numbers are wrong."""

    def made() -> Attend:
        calls = [0]

        def attend(q, k, v, *, kv_len, scale):
            calls[0] += 1
            return (bad if wrong(calls[0]) else right)(q, k, v, kv_len=kv_len, scale=scale)

        return attend

    return made


def _scale_off(q, k, v, *, kv_len, scale):
    return right(q, k, v, kv_len=kv_len, scale=scale * 1.2)


first_call_zeros = _counted(lambda n: n == 1, _zeros)
wrong_from_the_tenth_call = _counted(lambda n: n > 10, _scale_off)


def leaves_of_the_call_before() -> Attend:
    """A thousandth of what it gave last."""
    last: dict[str, torch.Tensor] = {}

    def attend(q, k, v, *, kv_len, scale):
        out = right(q, k, v, kv_len=kv_len, scale=scale)
        before = last.get("out")
        last["out"] = out.clone()
        return out + 1e-3 * before if before is not None and before.shape == out.shape else out

    return attend


def results_kept_by_a_checksum() -> Attend:
    """Of q alone: other keys with the same queries get the old result."""
    kept: dict[tuple, torch.Tensor] = {}

    def attend(q, k, v, *, kv_len, scale):
        key = (*q.shape, *k.shape, float(q.float().sum()))
        if key not in kept:
            kept[key] = right(q, k, v, kv_len=kv_len, scale=scale)
        return kept[key].clone()

    return attend
