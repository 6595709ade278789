"""Tiny GGUF files of random weights, by the published conventions of each architecture.

Nothing of the product is used here, and nothing but numpy's generator makes a weight: a file has the same
weights everywhere, so that logits which an engine gave for it once can be stored (`engine_logits.npz`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, INNER, VOCABULARY, CONTEXT = 64, 48, 64, 128
TOKENS = np.random.default_rng(22).integers(0, VOCABULARY, 40).astype(np.int32)

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TinyFile:
    """A file to be written. keys: without the architecture; values: of tensors that are not random."""

    architecture: str
    keys: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, np.ndarray] = field(default_factory=dict)

    def with_(
        self,
        keys: Mapping[str, Any] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        drop: tuple[str, ...] = (),
        values: Mapping[str, np.ndarray] | None = None,
    ) -> TinyFile:
        """The same with other keys and tensors; drop: keys and tensors that are left out."""
        return TinyFile(
            self.architecture,
            {k: v for k, v in (dict(self.keys) | dict(keys or {})).items() if k not in drop},
            {k: v for k, v in (dict(self.shapes) | dict(shapes or {})).items() if k not in drop},
            dict(self.values) | dict(values or {}),
        )

    def write(self, path: Path, *, letters: bool = False) -> Path:
        """With a vocabulary of t0, t1, ..., which engines want; or of letters, which reads texts."""
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.keys.items():
            add_value(writer, f"{self.architecture}.{key}", value)
        if letters:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            # A space and a line end as byte-level vocabularies write them.
            writer.add_token_list(
                [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,;:!?01", "Ġ", "Ċ", "th", "he"]
            )
            writer.add_token_merges(["t h", "h e"])
        else:
            writer.add_tokenizer_model("llama")
            writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
            writer.add_token_scores([0.0] * VOCABULARY)
        writer.add_token_types([1] * VOCABULARY)
        for name, value in self.tensors().items():
            writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: random_values(name, shape) for name, shape in self.shapes.items()} | dict(self.values)


def random_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights large enough that every part of a layer changes the logits; by the name alone."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    last = name.rsplit(".", 2)[-2] if name.count(".") > 1 else name.split(".")[0]
    if name.endswith(("ssm_a", "ssm_a.weight")):
        return -np.exp(0.5 * noise)
    if name.endswith(".scale"):
        return 1 + 0.3 * noise
    if "norm" in last and name.endswith(".weight"):
        return 1 + 0.3 * noise
    if name.endswith(".bias"):
        return 0.3 * noise
    if len(shape) == 1 or "token_embd" in name:
        return noise
    return (1.5 if "attn" in last else 1.0) * noise / shape[-1] ** 0.5


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A metadata value by its Python type."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def base_keys(layers: int, heads: int | list[int], kv_heads: int | list[int], size: int) -> dict[str, Any]:
    return {
        "block_count": layers,
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }


def outside(*, tied: bool = False) -> Shapes:
    found: Shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
    return found if tied else found | {"output.weight": (VOCABULARY, WIDTH)}


def attention(layer: int, heads: int, kv_heads: int, size: int, *, fused: bool = False) -> Shapes:
    rows = {"attn_q": heads * size, "attn_k": kv_heads * size, "attn_v": kv_heads * size}
    if fused:
        rows = {"attn_qkv": sum(rows.values())}
    found: Shapes = {f"blk.{layer}.{name}.weight": (n, WIDTH) for name, n in rows.items()}
    found[f"blk.{layer}.attn_output.weight"] = (WIDTH, heads * size)
    return found | norms(layer, "attn_norm")


def norms(layer: int, *names: str, size: int = WIDTH) -> Shapes:
    return {f"blk.{layer}.{name}.weight": (size,) for name in names}


def biases(layer: int, **sizes: int) -> Shapes:
    return {f"blk.{layer}.{name}.bias": (n,) for name, n in sizes.items()}


def dense(layer: int, inner: int = INNER, *, norm: str = "ffn_norm") -> Shapes:
    return {
        f"blk.{layer}.ffn_gate.weight": (inner, WIDTH),
        f"blk.{layer}.ffn_up.weight": (inner, WIDTH),
        f"blk.{layer}.ffn_down.weight": (WIDTH, inner),
    } | norms(layer, norm)


def experts(
    layer: int,
    count: int,
    inner: int,
    *,
    shared: int = 0,
    chooses: bool = False,
    fused: bool = False,
    biased: bool = False,
    norm: str = "ffn_norm",
) -> Shapes:
    p = f"blk.{layer}."
    found: Shapes = {
        p + "ffn_gate_inp.weight": (count, WIDTH),
        p + "ffn_down_exps.weight": (count, WIDTH, inner),
    }
    if fused:
        found[p + "ffn_gate_up_exps.weight"] = (count, 2 * inner, WIDTH)
    else:
        found[p + "ffn_gate_exps.weight"] = found[p + "ffn_up_exps.weight"] = (count, inner, WIDTH)
    if chooses:
        found[p + "exp_probs_b.bias"] = (count,)
    if biased:
        found |= {
            p + "ffn_gate_inp.bias": (count,),
            p + "ffn_gate_exps.bias": (count, inner),
            p + "ffn_up_exps.bias": (count, inner),
            p + "ffn_down_exps.bias": (count, WIDTH),
        }
    if shared:
        found[p + "ffn_gate_shexp.weight"] = found[p + "ffn_up_shexp.weight"] = (shared, WIDTH)
        found[p + "ffn_down_shexp.weight"] = (WIDTH, shared)
    return found | norms(layer, norm)
