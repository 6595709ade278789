"""A GGUF file of any size with experts: random valid blocks of several types, a byte-level vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from support.tiny_model import byte_symbols

Kind = gguf.GGMLQuantizationType
# Blocks that are drawn for a tensor; longer tensors repeat them.
_POOL = 20_011


@dataclass(frozen=True)
class MoeSizes:
    """dense: layers without experts, at the front; ratio 12 by default, as GLM-4.5 has it.

    architecture: glm4moe, qwen3moe or gpt-oss; the latter two have experts in every layer.
    """

    layers: int = 3
    dense: int = 1
    width: int = 256
    heads: int = 24
    kv_heads: int = 2
    head_size: int = 32
    inner: int = 256
    experts: int = 8
    used: int = 3
    expert_inner: int = 256
    architecture: str = "glm4moe"

    @property
    def expert_weights(self) -> int:
        return 3 * self.width * self.expert_inner


def write_moe(path: Path, sizes: MoeSizes = MoeSizes(), *, seed: int = 0) -> Path:
    """Attention is Q8_0, gates and up Q4_K, down Q6_K, shared experts Q4_0; norms, router and biases F32.

    Where blocks of 256 do not fit in a row, down is Q8_0, as quantisers have it.
    """
    s, name = sizes, sizes.architecture
    writer = gguf.GGUFWriter(path, name)
    glm, oss = name == "glm4moe", name == "gpt-oss"
    assert glm or not s.dense
    numbers = {
        "block_count": s.layers, "embedding_length": s.width, "feed_forward_length": s.inner,
        "context_length": 512, "attention.head_count": s.heads, "attention.head_count_kv": s.kv_heads,
        "attention.key_length": s.head_size, "attention.value_length": s.head_size,
        "rope.dimension_count": s.head_size // (2 if glm else 1), "expert_count": s.experts,
        "expert_used_count": s.used, "expert_feed_forward_length": s.expert_inner,
    }  # fmt: skip
    if glm:
        numbers |= {"expert_shared_count": 1, "leading_dense_block_count": s.dense, "expert_gating_func": 2}
        writer.add_float32(f"{name}.expert_weights_scale", 1.0)
        writer.add_bool(f"{name}.expert_weights_norm", True)
    if oss:
        numbers["attention.sliding_window"] = 16
    for key, value in numbers.items():
        writer.add_uint32(f"{name}.{key}", value)
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", 1e-5)
    tokens = [*byte_symbols(), "<|end|>", "th", "the"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 1, 1])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(256)
    writer.add_add_bos_token(False)

    tensors: list[tuple[str, tuple[int, ...], Kind]] = []

    def add(name: str, kind: Kind, *shape: int) -> None:
        kind = Kind.Q8_0 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind
        tensors.append((name, shape, kind))

    add("token_embd.weight", Kind.F32, len(tokens), s.width)
    add("output.weight", Kind.Q6_K, len(tokens), s.width)
    add("output_norm.weight", Kind.F32, s.width)
    q_rows, kv_rows = s.heads * s.head_size, s.kv_heads * s.head_size
    for layer in range(s.layers):
        at = f"blk.{layer}."
        add(at + "attn_norm.weight", Kind.F32, s.width)
        norm = "ffn_norm" if name == "qwen3moe" else "post_attention_norm"
        add(f"{at}{norm}.weight", Kind.F32, s.width)
        if name == "qwen3moe":
            add(at + "attn_q_norm.weight", Kind.F32, s.head_size)
            add(at + "attn_k_norm.weight", Kind.F32, s.head_size)
        if oss:
            add(at + "attn_sinks.weight", Kind.F32, s.heads)
            for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows), ("output", s.width)):
                add(f"{at}attn_{part}.bias", Kind.F32, rows)
            add(at + "ffn_gate_inp.bias", Kind.F32, s.experts)
            for part, rows in (("gate", s.expert_inner), ("up", s.expert_inner), ("down", s.width)):
                add(f"{at}ffn_{part}_exps.bias", Kind.F32, s.experts, rows)
        add(at + "attn_q.weight", Kind.Q8_0, q_rows, s.width)
        add(at + "attn_k.weight", Kind.Q8_0, kv_rows, s.width)
        add(at + "attn_v.weight", Kind.Q8_0, kv_rows, s.width)
        add(at + "attn_output.weight", Kind.Q8_0, s.width, q_rows)
        if layer < s.dense:
            for part in ("ffn_gate", "ffn_up"):
                add(f"{at}{part}.weight", Kind.Q4_K, s.inner, s.width)
            add(at + "ffn_down.weight", Kind.Q6_K, s.width, s.inner)
            continue
        add(at + "ffn_gate_inp.weight", Kind.F32, s.experts, s.width)
        for part in ("ffn_gate_exps", "ffn_up_exps"):
            add(f"{at}{part}.weight", Kind.MXFP4 if oss else Kind.Q4_K, s.experts, s.expert_inner, s.width)
        down = Kind.MXFP4 if oss else Kind.Q6_K
        add(at + "ffn_down_exps.weight", down, s.experts, s.width, s.expert_inner)
        if not glm:
            continue
        add(at + "exp_probs_b.bias", Kind.F32, s.experts)
        for part in ("ffn_gate_shexp", "ffn_up_shexp"):
            add(f"{at}{part}.weight", Kind.Q4_0, s.expert_inner, s.width)
        add(at + "ffn_down_shexp.weight", Kind.Q4_0, s.width, s.expert_inner)

    for name, shape, kind in tensors:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _bytes(shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for name, shape, kind in tensors:
        writer.write_tensor_data(_stored(rng, name, shape, kind))
    writer.close()
    return path


def _bytes(shape: tuple[int, ...], kind: Kind) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def _stored(rng: np.random.Generator, name: str, shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """The tensor's bytes: weights of about 1 / sqrt(inputs), norms of one."""
    spread = 1 / shape[-1] ** 0.5
    if kind == Kind.F32:
        if "norm" in name:
            return np.ones(shape, np.float32)
        if name.endswith(".bias"):
            return (0.01 * rng.standard_normal(shape)).astype(np.float32)
        return (spread * rng.standard_normal(shape) * (4 if "embd" in name else 1)).astype(np.float32)
    count = _bytes(shape, kind) // gguf.GGML_QUANT_SIZES[kind][1]
    pool = _BLOCKS[kind](rng, min(count, _POOL), spread)
    return np.resize(pool, (count, pool.shape[1])).reshape(-1)


