"""What a whole text takes on models that nobody here has run: by bytes and operations, from measured rates.

    python benchmarks/scale.py [--windows 64] [--out FILE.json]

Runs nothing. Rates are those of results/h100-glm-layers.json: float32 products, what else a layer takes, and
the disk. A layer's products and bytes follow from its sizes; attention and evidence in place grow with heads
and head sizes, work on states with their width. GPUs share the windows, one of a node reads, and reading goes
on beside the arithmetic: a layer takes the slower of the two. What this says of the runs that were measured
stands beside them. Cards of 24 GB are told by their data sheets, at the share of the nominal rate that the
H100 reaches.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from commit import commit, write_result

RESULTS = Path(__file__).parent / "results"
N_CTX = 512
# Exact, floor, baseline, candidate, and the last three with frozen casts: the control shares its baseline's.
PASSES = 7
# Passes of float64 attention, and what budgets of sampled rows add: ten rows of 512, thirteen products.
EXACT_PASSES, BUDGET_SHARE = 5, 13 * 10 / (2 * N_CTX)
# Of the square of a window: float64 attention goes in two steps of rows.
SQUARE = 0.75
# Bytes of a weight as it is stored.
Q4_K, Q8_0 = 144 / 256, 34 / 32
# States are held once, and about three times more while experts run.
STATES_AT_ONCE = 4
# Of a card's memory, what is not for states: the weights at hand, logits, the program.
NOT_FOR_STATES = 2e9


class Model(NamedTuple):
    """Sizes of a model with experts; of its first layers, which are dense, `inner` is that of each."""

    name: str
    layers: int  # all of them
    dense: int  # of those the first, without experts
    width: int  # of a state
    attention: float  # weights of a layer's attention
    heads: int  # query heads
    head_sizes: int  # size of a key and of a value together, as attention multiplies them
    inner: int  # of a dense layer
    experts: int  # of a layer
    used: int  # by a token, the shared ones included
    shared: int  # of those, without a choice
    expert_inner: int  # of an expert
    vocabulary: int  # tokens

    def flop(self, rows: float) -> float:
        """Operations of all weight products for so many rows; logits of half of them."""
        dense = self.attention + 3 * self.width * self.inner
        mixture = self.attention + 3 * self.width * self.expert_inner * self.used + self.width * self.experts
        layers = self.dense * dense + (self.layers - self.dense) * mixture
        return 2.0 * rows * (layers + self.width * self.vocabulary / 2)

    def stored(self, of_experts: float) -> float:
        """Bytes of the file: attention and dense layers in Q8_0, experts at so many bytes a weight."""
        an_expert = 3 * self.width * self.expert_inner
        mixture = self.attention * Q8_0 + (self.experts + self.shared) * an_expert * of_experts
        dense = (self.attention + 3 * self.width * self.inner) * Q8_0
        return (
            self.dense * dense
            + (self.layers - self.dense) * mixture
            + 2 * self.width * self.vocabulary * Q8_0
        )

    def attention_flop(self, windows: int) -> float:
        """Operations of one pass of attention over whole windows, the halves that nobody sees left out."""
        return 2.0 * windows * self.layers * self.heads * self.head_sizes * SQUARE * N_CTX**2

    def state_bytes(self, windows: int) -> float:
        return 4.0 * windows * N_CTX * PASSES * self.width


def grouped(width: int, heads: int, kv_heads: int, size: int) -> float:
    return float(width * size * 2 * (heads + kv_heads))


def latent(width: int, heads: int, q_rank: int, kv_rank: int, nope: int, rope: int, value: int) -> float:
    """Weights of attention over a latent cache (MLA)."""
    queries = width * q_rank + q_rank * heads * (nope + rope)
    return float(
        queries + width * (kv_rank + rope) + heads * kv_rank * (nope + value) + heads * value * width
    )


MODELS = (
    Model("GLM-4.5-Air", 46, 1, 4096, grouped(4096, 96, 8, 128), 96, 256, 10944, 128, 9, 1, 1408, 151552),
    Model("GLM-4.7", 92, 3, 5120, grouped(5120, 96, 8, 128), 96, 256, 12288, 160, 9, 1, 1536, 151552),
    Model(
        "DeepSeek V3", 61, 3, 7168, latent(7168, 128, 1536, 512, 128, 64, 128), 128, 576 + 512,
        18432, 256, 9, 1, 2048, 129280,
    ),
)  # fmt: skip
# What was measured: layers of GLM-4.5-Air's sizes over a vocabulary of bytes.
MEASURED = MODELS[0]


class Card(NamedTuple):
    """A GPU by its data sheet: float32 and float64 operations a second, bytes of memory."""

    name: str
    float32: float
    float64: float
    memory: float


H100_NOMINAL = 66.9e12
CARDS = (
    Card("RTX 3090", 35.6e12, 35.6e12 / 64, 24e9),
    Card("RTX 4090", 82.6e12, 82.6e12 / 64, 24e9),
)


class Rates(NamedTuple):
    """Of a GPU and its node, from one measured layer of MEASURED; seconds are for one row of one pass."""

    products: float  # operations a second
    padding: float  # operations done for each that is due
    attention: (
        float  # seconds of float16 attention and of evidence in place, a unit of heads times head sizes
    )
    exact: float  # operations a second of float64 attention
    elementwise: float  # seconds a row and number of its state
    disk: float  # bytes a second


def measured_rates(found: Mapping[str, Any]) -> Rates:
    kinds, rows = found["layer_seconds_by_kind"], found["windows"] * found["n_ctx"] * PASSES
    exact = [
        s for name, s in kinds.items() if name == "attention exact" or "floor" in name or "frozen" in name
    ]
    kernels = (
        sum(kinds[f"attention {arm}"] for arm in ("baseline", "control", "candidate")) + kinds["in place"]
    )
    done = EXACT_PASSES * MEASURED.attention_flop(found["windows"]) / MEASURED.layers
    return Rates(
        products=found["product_flop_per_s"],
        padding=found["layer_product_flop"] / found["layer_flop_without_padding"],
        attention=kernels / (rows * MEASURED.heads * MEASURED.head_sizes),
        exact=done / sum(exact),
        elementwise=(kinds["elementwise"] + kinds["weights"] + kinds["scoring"]) / (rows * MEASURED.width),
        disk=found["disk_bytes_per_s"],
    )


def arithmetic_s(model: Model, rates: Rates, windows: int) -> dict[str, float]:
    """Seconds of one GPU, by kind."""
    rows = windows * N_CTX * PASSES
    return {
        "products": model.flop(rows) * rates.padding / rates.products,
        "attention and in place": rates.attention * rows * model.layers * model.heads * model.head_sizes,
        "float64 attention": (EXACT_PASSES + BUDGET_SHARE) * model.attention_flop(windows) / rates.exact,
        "elementwise": rates.elementwise * rows * model.layers * model.width,
    }


def wall_s(arithmetic: float, reading: float, gpus: int, groups: int, layers: int) -> float:
    """The slower of the two, and the first layer's reading, which nothing hides."""
    return max(arithmetic / gpus, groups * reading) + reading / layers


