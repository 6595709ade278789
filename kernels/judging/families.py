"""Input families: inputs on which attention kernels differ, each a plain function of seeded random numbers.

Random Gaussian inputs give every key 1/n_kv of the weight and hide almost every fault. A family puts the
weight, the running maximum, the magnitudes or an option of the call where kernels go wrong. Keys that no row
of their sequence sees (`InputSizes.spare`, `fewer`) always hold a likely key (`likeliest`) of value `POISON`:
seen, it shows; hidden by a mask of -10,000, as in many right kernels, it does not.

`FAMILIES` are kinds of numbers, at any sizes; `CALLS` are kinds of calls, which choose sizes of their own;
`FORMS` and `HIDDEN` are asked for by name alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from verify.kernels.call import PATHS, AttentionPath, Call, checked_call
from verify.kernels.heads import Heads
from verify.kernels.judging.counter_random import CounterRandom
from verify.kernels.judging.other_forms import in_pages, listed, masked, packed, with_tree
from verify.kernels.lengths import unseen_keys

# Finite in float16, so that a zero weight hides it; NaN would show in kernels that are right (0 * NaN).
POISON = 6e4
SIX_A_KV_HEAD = Heads(12, 2, 64, 64)
# Keys a page.
PAGE = 16
# Pages before those that are used: numbers from here on do not fit 16 bits.
FAR_PAGES = 1 << 16


@dataclass(frozen=True)
class InputSizes:
    """Sizes of the inputs to draw, and the options that every call of a model's layers has.

    Raises ValueError where `fewer` is not one number a sequence.
    """

    n_kv: tuple[int, ...] = (257, 200)  # visible keys of each row, so T = len(n_kv)
    batch: int = 1  # sequences
    fewer: tuple[int, ...] = ()  # keys by which each sequence's rows are shorter; empty: by none
    heads: Heads = SIX_A_KV_HEAD  # of the layer
    spare: int = 5  # keys held beyond the longest row
    edges: tuple[int, ...] = (64, 128, 192)  # keys where something is cut: KV parts, tiles
    dtype: torch.dtype = torch.float16  # of q, k and v
    path: AttentionPath = "decode"  # of the call
    v_in_k: bool = False  # V is a view of the first v_size numbers of K (MLA)
    sliding_window: int | None = None  # of the layers: in families that draw none of their own
    sinks: bool = False  # likewise

    def __post_init__(self) -> None:
        if self.fewer and len(self.fewer) != self.batch:
            raise ValueError(f"fewer: expected {self.batch} numbers, one a sequence, got {len(self.fewer)}")

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Visible keys of every sequence's rows [B][T]: a row that sees keys keeps one of them."""
        return tuple(
            tuple(n - min(less, max(n - 1, 0)) for n in self.n_kv) for less in self.fewer or (0,) * self.batch
        )

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


def _as_given(sizes: InputSizes) -> InputSizes:
    return sizes


def _as_drawn(call: Call, seed: int) -> Call:
    return call


class HeldUnseen(NamedTuple):
    """What keys hold that no row sees, of a kind of inputs that asks whether it reaches the result."""

    numbers: tuple[float, ...]  # in turns
    what: str  # that is, in words
    promise: str  # why a kernel whose result shows it may be right all the same


class Family(NamedTuple):
    """A kind of inputs."""

    name: str  # unique
    summary: str  # one line
    draw: Draw  # makes the inputs
    distinct: bool = True  # the logits of a row differ, so that roundings are independent
    edged: bool = False  # what is drawn depends on `InputSizes.edges`
    sized: Callable[[InputSizes], InputSizes] = _as_given  # the sizes it takes, of those it is given
    after: bool = False  # drawn to run after a call of the sizes as given, of the same shapes
    paths: tuple[AttentionPath, ...] = PATHS  # that it is drawn for
    formed: Callable[[Call, int], Call] = _as_drawn  # the call in another form, by the seed of the draw
    unseen: HeldUnseen | None = None  # what hidden keys hold; None: a likely key of value `POISON`


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
    draft.options["sinks"] = _levels(g, sizes)
    return draft


def _levels(g: CounterRandom, sizes: InputSizes, seen: int = 0) -> torch.Tensor:
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
    draft.options["sinks"] = _levels(g, sizes, min(_window(sizes), max(sizes.n_kv)))
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


