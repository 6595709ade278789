"""Kinds of numbers that q, k and v hold: where the weight lies, how the maximum runs, how large all is.

Each is a plain function of seeded random numbers and sizes, and makes a `Draft`. What it is for stands in its
first line; `families` names them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from verify.kernels.judging.counter_random import CounterRandom
from verify.kernels.judging.input_sizes import InputSizes


@dataclass
class Draft:
    """Inputs before they are rounded: q [B, T, Hkv, r, Dk], k [B, S, Hkv, Dk], v [B, S, Hkv, Dv].

    k and v lie on the device that the call is for; q and what is a number a head or a key are small, and are
    computed on the CPU: sums and exponentials there give one result for every device.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)


def gaussian(g: CounterRandom, sizes: InputSizes) -> Draft:
    """q, k, v standard normal: what the tests of others draw."""
    b, t, s, h = sizes.batch, len(sizes.n_kv), sizes.keys, sizes.heads.kv
    q = g.normal(b, t, h, sizes.heads.ratio, sizes.heads.k_size, device="cpu")
    k = g.normal(b, s, h, sizes.heads.k_size)
    # What a family makes of K it makes of V, where V lies in K.
    return Draft(
        q, k, k[..., : sizes.heads.v_size] if sizes.v_in_k else g.normal(b, s, h, sizes.heads.v_size)
    )


def _add_logits(draft: Draft, sizes: InputSizes, logits: torch.Tensor) -> Draft:
    """Adds `logits` [S] to the logits of every row, through a column of q and k of their own."""
    amplitude = sizes.heads.k_size**0.5
    draft.q[..., 0] = amplitude
    # scale * amplitude * k = k
    draft.k[..., 0] = logits.to(draft.k.device).view(1, -1, 1)
    return draft


def needles(g: CounterRandom, sizes: InputSizes) -> Draft:
    """Each row and KV head has one heavy key: the last one, the first, or one beside an edge."""
    draft = gaussian(g, sizes)
    edges = [edge + side for edge in sizes.edges for side in (-1, 0)]
    turn = g.integer(1 << 20)
    for t in range(len(sizes.n_kv)):
        for n, which in _alike(sizes, t):
            oldest = n - _seen(sizes, n)
            places = [n - 1, *(e for e in edges if oldest <= e < n), oldest]
            for h in range(sizes.heads.kv):
                place = places[0] if (t + h) % 2 == 0 else places[(turn + t + h) % len(places)]
                base = draft.k[which, place, h].cpu()  # [B, Dk]
                size = base.square().sum(-1, keepdim=True)
                # scale * <q, k_place> = ln n + 4: a few times the weight of all other keys together.
                wanted = (math.log(n) + 4) / sizes.scale
                draft.q[which, t, h] = 0.3 * draft.q[which, t, h] + (wanted / size * base)[:, None]
    return draft


def _alike(sizes: InputSizes, t: int) -> list[tuple[int, slice | list[int]]]:
    """Row t's keys, and the sequences in which it has as many; none where it sees no key."""
    found: dict[int, list[int]] = {}
    for b, rows in enumerate(sizes.lengths):
        found.setdefault(rows[t], []).append(b)
    whole = slice(None)
    return [(n, whole if len(which) == sizes.batch else which) for n, which in found.items() if n]


def _seen(sizes: InputSizes, n: int) -> int:
    """Keys that a row of n keys sees through the layers' window."""
    return n if sizes.sliding_window is None else min(n, sizes.sliding_window)


def gaps(g: CounterRandom, sizes: InputSizes) -> Draft:
    """The parts between edges differ in their softmax sums: by 0 to 12 nats, the heaviest moving about."""
    draft = gaussian(g, sizes)
    logits = torch.zeros(sizes.keys)
    bounds = [0, *sizes.edges, sizes.keys]
    for low, high in pairwise(bounds):
        logits[low:high] = -12.0 * float(g.uniform(1, device="cpu"))
    return _add_logits(draft, sizes, logits)


def peaked(g: CounterRandom, sizes: InputSizes) -> Draft:
    """Logits of standard deviation 8: a few keys hold all the weight."""
    draft = gaussian(g, sizes)
    draft.q *= 8
    return draft


def flat(g: CounterRandom, sizes: InputSizes) -> Draft:
    """All logits 0: every key weighs the same, in every key's own rounding."""
    draft = gaussian(g, sizes)
    draft.q.zero_()
    return draft


def rising(g: CounterRandom, sizes: InputSizes) -> Draft:
    """Logits rise by 24 nats over the row: the running maximum moves in every tile, up to the last key."""
    return _add_logits(gaussian(g, sizes), sizes, torch.linspace(-24, 0, sizes.keys))


def falling(g: CounterRandom, sizes: InputSizes) -> Draft:
    """Logits fall by 24 nats: the maximum is found at once, later keys only add small terms."""
    return _add_logits(gaussian(g, sizes), sizes, torch.linspace(0, -24, sizes.keys))


