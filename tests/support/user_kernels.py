"""Kernels of a user, right and wrong, as `py:` candidates. This file imports nothing of ours."""

import os
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