def _unlike(sizes: InputSizes) -> InputSizes:
    """Four sequences: of all keys, of two thirds, of a few less than all, of a fifth."""
    n = max(sizes.n_kv)
    rows = sizes.n_kv[:4]
    return replace(sizes, batch=4, n_kv=rows, fewer=(0, n // 3 + 1, 37, n - n // 5))


def _half(sizes: InputSizes) -> InputSizes:
    """Half of the keys are seen, as many are held."""
    rows = tuple(n - n // 2 for n in sizes.n_kv)
    return replace(sizes, n_kv=rows, spare=sizes.keys - max(rows))


def _four_tokens(sizes: InputSizes) -> InputSizes:
    n = max(max(sizes.n_kv), 4)
    return replace(sizes, n_kv=(n - 3, n - 2, n - 1, n))


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
        Family("massive", "logits of -1e5 before the scale", massive),
        Family("window+sinks", "a sliding window and sinks", window_and_sinks),
        Family("window+softcap", "a sliding window and a softcap", window_and_softcap),
        Family("sinks+softcap", "sinks and a softcap", sinks_and_softcap),
    )
}
# Kinds of calls: what they show are faults, a few rows at a time.
CALLS: dict[str, Family] = {
    family.name: family
    for family in (
        Family("sequences", "four sequences of unlike lengths", gaussian, sized=_unlike),
        Family(
            "shorter", "shorter rows after longer ones in the same shapes", gaussian, sized=_half, after=True
        ),
        Family(
            "four-tokens",
            "four query tokens, each sees one key more",
            gaussian,
            sized=_four_tokens,
            paths=("several", "prefill"),
        ),
    )
}


def _unlike_rows(g: CounterRandom, sizes: InputSizes) -> Draft:
    """Every second sequence, and every second row of the others, has q a thousand times smaller: logits stay
    ordinary in rows of large keys, as sinks of attention have them."""
    draft = gaussian(g, sizes)
    small = torch.zeros(draft.q.shape[:2], dtype=torch.bool)
    small[1::2] = True
    small[:, 1::2] = True
    draft.q[small] *= 2.0**-10
    draft.k *= 2.0**5
    return draft


def _in_pages(call: Call, seed: int) -> Call:
    return in_pages(call, PAGE, seed=seed)


def _packed(call: Call, seed: int) -> Call:
    """The sequences have unlike numbers of tokens: every second one a token less."""
    rows = call.shape.rows
    return packed(call, [max(rows - b % 2, 1) for b in range(call.shape.batch)])


def _packed_in_pages(call: Call, seed: int) -> Call:
    return _packed(_in_pages(call, seed), seed)


def _masked(call: Call, seed: int) -> Call:
    return masked(call)


def _far_pages(call: Call, seed: int) -> Call:
    """Pages of one key, whose numbers do not fit 16 bits."""
    return in_pages(call, 1, seed=seed, above=FAR_PAGES)


def _no_tokens(call: Call, seed: int) -> Call:
    """The second sequence has no token."""
    return packed(_in_pages(call, seed), [0 if b == 1 else call.shape.rows for b in range(call.shape.batch)])


def _tree(call: Call, seed: int) -> Call:
    """Two branches: each row follows the one before the last."""
    return with_tree(call, [t - 2 for t in range(call.shape.rows)])


def _drafts(sizes: InputSizes) -> InputSizes:
    """Four rows of four sequences, of at least 16 keys."""
    n = max(*sizes.n_kv, 32)
    return replace(sizes, batch=4, n_kv=(n, n, n, n), fewer=(0, n // 3, 5, n // 2))


def _listed(call: Call, seed: int) -> Call:
    """Every second key, in a drawn order: each row keeps its first."""
    found = listed(call, order=seed)
    assert found.keys is not None
    return replace(found, keys=torch.where(found.keys % 2 == 0, found.keys, -1)).checked()


# Forms of a call (`docs/contract.md`): of a kernel that has them. Sequences of unlike lengths, a few rows.
FORMS: dict[str, Family] = {
    family.name: family
    for family in (
        Family("pages", f"keys in pages of {PAGE}", gaussian, sized=_unlike, formed=_in_pages),
        Family("packed", "tokens of sequences one after another", gaussian, sized=_unlike, formed=_packed),
        Family("packed+pages", "both", gaussian, sized=_unlike, formed=_packed_in_pages),
        Family("mask", "lengths said by a mask", gaussian, sized=_unlike, formed=_masked),
        Family("far-pages", "numbers of pages beyond 65,536", gaussian, sized=_unlike, formed=_far_pages),
        Family("no-tokens", "a sequence without a token", gaussian, sized=_unlike, formed=_no_tokens),
        Family("tree", "drafts of a tree", gaussian, sized=_drafts, formed=_tree),
        Family("unlike-rows", "rows whose q differ a thousandfold", _unlike_rows, sized=_unlike),
        Family("key-list", "each row lists the keys that it sees", gaussian, sized=_unlike, formed=_listed),
    )
}
# Keys that no row sees hold NaN and Inf, or are so large that a mask of -65,504 does not hide them: opt-in,
# since most kernels promise to bear other keys' finite numbers alone.
_NAN_AND_INF = HeldUnseen(
    (math.nan, math.inf, -math.inf),
    "NaN and Inf in keys that no row sees",
    "finite numbers are all that it promises to bear there",
)
_FAR = HeldUnseen(
    (POISON,),
    "keys of 60,000 that no row sees",
    "it hides keys by adding a finite number, which is more than any logit of other keys",
)
HIDDEN: dict[str, Family] = {
    family.name: family
    for family in (
        Family("hidden-nan", "NaN and Inf beyond the rows' last keys", gaussian, unseen=_NAN_AND_INF),
        Family("hidden-far", "keys of 60,000 beyond the rows' last keys", gaussian, unseen=_FAR),
        Family("hidden-nan+window", "NaN and Inf before a window too", window, unseen=_NAN_AND_INF),
    )
}
ALL_FAMILIES: dict[str, Family] = FAMILIES | CALLS | FORMS | HIDDEN


def draw(name: str, sizes: InputSizes, seed: int, *, device: torch.device | str = "cpu") -> Call:
    """The call of a family at these sizes. Equal names, sizes and seeds give equal bits on every device.

    Raises KeyError for a family that does not exist.
    """
    family = ALL_FAMILIES[name]
    random, sizes = CounterRandom(seed * 1009 + sum(name.encode()), device), family.sized(sizes)
    draft = family.draw(random, sizes)
    if sizes.sinks and "sinks" not in draft.options:
        draft.options["sinks"] = _levels(random, sizes)
    draft.options.setdefault("sliding_window", sizes.sliding_window)
    return family.formed(finish(draft, sizes, device=device), seed)


def finish(draft: Draft, sizes: InputSizes, *, device: torch.device | str = "cpu") -> Call:
    """A draft as a call: rounded to its type; beyond each sequence's longest row `likeliest` keys of value
    POISON."""
    likely = likeliest(draft.q, draft.k, sizes.lengths)
    for b, rows in enumerate(sizes.lengths):
        draft.k[b, max(rows) :], draft.v[b, max(rows) :] = likely[b], POISON
    if sizes.v_in_k:
        # Families that draw another V leave their mark in K.
        draft.k[..., : sizes.heads.v_size] = draft.v
    kv_len = torch.tensor(sizes.lengths, dtype=torch.int32)
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


def likeliest(q: torch.Tensor, k: torch.Tensor, lengths: Sequence[Sequence[int]]) -> torch.Tensor:
    """For each sequence and KV head the key that its longest row's queries like best.

    q [B, T, Hkv, r, D], k [B, S, Hkv, D] -> [B, Hkv, D], where k lies. lengths: of each sequence's rows;
    zeros where one sees no key.

    A hidden key that is a copy of it is worth seeing for a kernel that forgets to hide it, and its logit is
    one of the call's: no mask that adds a finite number is overcome by it.
    """
    found = torch.zeros_like(k[:, 0])
    for b, rows in enumerate(lengths):
        if not (n := max(rows)):
            continue
        row = q[b, list(rows).index(n)].to(k.device)
        for h in range(k.shape[2]):
            keys = k[b, :n, h]
            few = (keys.float() @ row[h].float().T).amax(1).topk(min(n, 8)).indices.sort().values
            # Of those nearly alike every device finds the same in float64.
            found[b, h] = keys[few[(keys[few].double() @ row[h].double().T).amax(1).argmax()]]
    return found


def with_hidden(call: Call, held: Sequence[float]) -> Call:
    """The call whose keys that no row of their sequence sees hold these numbers in turns, and their values
    the same the other way round: beyond the longest row, and before the window of the shortest."""
    k, v = call.k.clone(), call.v.clone()
    numbers = torch.tensor(held, dtype=k.dtype, device=k.device)
    for b, rows in enumerate(call.kv_len.tolist()):
        for unseen in unseen_keys(rows, call.shape.keys, call.sliding_window):
            count = k[b, unseen].shape[0]
            bad = numbers.repeat(count // len(held) + 1)[:count].view(-1, 1, 1)
            k[b, unseen], v[b, unseen] = bad, bad.flip(0)
    return replace(call, k=k, v=v)
