"""Random calls, small, with any options and forms at once: what a property test draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from verify.kernels.call import Call, checked_call
from verify.kernels.judging.other_forms import in_pages, packed
from verify.kernels.plans.asked import MOST_SEVERAL

# What a mask holds beside 0: what people write for "hidden", and numbers that are added.
BIASES = (float("-inf"), -1e9, float(torch.finfo(torch.float32).min), 3.0, -2.5, 0.125)
SIZES = (8, 16, 24, 32, 48)


@dataclass(frozen=True)
class RandomCall:
    """What a call is made of; shrinks to a plain one."""

    path: str  # of the call
    lengths: tuple[tuple[int, ...], ...]  # kv_len [B][T]
    keys: int  # S
    kv_heads: int
    ratio: int
    sizes: tuple[int, int]  # Dk, Dv
    dtype: str  # of q, k, v
    loud: float  # what q is multiplied by
    seed: int  # of all numbers
    page: int | None  # keys a page
    tokens: tuple[int, ...] | None  # of each sequence, where they are packed
    window: int | None
    softcap: float | None
    sinks: bool
    alibi: bool
    mask: str | None  # bool, numbers, or none
    mask_shape: tuple[bool, bool]  # whether it differs by sequence and by head
    listed: int | None  # keys that a row lists at most
    v_in_k: bool

    def call(self) -> Call:
        g = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)
        batch, rows = len(self.lengths), len(self.lengths[0])
        heads, (k_size, v_size) = self.kv_heads * self.ratio, self.sizes

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g)

        q = (normal(batch, rows, heads, k_size) * self.loud).to(dtype)
        k = normal(batch, self.keys, self.kv_heads, k_size).to(dtype)
        v = normal(batch, self.keys, self.kv_heads, v_size).to(dtype)
        kv_len = torch.tensor(self.lengths, dtype=torch.int32).view(batch, rows)
        options: dict[str, Any] = {"sliding_window": self.window, "softcap": self.softcap}
        if self.sinks:
            options["sinks"] = normal(heads) * 3
            options["sinks"][0] = float("-inf")
        if self.alibi:
            options["alibi_slopes"] = torch.rand(heads, generator=g)
        if self.mask is not None:
            shape = (batch if self.mask_shape[0] else 1, heads if self.mask_shape[1] else 1, rows, self.keys)
            options["mask"] = torch.rand(shape, generator=g) < 0.7
            if self.mask == "numbers":
                which = torch.randint(0, len(BIASES), shape, generator=g)
                options["mask"] = torch.where(options["mask"], 0.0, torch.tensor(BIASES)[which])
        if self.listed is not None:
            options["keys"] = self._lists(kv_len, g)
        columns = None
        if self.v_in_k and v_size < k_size:
            first = int(torch.randint(0, k_size - v_size + 1, (1,), generator=g))
            columns = (first, first + v_size)
        found = checked_call(
            q, k, None if columns else v, v_in_k=columns, kv_len=kv_len, scale=k_size**-0.5,
            path=self.path, **options,
        )  # fmt: skip
        if self.page is not None:
            found = in_pages(found, self.page, seed=self.seed)
        return found if self.tokens is None else packed(found, self.tokens)

    def _lists(self, kv_len: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        """Some of each row's keys, in any order, with holes among them."""
        assert self.listed is not None
        listed = torch.full((*kv_len.shape, self.listed), -1, dtype=torch.int32)
        for b, lengths in enumerate(kv_len.tolist()):
            for t, n in enumerate(lengths):
                some = torch.randperm(n, generator=g)[: self.listed]
                places = torch.randperm(self.listed, generator=g)[: len(some)]
                listed[b, t, places] = some.int()
        return listed


@st.composite
def random_calls(draw: st.DrawFn) -> RandomCall:
    path = draw(st.sampled_from(["decode", "several", "prefill"]))
    batch = draw(st.integers(1, 3))
    rows = draw(st.integers(1, MOST_SEVERAL if path == "several" else 5))
    keys = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33, 50, 70]))
    newest = draw(st.booleans())
    lengths = []
    for _ in range(batch):
        longest = draw(st.integers(0, keys))
        any_of = st.integers(0, longest)
        given = draw(st.lists(any_of, min_size=rows, max_size=rows))
        lengths.append(tuple(max(longest - rows + 1 + t, 0) for t in range(rows)) if newest else tuple(given))
    maybe = st.booleans()
    tokens = st.lists(st.integers(0, rows), min_size=batch, max_size=batch).map(tuple)
    return RandomCall(
        path=path,
        lengths=tuple(lengths),
        keys=keys,
        kv_heads=draw(st.integers(1, 2)),
        ratio=draw(st.integers(1, 5)),
        sizes=draw(st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES))),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        loud=draw(st.sampled_from([1.0, 0.0, 8.0])),
        seed=draw(st.integers(0, 2**20)),
        page=draw(st.sampled_from([None, 1, 2, 3, 16, 64, 256])),
        tokens=draw(st.none() | tokens),
        window=draw(st.none() | st.integers(1, 40)),
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        sinks=draw(maybe),
        alibi=draw(maybe),
        mask=draw(st.sampled_from([None, "bool", "numbers"])),
        mask_shape=draw(st.tuples(maybe, maybe)),
        listed=draw(st.none() | st.integers(1, 40)),
        v_in_k=draw(maybe),
    )