def of_model(model: Model, rates: Rates, windows: int) -> dict[str, Any]:
    kinds = arithmetic_s(model, rates, windows)
    one = sum(kinds.values())
    found: dict[str, Any] = {
        "model": model.name,
        "windows": windows,
        "product_flop": model.flop(windows * N_CTX * PASSES),
        "state_bytes": model.state_bytes(windows),
        "seconds_of_one_gpu": kinds,
        "by_type_of_experts": {},
    }
    for name, of_experts in (
        ("Q4_K", Q4_K),
        ("as measured: two thirds Q4_K, a third Q8_0", (2 * Q4_K + Q8_0) / 3),
    ):
        stored = model.stored(of_experts)
        reading = stored / rates.disk
        cards = {}
        for card in CARDS:
            share = card.float32 / H100_NOMINAL
            room = card.memory - NOT_FOR_STATES
            groups = math.ceil(STATES_AT_ONCE * model.state_bytes(windows) / room)
            slower = {kind: seconds / share for kind, seconds in kinds.items()}
            flop = (EXACT_PASSES + BUDGET_SHARE) * model.attention_flop(windows)
            slower["float64 attention"] = max(flop / card.float64, kinds["float64 attention"] / share)
            cards[card.name] = {
                "groups": groups,
                "seconds": wall_s(sum(slower.values()), reading, 1, groups, model.layers),
                "of_these_float64_attention": slower["float64 attention"],
            }
        found["by_type_of_experts"][name] = {
            "bytes": stored,
            "reading_s": reading,
            "seconds_by_gpus": {n: wall_s(one, reading, n, 1, model.layers) for n in (1, 2, 4, 8)},
            # From so many on more GPUs wait for the disk; nodes of eight, each with the file on its own disk.
            "gpus_at_which_reading_dominates": one / reading,
            "nodes_of_eight_at_which_it_does": math.ceil(one / reading / 8),
            "cards": cards,
        }
    return found


def checks(found: Mapping[str, Any], rates: Rates) -> list[dict[str, Any]]:
    """What this says of runs that were measured: their operations by sizes alone, and their seconds."""
    lines = []
    # A vocabulary of bytes and one dense layer, with one and with four layers of experts.
    for run, mixtures in zip(found["runs"], (1, 4), strict=True):
        sizes = MEASURED._replace(layers=1 + mixtures, vocabulary=256)
        seconds = arithmetic_s(sizes, rates, found["windows"])
        flop = sizes.flop(found["windows"] * found["n_ctx"] * PASSES) * rates.padding
        lines.append(
            {
                "layers": sizes.layers,
                "product_flop": [flop, run["product_flop"]],
                "read_bytes": [sizes.stored((2 * Q4_K + Q8_0) / 3), run["read_bytes"]],
                "groups_s": [sum(seconds.values()), run["groups_s"]],
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--out", type=Path)
    known = parser.parse_args()
    measured = json.loads((RESULTS / "h100-glm-layers.json").read_text())
    rates = measured_rates(measured)
    result = {
        "command": "python benchmarks/scale.py --windows " + str(known.windows),
        "commit": commit(),
        "computed_from": "h100-glm-layers.json",
        "rates": rates._asdict(),
        "said_and_measured": checks(measured, rates),
        "models": [of_model(model, rates, known.windows) for model in MODELS],
    }
    write_result(result, known.out)


if __name__ == "__main__":
    main()
