"""Input families: inputs on which attention kernels differ, each a plain function of seeded random numbers.

Random Gaussian inputs give every key 1/n_kv of the weight and hide almost every fault. A family puts the
weight, the running maximum, the magnitudes or an option of the call where kernels go wrong. Keys that no row
sees (`Sizes.spare`) always hold `POISON`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from verify.kernels.call import AttentionPath, Call, checked_call
from verify.kernels.heads import Heads
from verify.kernels.judging.counter_random import CounterRandom

# Finite in float16, so that a zero weight hides it; NaN would show in kernels that are right (0 * NaN).
POISON = 6e4
SIX_A_KV_HEAD = Heads(12, 2, 64, 64)


@dataclass(frozen=True)
class InputSizes:
    """Sizes of the inputs to draw."""

    n_kv: tuple[int, ...] = (257, 200)  # visible keys of each row, so T = len(n_kv)
    batch: int = 1  # sequences
    heads: Heads = SIX_A_KV_HEAD  # of the layer
    spare: int = 5  # keys held beyond the longest row
    edges: tuple[int, ...] = (64, 128, 192)  # keys where something is cut: KV parts, tiles
    dtype: torch.dtype = torch.float16  # of q, k and v
    path: AttentionPath = "decode"  # of the call
    v_in_k: bool = False  # V is a view of the first v_size numbers of K (MLA)

    @property
    def keys(self) -> int:
        return max(self.n_kv) + self.spare

    @property
    def scale(self) -> float:
        return self.heads.k_size**-0.5


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


Draw = Callable[[CounterRandom, InputSizes], Draft]


class Family(NamedTuple):
    """name and summary; draw; distinct: the logits of a row differ, so that roundings are independent; edged:
    what is drawn depends on `Sizes.edges`."""

    name: str
    summary: str
    draw: Draw
    distinct: bool = True
    edged: bool = False


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
    for t, n in enumerate(sizes.n_kv):
        places = [n - 1, *(e for e in edges if 0 <= e < n), 0]
        for h in range(sizes.heads.kv):
            if n == 0:
                continue
            place = places[0] if (t + h) % 2 == 0 else places[(turn + t + h) % len(places)]
            base = draft.k[:, place, h].cpu()  # [B, Dk]
            size = base.square().sum(-1, keepdim=True)
            # scale * <q, k_place> = ln n + 4: a few times the weight of all other keys together.
            draft.q[:, t, h] = 0.3 * draft.q[:, t, h]
            wanted = (math.log(n) + 4) / sizes.scale
            draft.q[:, t, h] += (wanted / size * base)[:, None]
    return draft


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
    heads = sizes.heads.q
    level = math.log(max(*sizes.n_kv, 2))
    draft.options["sinks"] = level + torch.linspace(-6, 3, heads)[g.permutation(heads)]
    return draft


def window(g: CounterRandom, sizes: InputSizes) -> Draft:
    """A sliding window that ends inside a tile and leaves whole parts unseen."""
    draft = gaussian(g, sizes)
    draft.options["sliding_window"] = max(min(sizes.n_kv[0] // 3, 100), 1)
    return draft


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


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("gaussian", "standard normal q, k, v", gaussian),
        Family("needles", "one heavy key at the end, the start or beside an edge", needles, edged=True),
        Family("gaps", "parts whose softmax sums differ by up to 12 nats", gaps, edged=True),
        Family("peaked", "a few keys hold all the weight", peaked),
        Family("flat", "all logits 0", flat, distinct=False),
        Family("rising", "the running maximum moves in every tile", rising),
        Family("falling", "late keys only add small terms", falling),
        Family("one-sign", "V about 1", one_sign),
        Family("near-overflow", "K and V near the largest float16", near_overflow),
        Family("denormal", "V among float16's subnormal numbers", denormal),
        Family("tiny", "q, k, v about 1e-3", tiny, distinct=False),
        Family("sinks", "a sink for every head", sinks),
        Family("window", "a sliding window", window),
        Family("softcap", "a softcap of 5", softcap),
        Family("alibi", "ALiBi slopes", alibi),
    )
}


def draw(name: str, sizes: InputSizes, seed: int, *, device: torch.device | str = "cpu") -> Call:
    """The call of a family at these sizes. Equal names, sizes and seeds give equal bits on every device.

    Raises KeyError for a family that does not exist.
    """
    random = CounterRandom(seed * 1009 + sum(name.encode()), device)
    draft = FAMILIES[name].draw(random, sizes)
    return finish(draft, sizes, device=device)


def finish(draft: Draft, sizes: InputSizes, *, device: torch.device | str = "cpu") -> Call:
    """A draft as a call: rounded to its type, POISON beyond the longest row."""
    longest = max(sizes.n_kv)
    for x in (draft.k, draft.v):
        x[:, longest:] = POISON
    if sizes.v_in_k:
        # Families that draw another V leave their mark in K.
        draft.k[..., : sizes.heads.v_size] = draft.v
    kv_len = torch.tensor(sizes.n_kv, dtype=torch.int32).expand(sizes.batch, -1).contiguous()
    options: dict[str, Any] = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in draft.options.items()
    }
    k = draft.k.to(sizes.dtype).to(device)
    return checked_call(
        draft.q.flatten(2, 3).to(sizes.dtype).to(device),
        k,
        k[..., : sizes.heads.v_size] if sizes.v_in_k else draft.v.to(sizes.dtype).to(device),
        kv_len=kv_len.to(device),
        scale=sizes.scale,
        path=sizes.path,
        **options,
    )
