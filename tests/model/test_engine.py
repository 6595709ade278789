"""Tiny files of every architecture against llama.cpp itself: the engine where it is here, else its logits
as they were stored.

    python tests/model/test_engine.py [NAME ...]      asks the engine and stores its logits anew
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.model_engine import ModelEngine, model_engine
from support.plain_arms import ExactArm, logits_of, relative
from support.tiny_files import TOKENS
from support.tiny_models import TINY, three_tensors
from verify.model.architectures import ARCHITECTURES, architecture_of
from verify.model.architectures.architecture import Architecture
from verify.model.architectures.delta_net import DeltaNet
from verify.model.architectures.experts import Experts
from verify.model.blocks import rms_norm, swiglu
from verify.model.gguf.file import GGUFFile
from verify.model.runner import Runner

STORED = Path(__file__).parent / "oracles" / "engine_logits.npz"
# Positions whose logits are stored.
LAST = slice(-3, None)
AGREES = 1e-4
# Here values lie so near steps of the engine's table of GELU that float32's rounding, which no two programs
# share, takes some to the other side. How far that moves the logits is measured (`moved_by_rounding`).
ON_A_STEP = ("gemma2-largest", "gemma4-shared-keys")
# Units of the last place of a float32 that a sum of 48 products ends up off by.
ROUNDINGS = 4


def gelu_by_table(x: torch.Tensor, approximate: str, draw: torch.Generator | None = None) -> torch.Tensor:
    """As the engine has it: from a table of float16, outside of -10 ... 10 by its limits.

    draw: moves each number that is looked up by up to ROUNDINGS of its last place.
    """
    assert approximate == "tanh"
    near = x
    if draw is not None:
        unit = torch.nextafter(x, torch.tensor(torch.inf)) - x
        near = x + unit * torch.randint(-ROUNDINGS, ROUNDINGS + 1, x.shape, generator=draw)
    found = GELU(near.half().float(), approximate=approximate).half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, found))


GELU = torch.nn.functional.gelu


@pytest.fixture(autouse=True, scope="module")
def the_engines_gelu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "gelu", gelu_by_table)
        yield


def logits(path: Path) -> np.ndarray:
    return logits_from(architecture_of(GGUFFile.open(path)))


def logits_from(architecture: Architecture) -> np.ndarray:
    runner = Runner(architecture, device=torch.device("cpu"), attention_type="f32")
    found = logits_of(runner, TOKENS[None], [ExactArm()], range(len(TOKENS)))["exact"][0].numpy()
    runner.stream.close()
    return found


@pytest.fixture(scope="module")
def file_named(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("tiny")

    def get(name: str) -> Path:
        path = folder / f"{name}.gguf"
        return path if path.exists() else TINY[name].write(path)

    return get


@pytest.fixture(scope="module")
def ours(file_named: Callable[[str], Path]) -> Callable[[str], np.ndarray]:
    """Our logits of a file, computed when they are first asked for."""
    return cache(lambda name: logits(file_named(name)))


@pytest.fixture(scope="module")
def engine() -> Iterator[ModelEngine]:
    found = model_engine()
    yield found
    found.close()


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(STORED) as file:
        return dict(file)


def moved_by_rounding(path: Path, plain: np.ndarray) -> float:
    """How far the engine's table takes our own logits when what is looked up in it is rounded otherwise."""
    found = []
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "gelu", partial(gelu_by_table, draw=draw))
            found.append(relative(logits(path), plain))
    return max(found)


@pytest.fixture(scope="module")
def allowed(file_named: Callable[[str], Path], ours: Callable[[str], np.ndarray]) -> Callable[[str], float]:
    """The distance between two right programs."""

    def get(name: str) -> float:
        if name not in ON_A_STEP:
            return AGREES
        moved = moved_by_rounding(file_named(name), ours(name))
        assert AGREES < moved < 1e-3
        return AGREES + moved

    return cache(get)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_the_engine_gave(
    ours: Callable[[str], np.ndarray],
    stored: dict[str, np.ndarray],
    allowed: Callable[[str], float],
    name: str,
) -> None:
    assert relative(ours(name)[LAST], stored[name]) < allowed(name)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_the_engine(
    file_named: Callable[[str], Path],
    ours: Callable[[str], np.ndarray],
    engine: ModelEngine,
    allowed: Callable[[str], float],
    name: str,
) -> None:
    assert relative(ours(name), engine.logits(file_named(name), TOKENS)) < allowed(name)


