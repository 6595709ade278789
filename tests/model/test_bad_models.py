"""Models that contradict themselves are refused by name: the key or the tensor, and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.gguf_bytes import STRING, file_bytes, key, text
from support.plain_arms import ExactArm, logits_of, relative
from support.rewrite import rewrite
from support.twins import EXPERTS, HEADS, INNER, KV_HEADS, SIZE, VOCABULARY, WIDTH
from verify.model.architectures import architecture_of
from verify.model.errors import ModelError
from verify.model.gguf.dequantize import dequantize
from verify.model.gguf.file import GGUFFile
from verify.model.runner import Runner
from verify.model.stream import TensorStream

TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, (1, 16)).astype(np.int32)


FileOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def file_of(twin: Callable[[str], Any]) -> FileOf:
    return lambda name: twin(name).path


def logits(path: Path) -> torch.Tensor:
    runner = Runner(architecture_of(GGUFFile.open(path)), device=torch.device("cpu"), attention_type="f32")
    return logits_of(runner, TOKENS, [ExactArm()], range(16))["exact"]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"architecture": "mamba"}, "general.architecture is 'mamba', expected one of: llama, qwen2"),
    ("qwen3", {"drop": ["blk.1.attn_k_norm.weight"]}, "tensor blk.1.attn_k_norm.weight is missing"),
    ("glm4moe", {"drop": ["blk.1.attn_k_norm.weight"]}, "tensor blk.1.attn_k_norm.weight is missing"),
    ("glm4moe", {"drop": ["blk.1.ffn_up_exps.weight"]}, "tensor blk.1.ffn_up_exps.weight is missing"),
    ("glm4moe", {"drop": ["blk.1.ffn_up_shexp.weight"]}, "tensor blk.1.ffn_up_shexp.weight is missing"),
    ("gemma3", {"drop": ["blk.6.post_ffw_norm.weight"]}, "tensor blk.6.post_ffw_norm.weight is missing"),
    ("deepseek2", {"drop": ["blk.0.attn_k_b.weight"]}, "tensor blk.0.attn_k_b.weight is missing"),
    ("deepseek2", {"drop": ["attention.kv_lora_rank"]}, "deepseek2.attention.kv_lora_rank is missing"),
    (
        "llama",
        {"keys": {"attention.temperature_scale": 0.1}},
        "metadata key llama.attention.temperature_scale is not known in 'llama' files",
    ),
    ("llama", {"keys": {"attention.causal": False}}, "llama.attention.causal is not known"),
    ("qwen2", {"keys": {"attention.sliding_window": 4}}, "qwen2.attention.sliding_window is not known"),
    (
        "glm4",
        {"keys": {"rope.dimension_sections": [1, 1, 0, 2]}},
        "expected the first three to turn all 4 pairs",
    ),
    ("llama", {"keys": {"attention.head_count_kv": 3}}, "layer 0: 4 query heads are not a multiple of 3"),
    (
        "llama",
        {"keys": {"attention.head_count_kv": 4}},
        "attn_k.weight has shape [32, 64], expected [64, 64]",
    ),
    (
        "llama",
        {"keys": {"attention.head_count": [4, 4, 4]}},
        "has 3 values, expected one for each of 2 blocks",
    ),
    ("llama", {"keys": {"attention.head_count_kv": [2]}}, "has 1 values, expected one for each of 2 blocks"),
    ("llama", {"keys": {"feed_forward_length": [96] * 4}}, "llama.feed_forward_length has 4 values"),
    ("llama", {"keys": {"attention.head_count": [4, 0]}}, "expected a whole number from 1, got 0"),
    ("llama", {"keys": {"feed_forward_length": [96, 64]}}, "blk.1.ffn_gate.weight has shape [96, 64]"),
    (
        "llama",
        {"keys": {"attention.head_count": 3, "attention.head_count_kv": 1}, "drop": ["attention.key_length"]},
        "embedding_length 64 is not a multiple of 3 heads, and llama.attention.key_length is missing",
    ),
    (
        "llama",
        {"keys": {"rope.dimension_count": 7}},
        "expected an even number up to the head size of 16, got 7",
    ),
    ("llama", {"keys": {"rope.dimension_count": 18}}, "expected an even number up to the head size of 16"),
    (
        "qwen2",
        {"keys": {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}},
        "qwen2.rope.scaling.type is 'longrope', expected none, linear or yarn",
    ),
    ("glm4moe", {"keys": {"nextn_predict_layers": 2}}, "expected less than block_count, 2"),
    ("glm4moe", {"keys": {"expert_used_count": 9}}, "is 9, expected at most the 8 experts"),
    ("glm4moe", {"keys": {"expert_gating_func": 4}}, "is 4, expected 1 (softmax), 2 (sigmoid), 3"),
    ("glm4moe", {"keys": {"expert_weights_norm": 3}}, "expected true or false, got 3"),
    ("deepseek2", {"keys": {"expert_group_count": 3}}, "expected a divisor of the 8 experts"),
    (
        "deepseek2",
        {"keys": {"expert_group_count": 4, "expert_group_used_count": 1}},
        "expert_group_used_count is 1, expected at most 4, and enough for 3 experts",
    ),
    (
        "glm4moe",
        {"keys": {"expert_count": 4}},
        "blk.1.ffn_gate_inp.weight has shape [8, 64], expected [4, 64]",
    ),
    ("deepseek2", {"keys": {"attention.key_length": 40}}, "attention.key_length is 40, expected 48"),
    ("deepseek2", {"keys": {"attention.key_length_mla": 16}}, "expected more than the 16 rotated dimensions"),
    (
        "llama",
        {"tensors": {"blk.0.attn_sinks.weight": np.ones(HEADS)}},
        "tensor blk.0.attn_sinks.weight is not known in 'llama' files",
    ),
    (
        "llama",
        {"tensors": {"rope_freqs.weight": np.ones(5)}},
        "rope_freqs.weight has shape [5], expected [8]",
    ),
    ("llama", {"keys": {"block_count": 2**32 - 1}}, "expected no more than there are tensors"),
    ("llama", {"keys": {"rope.freq_base": float("inf")}}, "rope.freq_base: expected a number, got inf"),
    ("llama", {"keys": {"feed_forward_length": float("nan")}}, "expected a number, got nan"),
    ("llama", {"keys": {"attention.head_count": [4.0, float("inf")]}}, "whole number from 1, got inf"),
    ("llama", {"keys": {"expert_count": [1, 2]}}, "llama.expert_count: expected a number"),
    ("glm4moe", {"keys": {"expert_weights_norm": [1, 2]}}, "expected true or false, got"),
    ("glm4moe", {"keys": {"expert_gating_func": [1, 2]}}, "expert_gating_func: expected a number"),
    ("qwen2", {"keys": {"rope.scaling.type": [1, 2]}}, "rope.scaling.type: expected a text"),
    (
        "qwen2",
        {"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": -2.0}},
        "rope.scaling.factor: expected a number above 0, got -2",
    ),
    ("llama", {"tensors": {"token_embd.weight": np.ones(VOCABULARY)}}, "expected a matrix"),
]


@pytest.mark.parametrize(("name", "change", "said"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_contradictions_are_refused_by_name(
    file_of: FileOf, tmp_path: Path, name: str, change: dict[str, Any], said: str
) -> None:
    path = rewrite(file_of(name), tmp_path / "odd.gguf", **change)
    with pytest.raises(ModelError) as caught:
        architecture_of(GGUFFile.open(path))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("kind", "said"), [("imatrix", "an importance matrix"), ("mmproj", "sees or hears")])
def test_files_that_are_no_models_are_called_by_their_name(tmp_path: Path, kind: str, said: str) -> None:
    path = tmp_path / "no-model.gguf"
    path.write_bytes(file_bytes([key("general.type", STRING, text(kind))]))
    with pytest.raises(ModelError, match=f"general.type is '{kind}'.*{said}.*expected a model"):
        architecture_of(GGUFFile.open(path))


def test_layers_may_differ_in_heads_and_inner_size(file_of: FileOf, tmp_path: Path) -> None:
    """A second layer with half of the heads and a smaller feed-forward equals one where the rest is zero."""
    source = file_of("llama")
    file = GGUFFile.open(source)
    part = {
        name: dequantize(file, f"blk.1.{name}.weight").numpy()
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    q_rows, kv_rows, inner = HEADS // 2 * SIZE, KV_HEADS // 2 * SIZE, INNER - 32
    zeroed = {name: part[name].copy() for name in ("attn_output", "ffn_down")}
    zeroed["attn_output"][:, q_rows:] = 0
    zeroed["ffn_down"][:, inner:] = 0
    whole = rewrite(
        source, tmp_path / "whole.gguf", tensors={f"blk.1.{n}.weight": v for n, v in zeroed.items()}
    )
    smaller = {
        "attn_q": part["attn_q"][:q_rows],
        "attn_k": part["attn_k"][:kv_rows],
        "attn_v": part["attn_v"][:kv_rows],
        "attn_output": part["attn_output"][:, :q_rows],
        "ffn_gate": part["ffn_gate"][:inner],
        "ffn_up": part["ffn_up"][:inner],
        "ffn_down": part["ffn_down"][:, :inner],
    }
    keys = {
        "attention.head_count": [HEADS, HEADS // 2],
        "attention.head_count_kv": [KV_HEADS, KV_HEADS // 2],
        "feed_forward_length": [INNER, inner],
    }
    cut = rewrite(
        source, tmp_path / "cut.gguf", keys=keys, tensors={f"blk.1.{n}.weight": v for n, v in smaller.items()}
    )
    assert relative(logits(cut), logits(whole)) < 1e-5
    assert relative(logits(cut), logits(source)) > 1e-3


def test_layers_that_predict_further_tokens_do_not_run(file_of: FileOf, tmp_path: Path) -> None:
    source = file_of("glm4moe")
    more = {
        "blk.2.nextn.eh_proj.weight": np.ones((WIDTH, 2 * WIDTH)),
        "blk.2.attn_norm.weight": np.ones(WIDTH),
    }
    keys = {"block_count": 3, "nextn_predict_layers": 1}
    path = rewrite(source, tmp_path / "nextn.gguf", keys=keys, tensors=more)
    assert architecture_of(GGUFFile.open(path)).sizes.layers == 2
    assert torch.equal(logits(path), logits(source))


def test_frequencies_of_a_file_divide_the_angles(file_of: FileOf, tmp_path: Path) -> None:
    """Divisors that are all 8 are linear scaling by 8."""
    source = file_of("llama")
    divided = rewrite(
        source, tmp_path / "divided.gguf", tensors={"rope_freqs.weight": np.full(SIZE // 2, 8.0)}
    )
    scaled = rewrite(
        source, tmp_path / "scaled.gguf", keys={"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    )
    assert relative(logits(divided), logits(scaled)) < 1e-6
    assert relative(logits(divided), logits(source)) > 1e-3


def test_a_missing_gating_function_is_softmax_but_in_flash(file_of: FileOf, tmp_path: Path) -> None:
    source = file_of("deepseek2")
    path = rewrite(source, tmp_path / "none.gguf", drop=["expert_gating_func"])
    assert relative(logits(path), logits(source)) > 1e-3
    softmax = rewrite(source, tmp_path / "softmax.gguf", keys={"expert_gating_func": 1})
    assert torch.equal(logits(path), logits(softmax))


def test_only_chosen_experts_are_read(file_of: FileOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert at a time, and each of them once for all windows and arms."""
    read: list[tuple[str, int]] = []
    plain = TensorStream.take

    def watched(self: TensorStream, name: str, rows: slice | None = None) -> torch.Tensor:
        if "_exps" in name:
            assert rows is not None
            assert rows.stop - rows.start == 1
            read.append((name, rows.start))
        return plain(self, name, rows)

    monkeypatch.setattr(TensorStream, "take", watched)
    architecture = architecture_of(GGUFFile.open(file_of("glm4moe")))
    runner = Runner(architecture, device=torch.device("cpu"))
    logits_of(runner, np.repeat(TOKENS, 2, 0), [ExactArm("a"), ExactArm("b")], range(16))
    assert len(read) == len(set(read)) <= 3 * EXPERTS
    assert read
