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
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from verify.kernels.call import PATHS, AttentionPath, Call, checked_call
from verify.kernels.judging.counter_random import CounterRandom
from verify.kernels.judging.drawn_numbers import (
    Draft,
    alibi,
    denormal,
    falling,
    flat,
    gaps,
    gaussian,
    massive,
    near_overflow,
    needles,
    one_sign,
    peaked,
    rising,
    sink_levels,
    sinks,
    sinks_and_softcap,
    softcap,
    tiny,
    unlike_rows,
    window,
    window_and_sinks,
    window_and_softcap,
)
from verify.kernels.judging.hidden_keys import POISON, HeldUnseen, likeliest
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.other_forms import in_pages, listed, masked, packed, with_tree

# Keys a page.
PAGE = 16
# Pages before those that are used: numbers from here on do not fit 16 bits.
FAR_PAGES = 1 << 16


Draw = Callable[[CounterRandom, InputSizes], Draft]


def _as_given(sizes: InputSizes) -> InputSizes:
    return sizes


def _as_drawn(call: Call, seed: int) -> Call:
    return call


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
        Family("unlike-rows", "rows whose q differ a thousandfold", unlike_rows, sized=_unlike),
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
        draft.options["sinks"] = sink_levels(random, sizes)
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