def _halves(value: float, count: int) -> np.ndarray:
    return np.full((count, 1), value, np.float16).view(np.uint8)


def _random(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (count, width), dtype=np.uint8)


def _q8_0(rng: np.random.Generator, count: int, spread: float) -> np.ndarray:
    return np.hstack([_halves(spread / 74, count), _random(rng, count, 32)])


def _q4_0(rng: np.random.Generator, count: int, spread: float) -> np.ndarray:
    return np.hstack([_halves(spread / 4.6, count), _random(rng, count, 16)])


def _q4_k(rng: np.random.Generator, count: int, spread: float) -> np.ndarray:
    """d, dmin, 12 bytes of packed 6-bit scales and minima, 128 of 4-bit numbers."""
    d = spread / 250
    return np.hstack([_halves(d, count), _halves(7.5 * d, count), _random(rng, count, 12 + 128)])


def _q6_k(rng: np.random.Generator, count: int, spread: float) -> np.ndarray:
    """128 + 64 bytes of 6-bit numbers, 16 scales int8, d."""
    scales = rng.integers(8, 24, (count, 16), dtype=np.uint8)
    return np.hstack([_random(rng, count, 192), scales, _halves(spread / (18.5 * 16), count)])


def _mxfp4(rng: np.random.Generator, count: int, spread: float) -> np.ndarray:
    """A power of two, and 16 bytes of 4-bit numbers up to 6."""
    exponent = np.full((count, 1), 127 + round(np.log2(spread / 2.9)), np.uint8)
    return np.hstack([exponent, _random(rng, count, 16)])


_BLOCKS: dict[Kind, Callable[[np.random.Generator, int, float], np.ndarray]] = {
    Kind.Q8_0: _q8_0,
    Kind.Q4_0: _q4_0,
    Kind.Q4_K: _q4_k,
    Kind.Q6_K: _q6_k,
    Kind.MXFP4: _mxfp4,
}