def one_sign(g: CounterRandom, sizes: InputSizes) -> Draft:
    """V about 1: nothing cancels, accumulators grow with every key."""
    draft = gaussian(g, sizes)
    draft.q *= 0.25
    draft.v = 1 + 0.1 * draft.v
    return draft


def near_overflow(g: CounterRandom, sizes: InputSizes) -> Draft:
    """K and V near the largest float16, q so small that logits stay ordinary."""
    draft = gaussian(g, sizes)
    draft.k = (draft.k * 1.2e4).clamp(-6e4, 6e4)
    draft.q *= 2.0**-12
    even = torch.arange(sizes.heads.v_size, device=draft.v.device) % 2 == 0
    signs = torch.where(even, 1.0, draft.v.sign())
    draft.v = signs * (3e4 + 3e4 * g.uniform(*draft.v.shape))
    return draft


def denormal(g: CounterRandom, sizes: InputSizes) -> Draft:
    """V, and half of K's columns, among the subnormal numbers of float16."""
    draft = gaussian(g, sizes)
    draft.v *= 2.0**-19
    draft.k[..., ::2] *= 2.0**-19
    return draft


def tiny(g: CounterRandom, sizes: InputSizes) -> Draft:
    """All of q, k, v about 1e-3: nearly flat rows and small results."""
    draft = gaussian(g, sizes)
    draft.q *= 1e-3
    draft.k *= 1e-3
    draft.v *= 1e-3
    return draft


def sinks(g: CounterRandom, sizes: InputSizes) -> Draft:
    """A sink of its own for every head, from nothing to most of the weight."""
    draft = gaussian(g, sizes)
    draft.options["sinks"] = sink_levels(g, sizes)
    return draft


def sink_levels(g: CounterRandom, sizes: InputSizes, seen: int = 0) -> torch.Tensor:
    """A sink a head, beside `seen` keys: by default as many as the longest row sees."""
    heads = sizes.heads.q
    level = math.log(max(seen or _seen(sizes, max(sizes.n_kv)), 2))
    return level + torch.linspace(-6, 3, heads)[g.permutation(heads)]


def window(g: CounterRandom, sizes: InputSizes) -> Draft:
    """A sliding window that ends inside a tile and leaves whole parts unseen."""
    draft = gaussian(g, sizes)
    draft.options["sliding_window"] = _window(sizes)
    return draft


def _window(sizes: InputSizes) -> int:
    return sizes.sliding_window or max(min(sizes.n_kv[0] // 3, 100), 1)


def softcap(g: CounterRandom, sizes: InputSizes) -> Draft:
    """A softcap of 5 over logits of standard deviation 6."""
    draft = gaussian(g, sizes)
    draft.q *= 6
    draft.options["softcap"] = 5.0
    return draft


def alibi(g: CounterRandom, sizes: InputSizes) -> Draft:
    """ALiBi slopes from steep to flat, a power of two apart."""
    draft = gaussian(g, sizes)
    heads = sizes.heads.q
    draft.options["alibi_slopes"] = 2.0 ** -(1 + 7 * torch.arange(heads) / heads)
    return draft


def massive(g: CounterRandom, sizes: InputSizes) -> Draft:
    """One channel of some 320 against -320: logits of -7e4 to -1.4e5 before the scale, all nearly alike after
    it. Of each row and head another size within an octave: at one size alone, who rounds it below the next
    power of two and who above it differ by up to 2 in what a step is, and by nothing else."""
    draft = gaussian(g, sizes)
    octave = g.uniform(*draft.q.shape[:-1], device="cpu")
    draft.q[..., 0], draft.k[..., 0] = 320.0 * torch.exp2(octave - 0.5), -320.0
    return draft


def window_and_sinks(g: CounterRandom, sizes: InputSizes) -> Draft:
    """A window and a sink a head, as gpt-oss has them: whole parts are unseen beside their sinks."""
    draft = window(g, sizes)
    draft.options["sinks"] = sink_levels(g, sizes, min(_window(sizes), max(sizes.n_kv)))
    return draft


def window_and_softcap(g: CounterRandom, sizes: InputSizes) -> Draft:
    """A window and a softcap, as Gemma 2 has them; the cap is small, so that what leaks through it shows."""
    draft = window(g, sizes)
    draft.options["softcap"] = 2.0
    draft.v += 1
    return draft


def sinks_and_softcap(g: CounterRandom, sizes: InputSizes) -> Draft:
    """A softcap caps logits, and no sink."""
    draft = sinks(g, sizes)
    draft.options["softcap"] = 20.0
    return draft


def unlike_rows(g: CounterRandom, sizes: InputSizes) -> Draft:
    """Every second sequence, and every second row of the others, has q a thousand times smaller: logits stay
    ordinary in rows of large keys, as sinks of attention have them."""
    draft = gaussian(g, sizes)
    small = torch.zeros(draft.q.shape[:2], dtype=torch.bool)
    small[1::2] = True
    small[:, 1::2] = True
    draft.q[small] *= 2.0**-10
    draft.k *= 2.0**5
    return draft
