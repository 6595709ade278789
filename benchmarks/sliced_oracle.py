"""The oracle with its products in slices: how far it lies from float64, and what it takes.

    python benchmarks/sliced_oracle.py [--out FILE.json]
    python benchmarks/sliced_oracle.py --device cuda [--seconds 50] [--out FILE.json]

With `--device cuda` the oracle is timed as it is built, in float64 and in slices, and its products alone by
several tiles; nothing new is begun after `--seconds`. Without, on paper:

Slices are whole numbers of a few bits, here held in float64, so what is measured is what integers give that a
tensor core adds up without rounding (int8 into int32, float16 into float32): the agreement is that of the
hardware. Pairs of slices are counted as they are multiplied. Seconds are not measured: a card's are its data
sheet's rate by the operations counted, and what stays in float64 is counted beside, at REACHED of it. Of the
rate of int8, and of float16's, every card has the share that int8 had on an H200 (`measured_shares`). `built`
is counted so for `verify.kernels.int8_tiles`, with the bytes that attention moves beside its products.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from commit import commit, gpu_run, write_result

from verify.kernels import int8_products
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import error_budget
from verify.kernels.call import Call, checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.heads import Heads
from verify.kernels.int8_products import int8_bmm, product_by_heads
from verify.kernels.judging.families import FAMILIES, InputSizes, draw
from verify.kernels.oracle_products import PRODUCTS, Product, timed_products

SIZES = InputSizes(n_kv=(700, 300, 65), edges=(64, 256, 640))
AGREE = 1e-10
# Share of a nominal rate that large products reach: 50 of 66.9 TFLOP/s in results/h100-glm-layers.json.
REACHED = 0.75
# Operations of float64 a logit that no slice takes over: exp (a polynomial of degree 11, its reduction and
# scaling), the maximum, the sum, and adding up each pair's whole numbers.
EXP_OPERATIONS, OTHER_OPERATIONS = 30, 4


class Slices(NamedTuple):
    """bits: of a slice, its sign left out; chunk: terms whose sum is exact; most: slices of a number."""

    name: str
    bits: int
    chunk: int
    most: int


# 2^(2 bits) chunk is at most 2^24 where float32 adds up, 2^31 where int32 does.
KINDS = (
    *(Slices(f"int8, {n} slices", 7, 1 << 16, n) for n in (4, 5, 6, 7)),
    *(Slices(f"float16, {n} slices", 8, 1 << 8, n) for n in (4, 5, 6)),
)


# Heads, tokens of a window and numbers a head of a layer.
LAYER_HEADS, LAYER_KEYS, LAYER_HEAD = 96, 8192, 128
# Operations of its products: in steps of 85 rows (2^26 logits), each with the keys up to its last row.
LAYER = 4.0 * LAYER_HEADS * LAYER_KEYS**2 * (1 + 85 / LAYER_KEYS) / 2 * LAYER_HEAD
MEASURED = Path(__file__).parent / "results/h200-sliced-oracle.json"


class Card(NamedTuple):
    """Nominal dense operations a second: float64 (on tensor cores where it has them), int8, float16 into
    float32; and bytes of its memory."""

    name: str
    float64: float
    int8: float
    float16: float
    bytes: float


CARDS = (
    Card("H200", 67e12, 1979e12, 989e12, 4.8e12),
    Card("RTX 3090", 35.6e12 / 64, 284e12, 71e12, 0.936e12),
    Card("RTX 4090", 82.6e12 / 64, 660.6e12, 165.2e12, 1.008e12),
)
# Of what is built, a logit: pairs of digits; float64 operations of cutting P (scaled, compared, two
# additions, two conversions) and of the sums of seven powers (converted, scaled, added); bytes beside the
# products: scaled in place, read twice and written by the softmax, read for the largest.
PAIRS, CUT_OPERATIONS, SUM_OPERATIONS = 28, 6, 3 * 7
BYTES = 16 + 24 + 8


class Shares(NamedTuple):
    """Of the nominal rate of int8 on an H200."""

    alone: float  # products by their fastest tiles, with cutting and writing
    attention: float  # the same products over all seconds of attention


def measured_shares() -> Shares:
    """By MEASURED."""
    found, nominal = json.loads(MEASURED.read_text()), CARDS[0].int8
    heads, rows, keys, size = json.loads(found["shape"].replace("(", "[").replace(")", "]"))
    # The first shape's lines; there was one shape, which was not said.
    lines = [x for x in found["alone"] if x.get("shape", [heads, rows, keys, size])[1] == rows]
    tiles = [line for line in lines if line.get("same_bits") and "tile" in line]
    seconds = sum(min(line[name] for line in tiles) for name in ("of_logits_s", "of_values_s"))
    (attention,) = (
        line["seconds"]
        for line in found["attention"]
        if (line["heads"], line["n_kv"], line["products"])
        == (f"{LAYER_HEADS}/8 x {LAYER_HEAD}", LAYER_KEYS, "int8")
    )
    return Shares(
        alone=4.0 * heads * rows * keys * size * PAIRS / seconds / nominal,
        attention=LAYER * PAIRS / attention / nominal,
    )


class Counted:
    """A product in slices that counts what it multiplies."""

    def __init__(self, kind: Slices) -> None:
        self.kind, self.pairs, self.products, self.elements = kind, 0.0, 0.0, 0.0

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        kind, out = self.kind, a.new_zeros((a.shape[0], a.shape[1], b.shape[2]))
        for first in range(0, a.shape[2], kind.chunk):
            chunk = slice(first, first + kind.chunk)
            left, e_left = self._slices(a[:, :, chunk], 2)
            right, e_right = self._slices(b[:, chunk], 1)
            total = torch.zeros_like(out)
            for i, x in enumerate(left):
                for j, y in enumerate(right[: kind.most - i]):
                    whole = torch.bmm(x, y)
                    assert float(whole.abs().amax()) < (2**31 if kind.bits == 7 else 2**24 + 1)
                    total.add_(whole, alpha=2.0 ** (-kind.bits * (i + j + 2)))
                    self.pairs += 2.0 * x.numel() * y.shape[2]
                    self.elements += whole.numel()
            self.products += 2.0 * a[:, :, chunk].numel() * b.shape[2]
            out += torch.ldexp(total, e_left + e_right)
        return out

    def _slices(self, x: torch.Tensor, dim: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        exponent = torch.frexp(x.abs().amax(dim, keepdim=True)).exponent
        rest, found = torch.ldexp(x, -exponent), []
        for i in range(self.kind.most):
            whole = torch.round(torch.ldexp(rest, torch.tensor(self.kind.bits * (i + 1))))
            if self.kind.bits == 7:
                # A byte ends at 127: what is left of 128 goes into the next slice.
                whole = whole.clamp(-127, 127)
            found.append(whole)
            rest = rest - torch.ldexp(whole, torch.tensor(-self.kind.bits * (i + 1)))
            if not rest.any():
                break
        return found, exponent


def error_of(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], family: str) -> float:
    """Largest |out - float64's| over sum p |v| of its row and column."""
    call = draw(family, SIZES, 0)
    size = error_budget(call, Arithmetic(cuts_at=lambda n: (0, n))).size
    found, due = exact_attention(call, product), exact_attention(call)
    return float(((found.out - due.out).abs() / size.clamp(min=1e-300)).max())