def no_sinks(a: Any) -> None:
    a.sinks = [None] * a.layers


def window_off_by_one(a: Any) -> None:
    a.window += 1


def window_off_by_one_below(a: Any) -> None:
    a.window -= 1


def other_kind_of_layer(a: Any) -> None:
    a.local = [not windowed for windowed in a.local]


def no_softcap(a: Any) -> None:
    a.softcap = None


def no_final_softcap(a: Any) -> None:
    a.final_softcap = None


def no_gate(a: Any) -> None:
    a.attention_gate = lambda *_: None


def plain_swiglu(a: Any) -> None:
    a.feed_forwards[:] = [
        replace(block, gate=swiglu, shared_gate=swiglu) if isinstance(block, Experts) else block
        for block in a.feed_forwards
    ]


def not_clamped(a: Any) -> None:
    def unclamped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    a.feed_forwards[:] = [replace(block, gate=unclamped) for block in a.feed_forwards]


def softmax_over_all(a: Any) -> None:
    a.feed_forwards[:] = [replace(block, gating="softmax") for block in a.feed_forwards]


def shared_not_gated(a: Any) -> None:
    a.feed_forwards[:] = [replace(block, shared_is_gated=False) for block in a.feed_forwards]


def all_groups(a: Any) -> None:
    a.feed_forwards[1] = replace(a.feed_forwards[1], groups_used=a.feed_forwards[1].groups)


def norm_a_head(a: Any) -> None:
    """Each head of q and k by its own size, not all heads of a token together."""

    def project(layer: int, h: torch.Tensor, weights: Any, products: Any) -> list[torch.Tensor]:
        q, k, v = type(a).project(a, layer, h, weights, products)
        sizes = a.heads[layer], a.kv_heads[layer]
        q, k = (
            rms_norm(part.unflatten(-1, (n, -1)), torch.ones(()), a.eps).flatten(1)
            for part, n in zip((q, k), sizes, strict=True)
        )
        return [q, k, v]

    a.project = project


def no_temperature(a: Any) -> None:
    a.temperature = None


def one_rotation(a: Any) -> None:
    a.local_rope = a.rope


def other_neighbours(a: Any) -> None:
    a.net = replace(a.net, interleaved=not a.net.interleaved)


def no_memory(a: Any) -> None:
    """The state of a delta net's layers is forgotten before the last tokens."""
    whole = type(a.net).__call__

    class Forgetful(DeltaNet):
        def __call__(self, mixed: Any, decay: Any, step: Any, kernel: Any, state: Any) -> Any:
            state = whole(self, mixed[:, :-3], decay[:, :-3], step[:, :-3], kernel, state)
            out, memory = state
            memory = memory._replace(memory=torch.zeros_like(memory.memory))
            end, memory = whole(self, mixed[:, -3:], decay[:, -3:], step[:, -3:], kernel, memory)
            return torch.cat((out, end), 1), memory

    a.net = Forgetful(**vars(a.net))


def no_keys_are_shared(a: Any) -> None:
    """Layers without keys of their own read those of the first layers of their kind."""
    first = {windowed: a.local.index(windowed) for windowed in (True, False)}
    a.kv_source = lambda layer: layer if layer < a.with_keys else first[a.local[layer]]


def v_not_normed(a: Any) -> None:
    plain = a.attention_inputs

    def inputs(layer: int, x: Any, positions: Any, weights: Any, products: Any) -> Any:
        found = plain(layer, x, positions, weights, products)
        h = rms_norm(x, weights["attn_norm"], a.eps)
        v = products(h, weights.get("attn_v", weights["attn_k"]))
        return found._replace(v=v.reshape(found.v.shape))

    a.attention_inputs = inputs


def scale_by_size(a: Any) -> None:
    plain = a.attention_settings
    a.attention_settings = lambda layer: replace(plain(layer), scale=a.k_sizes[layer] ** -0.5)


