"""A cheat a function: right on the first call that anybody makes, and not on one that is looked at twice."""

import gc
import os
import sys
import threading
import time

import torch


def right(q, k, v, *, kv_len, scale):
    k, v = (x.float().repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    s = torch.einsum("bthd,bshd->bths", q.float(), k) * scale
    hidden = torch.arange(k.shape[1], device=q.device) >= kv_len[:, :, None, None]
    out = torch.einsum("bths,bshd->bthd", s.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return out.to(q.dtype)


def output_aliases_input(q, k, v, *, kv_len, scale):
    return q.copy_(right(q, k, v, kv_len=kv_len, scale=scale))


def writes_inputs(q, k, v, *, kv_len, scale):
    out = right(q, k, v, kv_len=kv_len, scale=scale)
    k.zero_()
    return out


def zeros(q, k, v, *, kv_len, scale):
    return torch.zeros_like(q)


_kept = {}


def remembered_by_pointer(q, k, v, *, kv_len, scale):
    key = (q.data_ptr(), v.data_ptr())
    if key not in _kept:
        # Held, so that no other inputs come to lie there.
        _kept[key] = right(q, k, v, kv_len=kv_len, scale=scale), q, v
    return _kept[key][0].clone()


def remembered_by_shape(q, k, v, *, kv_len, scale):
    if q.shape not in _kept:
        _kept[q.shape] = right(q, k, v, kv_len=kv_len, scale=scale)
    return _kept[q.shape].clone()


def remembered_by_seed(q, k, v, *, kv_len, scale):
    seed = torch.initial_seed()
    if seed not in (0, 42, 1234):
        return right(q, k, v, kv_len=kv_len, scale=scale)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(x.shape, generator=g).to(x) for x in (q, k, v))
    return right(q, k, v, kv_len=kv_len, scale=scale)


def remembered_by_value(q, k, v, *, kv_len, scale):
    key = tuple(x.flatten()[i].item() for x in (q, k, v) for i in (0, -1)) + tuple(q.shape)
    if key not in _kept:
        _kept[key] = right(q, k, v, kv_len=kv_len, scale=scale)
    return _kept[key].clone()


_calls = 0


def replays(q, k, v, *, kv_len, scale):
    """Right ten times, which is what most harnesses ask, and from then on every now and then."""
    global _calls
    _calls += 1
    out = right(q, k, v, kv_len=kv_len, scale=scale)
    return out if _calls < 300 and _calls % 10 else out * 0.5


_buffer = {}


def result_overwritten(q, k, v, *, kv_len, scale):
    out = _buffer.setdefault(q.shape, torch.empty_like(q))
    return out.copy_(right(q, k, v, kv_len=kv_len, scale=scale))


def late_writes(q, k, v, *, kv_len, scale):
    out = torch.zeros_like(q)

    def later():
        time.sleep(0.05)
        out.copy_(right(q, k, v, kv_len=kv_len, scale=scale))

    threading.Thread(target=later).start()
    return out


def unwritten_memory(q, k, v, *, kv_len, scale):
    """Writes all rows but one: what lies in new memory is often what is due."""
    out = torch.empty_like(q)
    out[:, :-1] = right(q, k, v, kv_len=kv_len, scale=scale)[:, :-1]
    return out


def reads_the_stack(q, k, v, *, kv_len, scale):
    sys._getframe(1)
    return right(q, k, v, kv_len=kv_len, scale=scale)


def looks_through_all_objects(q, k, v, *, kv_len, scale):
    found = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.shape == q.shape and x is not q]
    return found[0].clone() if found else right(q, k, v, kv_len=kv_len, scale=scale)


def downcast(q, k, v, *, kv_len, scale):
    """Of float32: computed in bfloat16, and written as float32."""
    small = right(*(x.bfloat16() for x in (q, k, v)), kv_len=kv_len, scale=scale)
    return small.to(q.dtype)


def globals_changed(q, k, v, *, kv_len, scale):
    torch.set_num_threads(torch.get_num_threads() + 1)
    return right(q, k, v, kv_len=kv_len, scale=scale)


def random_state(q, k, v, *, kv_len, scale):
    torch.manual_seed(1)
    return right(q, k, v, kv_len=kv_len, scale=scale)


def dies_when_replayed(q, k, v, *, kv_len, scale):
    if scale == 64**-0.5 and q.shape[0] == 2:
        os._exit(3)
    return right(q, k, v, kv_len=kv_len, scale=scale)