def seconds_of(card: Card, kind: Slices, pairs_each: float, products: float, head: int) -> dict[str, float]:
    """Seconds of attention whose two products are so many operations, with heads of `head` numbers."""
    # Two products of `head` terms a logit, and two matrices of results that are added up a pair.
    logits = products / (4 * head)
    rest = logits * (EXP_OPERATIONS + OTHER_OPERATIONS)
    rate = measured_shares().alone * (card.int8 if kind.bits == 7 else card.float16)
    adding = logits * (1 + head / 128) * pairs_each * 2
    return {
        "float64": products / (REACHED * card.float64) + rest / (REACHED * card.float64),
        "sliced": products * pairs_each / rate + (rest + adding) / (REACHED * card.float64),
        "of_that_products": products * pairs_each / rate,
    }


def built_seconds(card: Card, products: float, head: int) -> dict[str, float]:
    """The same of `verify.kernels.int8_tiles`: products, float64 and passes over memory one after the other;
    at_most: were everything but float64 as slow beside the card's int8 as on an H200."""
    logits, shares = products / (4 * head), measured_shares()
    float64 = logits * (EXP_OPERATIONS + OTHER_OPERATIONS + CUT_OPERATIONS + SUM_OPERATIONS)
    parts = {
        "products": products * PAIRS / (shares.alone * card.int8),
        "float64_left": float64 / (REACHED * card.float64),
        "moved": logits * BYTES / (REACHED * card.bytes),
    }
    at_most = products * PAIRS / (shares.attention * card.int8) + parts["float64_left"]
    return parts | {"sliced": sum(parts.values()), "at_most": at_most}