def no_inputs_a_layer(a: Any) -> None:
    a.own_inputs = lambda *_: None


def all_keys(a: Any) -> None:
    a.chosen_keys = lambda *_: None


def one_key_fewer(a: Any) -> None:
    a.chosen -= 1


def newest_keys(a: Any) -> None:
    """A window in the place of the choice."""

    def newest(layer: int, indexer: Any, kv_len: torch.Tensor) -> torch.Tensor:
        keys = kv_len[..., None] - 1 - torch.arange(a.chosen, dtype=torch.int32)
        return keys.clamp(min=-1)

    a.chosen_keys = newest


def index_turns_otherwise(a: Any) -> None:
    other = {"norm": "neox", "neox": "norm"}
    a.rotates_index = replace(a.rotates_index, kind=other[a.rotates_index.kind])


def heads_of_the_indexer_weigh_alike(a: Any) -> None:
    plain = a.indexer_inputs

    def alike(*arguments: Any) -> Any:
        found = plain(*arguments)
        return found._replace(weights=torch.ones_like(found.weights))

    a.indexer_inputs = alike


WRONG: dict[str, list[Callable[[Any], None]]] = {
    "gpt-oss": [
        no_sinks,
        window_off_by_one,
        window_off_by_one_below,
        other_kind_of_layer,
        plain_swiglu,
        softmax_over_all,
    ],
    "gpt-oss-clamped": [not_clamped],
    "gpt-oss-layers-by-name": [one_rotation],
    "gemma2-tight-softcaps": [no_softcap, no_final_softcap, window_off_by_one, other_kind_of_layer],
    "minimax-m2": [norm_a_head],
    "step35": [no_gate, window_off_by_one, one_rotation],
    "step35-clamped": [plain_swiglu],
    "qwen35": [no_gate, no_memory],
    "qwen35moe": [no_gate, shared_not_gated, other_neighbours],
    "qwen3next": [no_gate, shared_not_gated, other_neighbours],
    "gemma4-v-from-k": [v_not_normed, scale_by_size, window_off_by_one, no_final_softcap],
    "gemma4-shared-keys": [no_keys_are_shared],
    "gemma4-inputs-a-layer": [no_inputs_a_layer],
    "mistral3-temperature": [no_temperature],
    "mistral4-groups": [all_groups],
    "deepseek32-chosen": [
        all_keys,
        one_key_fewer,
        newest_keys,
        index_turns_otherwise,
        heads_of_the_indexer_weigh_alike,
    ],
    "glm-dsa-chosen": [index_turns_otherwise],
}


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        pytest.param(name, spoil, id=f"{name}-{spoil.__name__}")
        for name, all_ in WRONG.items()
        for spoil in all_
    ],
)
def test_wrong_variants_are_seen(
    file_named: Callable[[str], Path],
    stored: dict[str, np.ndarray],
    name: str,
    spoil: Callable[[Any], None],
) -> None:
    architecture = architecture_of(GGUFFile.open(file_named(name)))
    spoil(architecture)
    assert relative(logits_from(architecture)[LAST], stored[name]) > 3 * AGREES


def test_weights_that_are_there_twice(file_named: Callable[[str], Path], tmp_path: Path) -> None:
    """What ik_llama.cpp's converter writes; mainline's engine does not load it."""
    twice = three_tensors().write(tmp_path / "twice.gguf")
    assert relative(logits(twice), logits(file_named("deepseek2"))) < 1e-6


def test_every_architecture_has_been_compared() -> None:
    assert {file.architecture for file in TINY.values()} == set(ARCHITECTURES)


def _store(*names: str) -> None:
    """Write what the engine gives for every file, or for those alone."""
    import tempfile

    engine, found = ModelEngine(), {}
    if names:
        with np.load(STORED) as before:
            found = dict(before)
    with tempfile.TemporaryDirectory() as folder:
        for name, file in TINY.items():
            if names and name not in names:
                continue
            found[name] = engine.logits(file.write(Path(folder) / "tiny.gguf"), TOKENS)[LAST]
    engine.close()
    np.savez_compressed(STORED, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    _store(*sys.argv[1:])
