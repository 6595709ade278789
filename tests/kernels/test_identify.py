"""An arithmetic is read off a kernel that nobody describes: a bare callable, asked by q, k and v alone."""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from support import ggml_mma
from verify.kernels.eager import EagerKernel
from verify.kernels.faults.clean import (
    HalfParts,
    LazyRescale,
    MaximumOffset,
    ReversedTiles,
    RoundedDenominator,
    ScaledQuery,
    TreeMerge,
)
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.heads import Heads
from verify.kernels.identify.asking import Asking, BareKernel, NotIdentifiable, Regime
from verify.kernels.identify.parts import cuts_seen
from verify.kernels.identify.reading import Reading, read
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.kernel import Kernel
from verify.kernels.plans.asked import RowAsked
from verify.kernels.plans.plan import KVCuts, Plan, parse_heads
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.registry import build_kernel

HEADS = Heads(8, 2, 64, 64)


def bare(kernel: Kernel) -> BareKernel:
    """The kernel as a callable that says nothing of itself."""

    def attend(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> torch.Tensor:
        return kernel.attend(q, k, v, kv_len=kv_len, scale=scale).out

    return attend


class LazyReversed(ReversedTiles, LazyRescale):
    """FlashAttention 4: the last tile first, and a maximum that is moved only when it has grown far."""


class LastTileFirst(TileKernel):
    """The tile that may need a mask before all others."""

    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        tiles = super().tiles(start, stop)
        return tiles[-1:] + tiles[:-1]


class EvenTilesFirst(TileKernel):
    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        tiles = super().tiles(start, stop)
        return tiles[::2] + tiles[1::2]


class SecondHalfFirst(TileKernel):
    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        tiles = super().tiles(start, stop)
        return tiles[len(tiles) // 2 :] + tiles[: len(tiles) // 2]


class GrowingTiles(TileKernel):
    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        starts = [start, *(start + 16 * x for x in (1, 3, 7, 15)), *range(start + 16 * 31, stop, 256)]
        return list(itertools.pairwise([*starts, stop]))


@dataclass(frozen=True)
class Truth:
    """What a kernel of ours computes, as it was asked to."""

    p: str
    acc: str
    out: str
    block: int
    kv: str
    heads: str | None = None
    kind: str = "eager"
    n_kv: int = 700

    @property
    def plan(self) -> Plan:
        return Plan(
            heads=None if self.heads is None else parse_heads(self.heads),
            kv=KVCuts.parse(self.kv),
            block=self.block,
        )

    def build(self) -> Kernel:
        if self.kind in ("eager", "flash"):
            options = TileOptions(plan=self.plan, p=self.p, acc=self.acc, out=self.out)
            return EagerKernel(self.kind, options)
        kinds = {
            "lazy": LazyRescale, "scaled": ScaledQuery, "rounded l": RoundedDenominator,
            "offset": MaximumOffset, "tree": TreeMerge, "backward": ReversedTiles,
            "lazy backward": LazyReversed,
        }  # fmt: skip
        kv = int(self.kv)
        kind: type[TileKernel] = kinds[self.kind]
        return kind(self.kind, block=self.block, kv=kv, p=self.p, out=self.out, acc=self.acc)

    @property
    def cuts(self) -> tuple[int, ...]:
        return self.plan.at(RowAsked(HEADS, self.n_kv)).cuts

    @property
    def tile(self) -> int | None:
        """A tile that holds a whole part has no edge that could be seen, and no rounding shows one of P in
        float32: there the ends of products do."""
        if self.p == "f32" and self.acc == "f32":
            return None
        return self.block if self.longest > self.block else None

    @property
    def order(self) -> str | None:
        if self.tile is None:
            return None
        return "backward" if "backward" in self.kind else "forward"

    @property
    def longest(self) -> int:
        """Keys of its longest part."""
        return max(b - a for a, b in itertools.pairwise(self.cuts))


def wrong(truth: Truth, found: Reading) -> list[str]:
    """What was read otherwise than it is."""
    due = {
        "p": truth.p, "accumulator": truth.acc, "result": truth.out, "tile": truth.tile, "cuts": truth.cuts,
        "tile_order": truth.order, "rounding": "nearest", "p_truncated": False, "p_normalised": False,
        "deterministic": True,
    }  # fmt: skip
    said = [f"{name} is {value}, read {getattr(found, name)}" for name, value in due.items()
            if getattr(found, name) != value]  # fmt: skip
    offset = MaximumOffset.offset if truth.kind == "offset" else 0.0
    if found.offset is None or abs(found.offset - offset) > 1e-4:
        said.append(f"offset is {offset}, read {found.offset}")
    if truth.p != "f32" and found.l_of_rounded_p not in (truth.kind == "rounded l", None):
        said.append(f"l of rounded P is {truth.kind == 'rounded l'}")
    if (
        truth.p != "f32"
        and truth.longest > 2 * truth.block
        and found.rescale not in ((3.0, 5.0) if "lazy" in truth.kind else (0.0,))
    ):
        said.append(f"rescale of {truth.kind} read as {found.rescale}")
    if found.q_scaled_in not in ("f16" if truth.kind == "scaled" else "f32", None):
        said.append(f"q scaled in {found.q_scaled_in}")
    if truth.tile is None and truth.longest > 4 * truth.block and found.mma_block != truth.block:
        said.append(f"products of {truth.block} keys, read {found.mma_block}")
    return said


TYPES = ("f16", "bf16", "f32")
# Every combination of types, and of each of the other options with some of them.
COMBINATIONS = [
    *(Truth(p, acc, out, 64, "2") for p, acc, out in itertools.product(TYPES, ("f32", "f16"), TYPES)),
    *(Truth(p, acc, "f32", block, "1")
      for p, acc, block in itertools.product(TYPES, ("f32", "f16"), (16, 32, 128))),
    *(Truth(p, "f32", "f16", 32, kv) for p, kv in itertools.product(TYPES, ("3", "size:128", "auto"))),
    *(Truth("f16", acc, "bf16", 16, kv) for acc, kv in itertools.product(("f32", "f16"), ("5", "size:96"))),
    *(Truth("f16", "f32", "f32", 64, "3", heads, "flash") for heads in ("3+1", "split", "2+2")),
    *(Truth(p, "f32", out, 64, "2", kind="lazy")
      for p, out in (("f16", "f32"), ("f16", "f16"), ("bf16", "f32"))),
    *(Truth("f16", "f32", out, 64, "1", kind="scaled") for out in ("f32", "f16")),
    *(Truth("f16", "f32", out, 32, "2", kind="rounded l") for out in ("f32", "f16")),
    *(Truth("f16", "f32", out, 64, "2", kind="offset") for out in TYPES),
    *(Truth(p, "f32", "f32", 32, "5", kind="tree") for p in TYPES),
    *(Truth(p, acc, out, block, kv, kind=kind)
      for kind in ("backward", "lazy backward")
      for p, acc, out, block, kv in (("f16", "f32", "f16", 256, "1"), ("f16", "f32", "f32", 64, "3"),
                                     ("bf16", "f32", "bf16", 32, "2"), ("f16", "f16", "f32", 64, "2"),
                                     ("f32", "f32", "f16", 64, "1"), ("f16", "f32", "f16", 16, "5"))),
    *(Truth("f16", "f16", out, 64, "2", kind="lazy") for out in ("f16", "f32")),
]  # fmt: skip


def read_blind(truths: list[Truth], seed: int) -> list[str]:
    """Read kernels in another order, by numbers alone, and say what was read wrong."""
    order = list(range(len(truths)))
    random.Random(seed).shuffle(order)
    nameless: list[Callable[..., torch.Tensor]] = [bare(truths[i].build()) for i in order]
    regimes = [Regime(truths[i].n_kv) for i in order]
    found = [read(each, regime, seed=seed) for each, regime in zip(nameless, regimes, strict=True)]
    return [f"{truths[i]}: {'; '.join(said)}" for i, one in zip(order, found, strict=True)
            if (said := wrong(truths[i], one))]  # fmt: skip


def test_eight_of_our_own_kernels_are_read() -> None:
    assert len(COMBINATIONS) >= 60
    seed = int(os.environ.get("IDENTIFY_SEED", "0"))
    chosen = random.Random(seed).sample(COMBINATIONS, 8)
    assert read_blind(chosen, seed) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_combination_of_our_own_kernels_is_read() -> None:
    assert read_blind(COMBINATIONS, 1) == []


def drawn(rng: random.Random) -> Truth:
    """Options that nobody chose, of a row so long that every part has more than a tile."""
    block = rng.choice((16, 32, 48, 64, 80))
    n_kv = rng.randint(500, 1300)
    kv = rng.choice(("1", str(rng.randint(2, 4)), f"size:{rng.randint(3, 6) * block - rng.randint(0, 8)}"))
    # The latter know no sizes of parts.
    kind = "eager" if "size" in kv else rng.choice(("eager", "lazy", "backward", "lazy backward"))
    p, out = rng.choice(TYPES), rng.choice(TYPES)
    return Truth(p, rng.choice(("f32", "f16")), out, block, kv, kind=kind, n_kv=n_kv)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_that_were_drawn_and_a_dozen_other_cuts_are_read() -> None:
    seed = int(os.environ.get("IDENTIFY_SEED", 0)) or random.SystemRandom().randrange(1 << 30)
    print(f"IDENTIFY_SEED={seed}")
    rng = random.Random(seed)
    chosen = [drawn(rng) for _ in range(20)]
    for i in range(12):
        block, n_kv = rng.choice((16, 32, 64)), rng.randint(600, 2000)
        kv = str(rng.randint(2, n_kv // (3 * block))) if i % 2 else f"size:{rng.randint(3 * block, n_kv - 1)}"
        chosen.append(Truth(rng.choice(TYPES), "f32", rng.choice(TYPES), block, kv, n_kv=n_kv))
    assert read_blind(chosen, seed) == []


@pytest.mark.parametrize(
    "truth",
    [
        # FlashAttention 2 for text generation: parts of whole tiles, but for the last.
        Truth("f16", "f32", "f16", 256, "3", kind="backward", n_kv=2500),
        Truth("f16", "f32", "f16", 128, "1", kind="lazy backward"),
        Truth("f16", "f16", "f32", 64, "2", kind="lazy backward"),
        Truth("f16", "f16", "f32", 64, "2", kind="lazy"),
        Truth("bf16", "f32", "bf16", 16, "3", kind="backward"),
        Truth("f32", "f32", "f16", 64, "1", kind="backward"),
    ],
    ids=lambda truth: f"{truth.kind}-{truth.p}-{truth.acc}-{truth.block}",
)
def test_the_order_of_a_walk_is_told_from_a_maximum_that_lags(truth: Truth) -> None:
    assert wrong(truth, read(bare(truth.build()), Regime(truth.n_kv))) == []


@pytest.mark.parametrize("acc", ["f32", "f16"])
@pytest.mark.parametrize("kind", [LastTileFirst, EvenTilesFirst, SecondHalfFirst, GrowingTiles])
def test_tiles_in_another_order_than_a_walk_are_not_said(kind: type[TileKernel], acc: str) -> None:
    """By their ends alone they were tiles of 960 from the last to the first, of 128, of 512 and of 256."""
    found = read(bare(kind("kernel", acc=acc)), Regime(1024))
    assert (found.p, found.accumulator, found.tile, found.tile_order) == ("f16", acc, None, None)


def test_a_maximum_that_lags_by_half_a_nat_lags() -> None:
    class ShortLag(LazyRescale):
        lag = 0.5

    assert read(bare(ShortLag("kernel")), Regime(300)).rescale == 0.25


def test_keys_that_keep_a_maximum_each_are_walked_in_no_order_that_shows() -> None:
    """Four warps, each with keys of its own: the other's are apart either way."""
    found = read(functools.partial(ggml_mma.mma, parts=1, acc=torch.float32), Regime(500))
    assert found.tile_order is None and "tile_order" not in found.how


@pytest.mark.parametrize(
    ("spec", "n_kv"), [("kv=2,block=32", 64), ("kv=4,block=16", 64), ("kv=2", 128), ("kv=3,block=16", 100)]
)
def test_equal_parts_of_short_rows_are_told_apart(spec: str, n_kv: int) -> None:
    kernel = build_kernel(f"eager:{spec}")
    regime = Regime(n_kv)
    found = cuts_seen(Asking(bare(kernel), regime), torch.Generator().manual_seed(0))
    call = draw("gaussian", InputSizes(n_kv=(n_kv,), heads=HEADS, edges=()), 0)
    cuts_at = kernel.arithmetic_of(call).cuts_at
    assert cuts_at is not None and found.bounds == cuts_at(n_kv) and found.stored_in == "f32"


def test_longer_rows_are_held_against_the_reading_of_shorter_ones() -> None:
    """At half the calls where they are alike, and anew where anything that is summed differs."""
    of = {n: Regime(n) for n in (1152, 1216, 2400)}
    known = read(bare(build_kernel("eager")), of[1152])
    again = read(bare(build_kernel("eager")), of[1216], known=known)
    assert again.how["regime"] == "the rest as at 1152 keys" and again.calls < 0.65 * known.calls
    assert again == read(bare(build_kernel("eager")), of[1216])
    others = [build_kernel(f"eager:{o}") for o in ("acc=f16", "out=f16", "block=32")]
    for other in (*others, MaximumOffset("offset", block=64)):
        full = read(bare(other), of[1216])
        assert "regime" not in full.how and full != replace(known, n_kv=1216, cuts=(0, 1216))
        held = read(bare(other), of[1216], known=known)
        assert (held, held.how) == (full, full.how)
    # Its cuts are its own; and a part of few keys tells nothing of a longer one.
    parts = read(bare(build_kernel("eager:kv=2")), of[2400], known=known)
    assert "regime" in parts.how and len(parts.cuts) == 3
    few = read(bare(build_kernel("eager")), Regime(300))
    assert "regime" not in read(bare(build_kernel("eager")), of[1152], known=few).how


def test_partial_results_that_are_stored_in_16_bits_are_seen() -> None:
    assert read(bare(HalfParts("half parts", kv=3)), Regime(300)).parts_in == "f16"


def test_bfloat16_inputs_and_several_query_tokens() -> None:
    kernel = build_kernel("eager:p=bf16,out=bf16,kv=3,block=32")
    found = read(bare(kernel), Regime(500, n_q=4, dtype=torch.bfloat16, ratio=3, kv_heads=1))
    assert (found.p, found.accumulator, found.result, found.tile, found.parts) == (
        "bf16",
        "f32",
        "bf16",
        32,
        3,
    )
    assert found.first_product == "bf16" and found.n_q == 4


# Kernels that are not what they seem. All are otherwise the textbook's.


def textbook(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float, p: Any = None) -> torch.Tensor:
    ratio = q.shape[2] // k.shape[2]
    s = scale * torch.einsum("bthd,bshd->bhts", q.float(), k.float().repeat_interleave(ratio, 2))
    s = s.masked_fill(torch.arange(k.shape[1]) >= kv_len[:, None, :, None], -torch.inf)
    w = torch.softmax(s, -1)
    w = w if p is None else w.to(p).float()
    return torch.einsum("bhts,bshd->bthd", w, v.float().repeat_interleave(ratio, 2))


def unsteady(q: Any, k: Any, v: Any, **more: Any) -> torch.Tensor:
    return textbook(q, k, v, **more) * (1 + 1e-6 * torch.rand(()))


def clamps_values(q: Any, k: Any, v: Any, **more: Any) -> torch.Tensor:
    return textbook(q, k, v.clamp(-1000, 1000), **more)


def clamps_logits(q: Any, k: Any, v: Any, **more: Any) -> torch.Tensor:
    return textbook(q, k.clamp(-6, 6), v, **more)


def casts_values(q: Any, k: Any, v: Any, **more: Any) -> torch.Tensor:
    # A scale a call, as caches of 8 bits have it: the largest value stays, the others lose bits.
    scale = v.abs().amax().float() / 448
    return textbook(q, k, (v.float() / scale).to(torch.float8_e4m3fn).float() * scale, **more)


def wants_multiples_of_32(q: Any, k: Any, v: Any, **more: Any) -> torch.Tensor:
    if k.shape[1] % 32:
        raise NotImplementedError("keys: a multiple of 32")
    return textbook(q, k, v, **more)


def is_no_attention(q: Any, k: Any, v: Any, **more: Any) -> torch.Tensor:
    return textbook(q, k, v.roll(1, 1), **more)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (unsteady, "not deterministic"),
        (clamps_values, "values are clamped"),
        (clamps_logits, "logits are clamped"),
        (casts_values, "values are cast"),
        (wants_multiples_of_32, "a multiple of 32"),
        (is_no_attention, "not attention"),
    ],
)
def test_what_cannot_be_identified_is_said_and_not_guessed(kernel: BareKernel, words: str) -> None:
    with pytest.raises(NotIdentifiable, match=words):
        read(kernel, Regime(100))


def test_a_kernel_whose_first_call_alone_differs_is_read_and_said_to() -> None:
    calls: list[int] = []

    def chooses(q: Any, k: Any, v: Any, **more: Any) -> torch.Tensor:
        calls.append(1)
        return textbook(q, k, v, **more) * (1 if len(calls) > 1 else 1 + 1e-6)

    found = read(chooses, Regime(300))
    assert found.parts == 1 and not found.deterministic
    assert found.how["deterministic"] == "the first call gave other bits than the 8 after it"

    def alternates(q: Any, k: Any, v: Any, **more: Any) -> torch.Tensor:
        calls.append(1)
        return textbook(q, k, v, **more) * (1 + 1e-6 * (len(calls) % 2))

    with pytest.raises(NotIdentifiable, match=r"8 of 8 repetitions .* by up to 1e-06 of the result"):
        read(alternates, Regime(300))


def test_weights_that_are_divided_before_they_are_rounded() -> None:
    def attend(q: Any, k: Any, v: Any, **more: Any) -> torch.Tensor:
        return textbook(q, k, v, p=torch.float16, **more)

    found = read(attend, Regime(300))
    assert (found.p, found.p_normalised, found.offset, found.parts) == ("f16", True, None, 1)
    plain = read(textbook, Regime(300))
    assert (plain.p, plain.p_normalised) == ("f32", False)
    # Which keys a matrix library sums first is the processor's choice, and no tile.
    assert (plain.tile, plain.tile_order) == (None, None)


def test_groups_within_the_first_product_are_no_products() -> None:
    """Vector units add eight keys at a time: beside a number of the first product itself that shows, and
    read as products of no one size it hid those."""

    def attend(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> torch.Tensor:
        ratio, n = q.shape[2] // k.shape[2], k.shape[1]
        s = scale * torch.einsum("bthd,bshd->bths", q.float(), k.float().repeat_interleave(ratio, 2))
        w = torch.exp(s - s.amax(-1, keepdim=True))
        wide, total = v.float().repeat_interleave(ratio, 2), torch.zeros(*q.shape[:3], v.shape[3])
        for tile in range(0, n, 32):
            product = torch.zeros_like(total)
            for i in range(tile, min(tile + 32, n), 8):
                some = slice(i, min(i + 8, tile + 32))
                product += torch.einsum(
                    "bths,bshd->bthd", w[..., some].double(), wide[:, some].double()
                ).float()
            total += product
        return total / w.sum(-1, keepdim=True)

    found = read(attend, Regime(200))
    assert (found.p, found.tile, found.mma_block, found.parts) == ("f32", None, 32, 1)
    assert found.how["mma_block"] == "order of sums"


def test_float16_sums_are_read_beneath_an_offset_that_keeps_a_few_keys_from_overflowing() -> None:
    """llama.cpp on CUDA from 8,192 keys on: keys lie in turn in the sums of four warps, in parts that are
    merged without a division. Read as TF32 sums of a P that could not be told, before."""
    found = read(functools.partial(ggml_mma.mma, parts=3), Regime(1000))
    seen = (found.p, found.accumulator, found.accumulator_bits, found.tile, found.sum_step, found.result)
    assert seen == ("f16", "f16", 11, 16, 16, "f32") and found.tile_order is None
    assert found.offset is not None and abs(found.offset - ggml_mma.OFFSET) < 1e-5
    assert found.l_of_rounded_p is False and found.first_product == "f16"
    # Sixteen tiles of 64 keys in three parts: 5 or 6 tiles of 16 keys, and what the count leaves open.
    assert {min(found.sum_keys) // 16, max(found.sum_keys) // 16} == {5, 6}
    wide = read(ggml_mma.f32_sums, Regime(700))
    assert (wide.p, wide.accumulator, wide.sum_keys) == ("f16", "f32", ())
    one = read(ggml_mma.one_part, Regime(500))
    assert (one.accumulator, one.tile, one.mma_block, set(one.sum_keys)) == ("f16", 64, 16, {500})


def to_half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({}, "tf32"),
        ({"out": torch.float16}, "tf32"),
        ({"kind": to_half}, "f16"),
        ({"kind": to_half, "out": torch.float16}, "f16"),
        ({"divided": True}, "tf32"),
        ({"kind": to_half, "divided": True}, "f16"),
        # Nothing overflows, and the result has float16's least steps itself: the looser holds.
        ({"kind": to_half, "divided": True, "out": torch.float16}, "f16"),
        ({"divided": True, "out": torch.float16}, "f16"),
    ],
)
def test_sums_of_11_bits_are_told_apart_by_their_range(options: dict[str, Any], due: str) -> None:
    found = read(functools.partial(ggml_mma.narrow_sums, **options), Regime(160))
    assert (found.accumulator, found.accumulator_bits) == (due, 11)
    # P that was divided by l before its products are rounded cannot be told.
    assert found.p == (None if options.get("divided") else "f16")


def test_keys_that_a_sum_of_16_bits_takes_are_not_counted_behind_a_result_that_hides_them() -> None:
    assert read(bare(build_kernel("eager:acc=f16,out=f16")), Regime(300)).sum_keys == ()
    two = read(bare(build_kernel("eager:acc=f16,kv=2,block=32")), Regime(300))
    assert max(two.sum_keys) < 160 + 16 and min(two.sum_keys) >= 140


@pytest.mark.parametrize(("lanes", "split"), [(1, 1), (8, 1), (2, 3)])
def test_matrix_products_of_a_library_are_no_parts(lanes: int, split: int) -> None:
    """Fused multiplications leave a residue of pairs whose values are no powers of two."""
    found = read(functools.partial(ggml_mma.matrix_products, lanes=lanes, split=split), Regime(200))
    assert (found.p, found.accumulator, found.result, found.parts) == ("f32", "f32", "f16", 1)
