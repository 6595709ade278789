"""The runner against a forward pass written out here, token by token, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from support.plain_arms import ExactArm, logits_of, relative
from support.tiny_model import HEADS, KV_HEADS, LAYERS, SIZE, write_tiny_model
from support.twins import VOCABULARY
from verify.kernels.call import checked_call
from verify.kernels.exact import exact_attention
from verify.model import runner as runner_module
from verify.model.architectures import architecture_of
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile
from verify.model.group import slabs_of
from verify.model.layer_call import LayerCall
from verify.model.products import Products, Tiling, tile_rows, tiling_of
from verify.model.runner import COMPUTE_TYPES, Runner
from verify.model.stopwatch import Stopwatch


def forward(path: Path, tokens: np.ndarray, *, neighbours: bool = True) -> np.ndarray:
    """Logits [T, vocabulary] by the formulas, a token and head at a time, sharing no code."""
    reader = gguf.GGUFReader(path)
    w = {t.name: t.data.astype(np.float64) for t in reader.tensors}

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 1e-5) * weight

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        out = x.copy()
        for i in range(SIZE // 2):
            angle = position * 10000.0 ** (-2 * i / SIZE)
            a, b = (2 * i, 2 * i + 1) if neighbours else (i, i + SIZE // 2)
            out[a] = x[a] * np.cos(angle) - x[b] * np.sin(angle)
            out[b] = x[a] * np.sin(angle) + x[b] * np.cos(angle)
        return out

    states = [w["token_embd.weight"][t] for t in tokens]
    for layer in range(LAYERS):
        part = {k.split(".")[2]: v for k, v in w.items() if k.startswith(f"blk.{layer}.")}
        keys, values, after = [], [], []
        for position, x in enumerate(states):
            h = norm(x, part["attn_norm"])
            q = (part["attn_q"] @ h).reshape(HEADS, SIZE)
            k = (part["attn_k"] @ h).reshape(KV_HEADS, SIZE)
            q = np.array([rotate(row, position) for row in q])
            keys.append(np.array([rotate(row, position) for row in k]))
            values.append((part["attn_v"] @ h).reshape(KV_HEADS, SIZE))
            out = []
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                s = np.array([q[head] @ key[kv] / np.sqrt(SIZE) for key in keys])
                p = np.exp(s - s.max())
                out.append(sum(a * value[kv] for a, value in zip(p / p.sum(), values, strict=True)))
            x = x + part["attn_output"] @ np.concatenate(out)
            h = norm(x, part["ffn_norm"])
            gate = part["ffn_gate"] @ h
            after.append(x + part["ffn_down"] @ (gate / (1 + np.exp(-gate)) * (part["ffn_up"] @ h)))
        states = after
    return np.array([w["token_embd.weight"] @ norm(x, w["output_norm.weight"]) for x in states])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


TOKENS = np.random.default_rng(3).integers(0, 256, (3, 40)).astype(np.int32)
CPU = torch.device("cpu")


def test_logits_are_those_of_the_formulas(tiny: Path) -> None:
    runner = Runner(architecture_of(GGUFFile.open(tiny)), device=CPU, attention_type="f32")
    found = logits_of(runner, TOKENS, [ExactArm()], range(40))["exact"]
    for w in range(3):
        assert relative(found[w].numpy(), forward(tiny, TOKENS[w])) < 1e-5


class Float64Arm(ExactArm):
    """Attention in float64 that stays so."""

    def attend(self, call: LayerCall) -> torch.Tensor | None:
        checked = checked_call(call.q, call.k, call.v, kv_len=call.kv_len, scale=call.settings.scale)
        return exact_attention(checked).out


def test_in_float64_only_the_inputs_of_attention_are_rounded(tiny: Path) -> None:
    """q, k and v are rounded to float32, the widest type of a cache: nothing else is."""
    architecture = architecture_of(GGUFFile.open(tiny))
    far = {}
    for compute in ("f32", "f64"):
        runner = Runner(architecture, device=CPU, attention_type="f32", compute=compute)
        found = logits_of(runner, TOKENS[:1], [Float64Arm()], range(40))["exact"]
        assert found.dtype == COMPUTE_TYPES[compute]
        far[compute] = relative(found[0].numpy(), forward(tiny, TOKENS[0]))
    assert far["f64"] < far["f32"] / 1.5
    assert far["f64"] < 1e-6


def test_a_flipped_rotation_would_be_seen(tiny: Path) -> None:
    runner = Runner(architecture_of(GGUFFile.open(tiny)), device=CPU, attention_type="f32")
    found = logits_of(runner, TOKENS[:1], [ExactArm()], range(40))["exact"]
    assert relative(found[0].numpy(), forward(tiny, TOKENS[0], neighbours=False)) > 1e-3


def test_float16_inputs_differ_by_their_rounding_and_no_more(tiny: Path) -> None:
    architecture = architecture_of(GGUFFile.open(tiny))
    f32, f16 = (
        logits_of(Runner(architecture, device=CPU, attention_type=t), TOKENS[:1], [ExactArm()], range(40))[
            "exact"
        ]
        for t in ("f32", "f16")
    )
    assert 0 < relative(f16.numpy(), f32.numpy()) < 5e-3


def test_neither_group_nor_other_arms_change_a_bit(tiny: Path) -> None:
    architecture = architecture_of(GGUFFile.open(tiny))
    scored = range(20, 39)
    together = logits_of(Runner(architecture, device=CPU), TOKENS, [ExactArm("a"), ExactArm("b")], scored)
    assert torch.equal(together["a"], together["b"])
    for w in range(3):
        alone = logits_of(Runner(architecture, device=CPU), TOKENS[w : w + 1], [ExactArm("a")], scored)
        assert torch.equal(alone["a"][0], together["a"][w])


@pytest.mark.parametrize("name", ["llama", "glm4moe", "deepseek2"])
def test_windows_side_by_side_give_the_bits_of_windows_alone(name: str, twin: Callable[[str], Any]) -> None:
    """As a GPU computes them: a tile of the products holds several windows, the last tile padded."""
    architecture = architecture_of(GGUFFile.open(twin(name).path))
    tokens = np.random.default_rng(4).integers(0, VOCABULARY, (5, 16)).astype(np.int32)
    scored = range(8, 15)

    def found(tiling: Tiling) -> torch.Tensor:
        runner = Runner(architecture, device=CPU)
        return logits_of(runner, tokens, [ExactArm(), ExactArm("b")], scored, tiling=tiling)["b"]

    together, alone = found(Tiling(48, 3)), found(Tiling(48, 1))
    assert relative(together, alone) < 1e-5
    if name != "glm4moe":  # its experts' tiles hold the rows of a whole slab
        assert torch.equal(together, alone)


def test_groups_cut_where_the_run_does() -> None:
    """Windows 5 to 11 by fours: 5 to 7, 8 to 11."""
    assert slabs_of(5, 7, 4) == [range(3), range(3, 7)]
    assert slabs_of(0, 9, 4) == [range(4), range(4, 8), range(8, 9)]
    assert slabs_of(6, 1, 4) == [range(1)]
    assert slabs_of(3, 0, 4) == []


class Counted(ExactArm):
    """Exact attention that says how often it was asked for."""

    def __init__(self, name: str, *, off: float = 0.0, off_at: int = -1) -> None:
        super().__init__(name)
        self.off, self.off_at = off, off_at
        self.inputs: list[int] = []

    def attend(self, call: LayerCall) -> torch.Tensor | None:
        self.inputs.append(call.q.data_ptr())
        o = super().attend(call)
        assert o is not None
        return o + self.off if call.layer == self.off_at else o


def test_arms_are_computed_once_until_their_attention_differs(tiny: Path) -> None:
    architecture, scored = architecture_of(GGUFFile.open(tiny)), range(20, 39)
    alone = logits_of(Runner(architecture, device=CPU), TOKENS, [Counted("b", off=1e-3, off_at=0)], scored)
    arms = [Counted("a"), Counted("b", off=1e-3, off_at=0), Counted("c"), Counted("d", off=-0.0, off_at=1)]
    runner = Runner(architecture, device=CPU)
    found = logits_of(runner, TOKENS, arms, scored)
    a, b, c, d = arms
    assert a.inputs == c.inputs == d.inputs
    # Layer 0 is common to all, layer by layer and window by window.
    assert [x == y for x, y in zip(a.inputs, b.inputs, strict=True)] == [True] * 3 + [False] * 3
    assert torch.equal(found["a"], found["c"])
    assert torch.equal(found["a"], found["d"])
    assert torch.equal(found["b"], alone["b"])
    once = Runner(architecture, device=CPU)
    logits_of(once, TOKENS, [Counted("a")], scored)
    assert runner.stopwatch.flop < 2 * once.stopwatch.flop


def test_an_arm_may_take_some_windows_only(tiny: Path) -> None:
    architecture, scored = architecture_of(GGUFFile.open(tiny)), range(20, 39)
    whole = logits_of(Runner(architecture, device=CPU), TOKENS, [ExactArm("a"), ExactArm("b")], scored)
    part = logits_of(
        Runner(architecture, device=CPU),
        TOKENS,
        [ExactArm("a"), ExactArm("b")],
        scored,
        first_window=7,
        takes=lambda name, window: name == "a" or window == 8,
    )
    assert len(part["b"]) == 1
    assert torch.equal(part["a"], whole["a"])
    assert torch.equal(part["b"][0], whole["b"][1])


def test_tokens_without_an_embedding_are_refused(tiny: Path) -> None:
    runner = Runner(architecture_of(GGUFFile.open(tiny)), device=CPU)
    tokens = TOKENS.copy()
    tokens[1, 3] = 10_000
    with pytest.raises(
        ModelError, match=r"token_embd\.weight has 259 rows, the text's tokens go from 0 to 10000"
    ):
        logits_of(runner, tokens, [ExactArm()], range(20, 39))


def test_a_group_goes_on_from_any_layer(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and without the embeddings."""
    architecture, scored = architecture_of(GGUFFile.open(tiny)), range(20, 39)
    arms = [ExactArm("a"), Counted("b", off=1e-3, off_at=0)]
    kept: dict[int, dict[Any, torch.Tensor]] = {}
    whole = logits_of(
        Runner(architecture, device=CPU),
        TOKENS,
        arms,
        scored,
        layer_done=lambda layers, hidden: kept.update({layers: dict(hidden)}),
    )
    assert sorted(kept) == list(range(1, LAYERS + 1))
    monkeypatch.setattr(runner_module, "first_rows", lambda *_: pytest.fail("embedded again"))
    for begin in kept.items():
        again = logits_of(Runner(architecture, device=CPU), TOKENS, arms, scored, begin=begin)
        assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_gpu_has_wider_tiles_by_the_shapes_alone() -> None:
    gpu = torch.device("cuda")
    assert tiling_of(512, 576, CPU) == Tiling(512, 1)
    assert tiling_of(512, 576, gpu) == Tiling(16384, 32)
    assert tiling_of(8192, 576, gpu) == Tiling(16384, 2)
    assert tiling_of(512, 4096, gpu) == Tiling(2048, 4)
    assert tiling_of(65536, 4096, gpu) == Tiling(2048, 1)


