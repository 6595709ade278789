"""A GGUF file of a tiny llama with random weights and a byte-level vocabulary, and a text for it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

WIDTH, HEADS, KV_HEADS, SIZE, INNER, LAYERS = 64, 4, 2, 16, 96, 2


def byte_symbols() -> list[str]:
    """The 256 printable symbols that gpt2-style vocabularies write bytes as, in the order of the bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def write_tiny_model(
    path: Path,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    seed: int = 0,
    drop: tuple[str, ...] = (),
    eos: int = 256,
    restless: bool = False,
    key_spread: float = 2.0,
    **numbers_given: int,
) -> Path:
    """Write the file. `drop` leaves tensors out; `numbers_given` replaces metadata, `.` written as `__`.

    restless: an output matrix of its own and small embeddings, so that the text that it writes hangs on
    attention; otherwise a token is followed by itself.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    numbers = {
        "block_count": LAYERS,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "context_length": 128,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
    } | {key.replace("__", "."): value for key, value in numbers_given.items()}
    for key, value in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    tokens = [*byte_symbols(), "<|end|>", "th", "the"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 1, 1])
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)

    def tensor(name: str, *shape: int, spread: float = 1.0) -> None:
        if name not in drop:
            writer.add_tensor(
                name, (spread * rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
            )

    def ones(name: str) -> None:
        if name not in drop:
            writer.add_tensor(name, np.ones(WIDTH, dtype=np.float32))

    tensor("token_embd.weight", len(tokens), WIDTH, spread=0.5 if restless else 8.0)
    if restless:
        tensor("output.weight", len(tokens), WIDTH, spread=8.0)
    ones("output_norm.weight")
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            ones(f"blk.{layer}.{norm}.weight")
        tensor(f"blk.{layer}.attn_q.weight", HEADS * SIZE, WIDTH, spread=2.0)
        tensor(f"blk.{layer}.attn_k.weight", KV_HEADS * SIZE, WIDTH, spread=key_spread)
        tensor(f"blk.{layer}.attn_v.weight", KV_HEADS * SIZE, WIDTH)
        tensor(f"blk.{layer}.attn_output.weight", WIDTH, HEADS * SIZE)
        tensor(f"blk.{layer}.ffn_gate.weight", INNER, WIDTH)
        tensor(f"blk.{layer}.ffn_up.weight", INNER, WIDTH)
        tensor(f"blk.{layer}.ffn_down.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_text(path: Path, *, tokens: int = 2000) -> Path:
    """A text of at least this many tokens."""
    words = ["the", "moth", "sat", "on", "that", "7", "Löwe", "again", "and", "then"]
    rng = np.random.default_rng(1)
    text = " ".join(words[i] for i in rng.integers(0, len(words), tokens // 2))
    path.write_bytes(text.encode())
    return path