# Heads, n_kv (rows too: a window) and windows in a call.
WINDOWS = tuple(
    (heads, n_kv, batch)
    for heads in (Heads(9, 3, 64, 64), Heads(96, 8, 128, 128))
    for n_kv, batch in ((512, 16), (8192, 1))
)
# KV heads, rows, keys and numbers a head of products that are timed alone: many rows, and as many as
# attention of 96 heads over 8,192 keys takes at once.
ALONE = ((8, 4096, 8192, 128), (8, 1020, 8192, 128))
# rows, columns, terms, warps, stages of `int8_tiles.Tile`.
TILES = (
    (128, 128, 64, 8, 3), (64, 64, 64, 4, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 128, 128, 8, 3),
    (128, 64, 128, 8, 3), (64, 64, 128, 4, 4), (128, 256, 64, 8, 3),
)  # fmt: skip


def by_matrices(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`int8_bmm` without its tiles."""
    with mock.patch.object(int8_products, "has_tiles", lambda device: False):
        return int8_bmm(a, b)


WAYS: dict[str, Product] = {
    "float64": PRODUCTS["float64"],
    "int8": int8_bmm,
    "int8 by whole matrices": by_matrices,
    "double-float32": PRODUCTS["double-float32"],
}


def seconds_of_run(run: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """The least of some runs, the first left out."""
    found = []
    for _ in range(1 + times):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
        if sum(found) > 3 and len(found) > 1:
            break
    return min(found[1:])


def window(heads: Heads, n_kv: int, batch: int, device: torch.device) -> Call:
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(batch, n_kv, h, heads.k_size, generator=g, device=device).half()
        for h in (heads.q, heads.kv, heads.kv)
    )
    rows = torch.arange(1, n_kv + 1, dtype=torch.int32, device=device).expand(batch, n_kv)
    return checked_call(q, k, v, kv_len=rows, scale=heads.k_size**-0.5)


def timed_windows(device: torch.device) -> Iterator[dict[str, Any]]:
    """A line a window of rows and way of multiplying: logits a second that a causal mask leaves, and
    differences in units of sum p |v|."""
    for heads, n_kv, batch in WINDOWS:
        call = window(heads, n_kv, batch, device)
        exact = exact_attention(call, WAYS["float64"], with_lse=False).out
        size = exact_attention(replace(call, v=call.v.abs()), WAYS["float64"], with_lse=False).out
        logits = batch * heads.q * n_kv * (n_kv + 1) / 2
        for name, product in WAYS.items():
            if name == "double-float32" and n_kv > 512:
                continue
            seconds = seconds_of_run(partial(exact_attention, call, product, with_lse=False), device)
            found = exact_attention(call, product, with_lse=False).out
            yield {
                "heads": str(heads),
                "n_kv": n_kv,
                "windows": batch,
                "products": name,
                "seconds": seconds,
                "logits_per_s": logits / seconds,
                "largest_difference": float(((found - exact).abs() / size).max()),
                "same_bits_again": torch.equal(found, exact_attention(call, product, with_lse=False).out),
            }


def timed_alone(device: torch.device) -> Iterator[dict[str, Any]]:
    """Both products of an attention alone, in float32, float64 and by tile, as chosen too; and cutting P."""
    for shape in ALONE:
        for line in timed_shape(shape, device):
            yield {"shape": list(shape)} | line


def timed_shape(shape: tuple[int, int, int, int], device: torch.device) -> Iterator[dict[str, Any]]:
    """The same of one shape."""
    heads, rows, keys, size = shape
    g = torch.Generator(device).manual_seed(0)
    q, k, p, v = (
        torch.rand(shape, generator=g, device=device, dtype=torch.float64)
        for shape in ((heads, rows, size), (heads, keys, size), (heads, rows, keys), (heads, keys, size))
    )
    k = k.transpose(1, 2)
    flop = 2.0 * heads * rows * keys * size
    for dtype in (torch.float32, torch.float64):
        of_q, of_p = ([x.to(dtype) for x in pair] for pair in ((q, k), (p, v)))
        yield {
            "products": str(dtype).removeprefix("torch."),
            "of_logits_s": (a := seconds_of_run(partial(torch.bmm, *of_q), device)),
            "of_values_s": (b := seconds_of_run(partial(torch.bmm, *of_p), device)),
            "flop_per_s": 2 * flop / (a + b),
        }
    if not int8_products.has_tiles(device):
        return
    from verify.kernels import int8_tiles

    e_q, e_k, e_p, e_v = (torch.frexp(x.amax(dim)).exponent for x, dim in ((q, 2), (k, 1), (p, 2), (v, 1)))
    due: torch.Tensor | None = None
    for numbers in (None, *TILES):
        always: dict[str, Any] = {}
        if numbers:
            tile = int8_tiles.Tile(*numbers)
            # Whatever the product.
            always["tile_of"] = lambda *_, tile=tile: tile
            always["terms_at_once"] = lambda _, tile=tile: tile.terms
        with ExitStack() as patched:
            for name, value in always.items():
                patched.enter_context(mock.patch.object(int8_tiles, name, value))
            line: dict[str, Any] = {"products": "int8", "tile": list(numbers) if numbers else "chosen"}
            try:
                line["of_logits_s"] = a = seconds_of_run(
                    lambda: int8_products.tile_product(q, k, e_q, e_k, int8_products.SLICES), device
                )
                line["of_values_s"] = b = seconds_of_run(
                    lambda: int8_products.tile_product(p, v, e_p, e_v, int8_products.SLICES), device
                )
                line["of_which_cutting_p_s"] = seconds_of_run(
                    lambda: int8_tiles.cut(
                        p, torch.ones_like(p[:, :, 0]), int8_products.SLICES, largest_first=False
                    ),
                    device,
                )
                line["int8_operations_per_s"] = 2 * flop * PAIRS / (a + b)
                line["float64_flop_per_s"] = 2 * flop / (a + b)
                found = int8_products.tile_product(p, v, e_p, e_v, int8_products.SLICES)
                due = found if due is None else due
                line["same_bits"] = torch.equal(found, due)
            except Exception as error:  # a tile that a card does not hold is a line of the table
                line["failed"] = f"{type(error).__name__}: {error}"[:160]
        yield line
    assert due is not None
    yield {
        "products": "int8 by whole matrices",
        "of_values_s": seconds_of_run(lambda: product_by_heads(p, v, e_p, e_v, int8_products.SLICES), device),
        "same_bits": torch.equal(product_by_heads(p, v, e_p, e_v, int8_products.SLICES), due),
    }


def on_device(device: torch.device, seconds: float, out: Path | None) -> None:
    """Everything that is timed, written as it goes."""
    begun = time.perf_counter()
    result: dict[str, Any] = gpu_run(ALONE[0]) if device.type == "cuda" else {"commit": commit()}
    chosen = timed_products(device)
    # JSON has no NaN.
    auto = {name: None if value != value else value for name, value in chosen._asdict().items()}
    result |= {"auto": auto, "auto_took_s": time.perf_counter() - begun}
    print(json.dumps(result["auto"]), flush=True)
    for name, lines in (("alone", timed_alone(device)), ("attention", timed_windows(device))):
        result[name] = []
        for line in lines:
            result[name].append(line | {"at_s": round(time.perf_counter() - begun, 1)})
            print(json.dumps(line), flush=True)
            if out:
                # What was measured is kept, whatever the next one does.
                out.write_text(json.dumps(result, indent=1) + "\n")
            if time.perf_counter() - begun > seconds:
                result["stopped"] = f"after {seconds:g} s"
                break
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--seconds", type=float, default=50)
    known = parser.parse_args()
    if known.device:
        torch.set_grad_enabled(False)
        on_device(torch.device(known.device), known.seconds, known.out)
        return
    lines: list[dict[str, Any]] = []
    for kind in KINDS:
        errors, pairs, products = {}, 0.0, 0.0
        for family in FAMILIES:
            counted = Counted(kind)
            errors[family] = error_of(counted, family)
            pairs, products = pairs + counted.pairs, products + counted.products
        worst = max(errors, key=errors.__getitem__)
        each = pairs / products
        lines.append(
            {
                "kind": kind.name,
                "largest_error": errors[worst],
                "of": worst,
                "agrees": errors[worst] <= AGREE,
                "products_of_slices_for_each": each,
                "seconds": {card.name: seconds_of(card, kind, each, LAYER, LAYER_HEAD) for card in CARDS},
            }
        )
        print(f"{kind.name:20} {errors[worst]:.1e} ({worst}), {each:.1f} products each", flush=True)
    result = {
        "command": "python benchmarks/sliced_oracle.py",
        "commit": commit(),
        "computed": "agreement with slices held in float64; seconds by counted operations, not measured",
        "shares_of_int8_on_an_H200": measured_shares()._asdict(),
        "lines": lines,
        "built": {card.name: built_seconds(card, LAYER, LAYER_HEAD) for card in CARDS},
    }
    write_result(result, known.out)


if __name__ == "__main__":
    main()