def test_an_arm_that_fails_leaves_the_others_alone(tiny: Path) -> None:
    architecture = architecture_of(GGUFFile.open(tiny))
    scored = range(20, 39)
    found = logits_of(
        Runner(architecture, device=CPU), TOKENS, [ExactArm("a"), ExactArm("b", fails_at=1)], scored
    )
    assert set(found) == {"a"}
    assert torch.equal(
        found["a"], logits_of(Runner(architecture, device=CPU), TOKENS, [ExactArm("a")], scored)["a"]
    )


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
def test_products_are_those_of_whole_tiles(rows: int) -> None:
    x, weight, bias = torch.randn(rows, 8), torch.randn(5, 8), torch.randn(5)
    stopwatch = Stopwatch(CPU)
    out = Products(16, stopwatch)(x, weight, bias)
    assert out.shape == (rows, 5)
    assert torch.allclose(out, x @ weight.T + bias, atol=1e-5)
    tiles = -(-rows // 16)
    assert stopwatch.flop == 2 * tiles * 16 * 8 * 5


@pytest.mark.parametrize(("n_ctx", "rows"), [(4, 16), (16, 16), (100, 112), (512, 512), (8192, 512)])
def test_tiles_follow_the_window(n_ctx: int, rows: int) -> None:
    assert tile_rows(n_ctx) == rows


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "mamba"}, "general.architecture is 'mamba', expected one of: llama"),
        ({"drop": ("output_norm.weight",)}, "tensor output_norm.weight is missing"),
        ({"drop": ("token_embd.weight",)}, "tensor token_embd.weight is missing"),
        ({"attention__head_count": 3}, "not a multiple|expected"),
        ({"feed_forward_length": 95}, "expected [95, 64]"),
        ({"block_count": 3}, "blk.2.attn_norm.weight is missing"),
        ({"expert_count": 8}, "llama.expert_used_count is missing"),
    ],
)
def test_models_that_contradict_themselves(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = write_tiny_model(tmp_path / "odd.gguf", **change)  # type: ignore[arg-type]
    with pytest.raises(ModelError) as caught:
        architecture_of(GGUFFile.open(path))
    assert any(words in str(caught.value) for words in said.split("|")), caught.value
    assert str(path) in str(caught.value)
