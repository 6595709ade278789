"""Kernels of a user, right and wrong, as `py:` candidates. This file imports nothing of ours."""

import os
import random
import time

import torch


def good(q, k, v, *, kv_len, scale):
    ratio = q.shape[2] // k.shape[2]
    k, v = (x.float().repeat_interleave(ratio, 2) for x in (k, v))
    s = torch.einsum("bthd,bshd->bths", q.float(), k) * scale
    hidden = torch.arange(k.shape[1], device=q.device) >= kv_len[..., None]
    s = s.masked_fill(hidden[:, :, None], -float("inf"))
    p = torch.nan_to_num(s.softmax(-1))
    return torch.einsum("bths,bshd->bthd", p, v), s.logsumexp(-1)


def last_key_dropped(q, k, v, *, kv_len, scale):
    return good(q, k, v, kv_len=kv_len - 1, scale=scale)


def heads_rotated(q, k, v, *, kv_len, scale):
    return good(q, k.roll(1, 2), v.roll(1, 2), kv_len=kv_len, scale=scale)


def nan_in_one_row(q, k, v, *, kv_len, scale):
    out, _ = good(q, k, v, kv_len=kv_len, scale=scale)
    out[:, -1, 0, 0] = float("nan")
    return out


def scale_off(q, k, v, *, kv_len, scale):
    return good(q, k, v, kv_len=kv_len, scale=scale * 1.001)


def hangs(q, k, v, *, kv_len, scale):
    time.sleep(600)


def dies(q, k, v, *, kv_len, scale):
    os.abort()


def raises(q, k, v, *, kv_len, scale):
    raise RuntimeError("no such luck")


def wrong_shape(q, k, v, *, kv_len, scale):
    return q[:, :1]


def wrong_dtype(q, k, v, *, kv_len, scale):
    return good(q, k, v, kv_len=kv_len, scale=scale)[0].int()


def writes_inputs(q, k, v, *, kv_len, scale):
    q += 1
    return good(q, k, v, kv_len=kv_len, scale=scale)


def says_its_path(q, k, v, *, kv_len, scale, path):
    out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
    return out + (path == "prefill"), lse


def finds_our_packages(q, k, v, *, kv_len, scale):
    import sys

    ours = [m for m in ("kernels", "model", "data", "verify") if m in sys.modules]
    if ours:
        raise RuntimeError(f"loaded: {ours}")
    return good(q, k, v, kv_len=kv_len, scale=scale)


def wrong_signature(q, k):
    return q


def coarse(q, k, v, *, kv_len, scale):
    """Values rounded to 2 bits: a loss of precision that turns tokens round."""
    mantissa, exponent = torch.frexp(v.float())
    return good(q, k, torch.ldexp(torch.round(mantissa * 4) / 4, exponent), kv_len=kv_len, scale=scale)


_calls = 0


def every_second_call_halved(q, k, v, *, kv_len, scale):
    """A counter that nobody resets."""
    global _calls
    _calls += 1
    out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
    return (out / 2 if _calls % 2 == 0 else out), lse


def prompt_row_wrong(q, k, v, *, kv_len, scale, path):
    """One row of a prompt."""
    out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
    if path == "prefill":
        out = torch.where((kv_len == 11)[..., None, None], -3 * out, out)
    return out, lse


def decode_only(q, k, v, *, kv_len, scale, path):
    if path == "prefill":
        raise NotImplementedError("decode only")
    return good(q, k, v, kv_len=kv_len, scale=scale)


def refuses(q, k, v, *, kv_len, scale):
    raise NotImplementedError("not today")


def off_by_2e_3(q, k, v, *, kv_len, scale):
    out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
    return out * 1.002, lse


def scaled_alone(q, k, v, *, kv_len, scale):
    """Wrong for one query token a call, and for none else."""
    out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
    return (out * 1.02 if q.shape[1] == 1 else out), lse


def coarse_alone(q, k, v, *, kv_len, scale):
    """Right for one query token, in fewer digits."""
    out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
    return (out.bfloat16().float() if q.shape[1] == 1 else out.half().float()), lse


def last_key_lost_alone(q, k, v, *, kv_len, scale):
    """Wrong for one query token where the cache holds no more keys than it sees."""
    lost = q.shape[1] == 1 and k.shape[1] == int(kv_len.max())
    return good(q, k, v, kv_len=kv_len - 1 if lost else kv_len, scale=scale)


def refuses_alone(q, k, v, *, kv_len, scale):
    if q.shape[1] == 1:
        raise NotImplementedError("two query tokens or more")
    return good(q, k, v, kv_len=kv_len, scale=scale)


def raises_alone(q, k, v, *, kv_len, scale):
    if q.shape[1] == 1:
        raise RuntimeError("no such luck alone")
    return good(q, k, v, kv_len=kv_len, scale=scale)


def first_call_unfilled(q, k, v, *, kv_len, scale):
    """A workspace that nobody filled: the first result is zeros."""
    global _calls
    _calls += 1
    out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
    return (out * 0 if _calls == 1 else out), lse


def lse_infinite(q, k, v, *, kv_len, scale):
    out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
    return out, torch.full_like(lse, float("inf"))


def neighbour_leaks(q, k, v, *, kv_len, scale):
    """A ten-thousandth of another sequence's row, far below any budget."""
    out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
    return (out + 1e-6 * out.roll(1, 0) if q.shape[0] > 1 else out), lse


def alone_in_another_order(q, k, v, *, kv_len, scale):
    """Right, and rounded in another way where a row comes alone."""
    if q.shape[0] * q.shape[1] == 1:
        return good(q.float() * 3, k, v, kv_len=kv_len, scale=scale / 3)
    return good(q, k, v, kv_len=kv_len, scale=scale)


def infinite_at_12(q, k, v, *, kv_len, scale):
    """Overflows in one row."""
    out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
    return torch.where((kv_len == 12)[..., None, None], float("inf"), out), lse


def infinite_at_12_and_14(q, k, v, *, kv_len, scale):
    """Overflows in that row, and in another."""
    out, lse = infinite_at_12(q, k, v, kv_len=kv_len, scale=scale)
    return torch.where((kv_len == 14)[..., None, None], float("inf"), out), lse


def every34(q, k, v, *, kv_len, scale):
    """Each 34th call returns another head's rows."""
    global _calls
    _calls += 1
    out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
    return (out.roll(1, 2) if _calls % 34 == 0 else out), lse


def _race(seed):
    """One call of 50, at random, returns another head's rows."""
    drawn = random.Random(seed)

    def race(q, k, v, *, kv_len, scale):
        out, lse = good(q, k, v, kv_len=kv_len, scale=scale)
        return (out.roll(1, 2) if drawn.random() < 1 / 50 else out), lse

    return race


race50_a, race50_b, race50_c, race50_d = (_race(seed) for seed in range(4))


def four_tokens(q, k, v, *, kv_len, scale, path):
    """A prompt of exactly four tokens is taken for its first, four times."""
    if path == "prefill" and q.shape[1] == 4:
        q = q[:, :1].expand_as(q)
    return good(q, k, v, kv_len=kv_len, scale=scale)
