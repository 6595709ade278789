"""Logits files written and read byte by byte, from the format's table alone."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def decode(raw: bytes) -> tuple[int, int, int, list[int], list[list[float]]]:
    """n_ctx, n_vocab, n_chunk, tokens, and the log-probabilities of every record."""
    assert raw[:8] == b"_logits_"
    n_ctx, n_vocab, n_chunk = struct.unpack_from("<3i", raw, 8)
    tokens = list(struct.unpack_from(f"<{n_ctx * n_chunk}i", raw, 20))
    at, records = 20 + 4 * n_ctx * n_chunk, []
    nv = 2 * ((n_vocab + 1) // 2) + 4
    for _ in range(n_chunk * (n_ctx - 1 - n_ctx // 2)):
        scale, low = struct.unpack_from("<2f", raw, at)
        codes = struct.unpack_from(f"<{n_vocab}H", raw, at + 8)
        records.append([scale * q + low for q in codes])
        at += 2 * nv
    assert at == len(raw)
    return n_ctx, n_vocab, n_chunk, tokens, records


def write_file(
    path: Path, *, seed: int = 0, noise: float = 0.0, n_vocab: int = 31, n_ctx: int = 16, n_chunk: int = 3
) -> np.ndarray:
    """A file of random logits [n_chunk, scored, n_vocab], which are returned; noise leaves the tokens."""
    from verify.engines.logits_file import LogitsWriter

    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, n_vocab, (n_chunk, n_ctx)).astype(np.int32)
    scored = n_ctx - 1 - n_ctx // 2
    logits = rng.normal(0, 3, (n_chunk, scored, n_vocab)).astype(np.float32)
    logits += np.float32(noise) * rng.normal(0, 1, logits.shape).astype(np.float32)
    with LogitsWriter(path, tokens, n_vocab) as writer:
        for window, rows in enumerate(logits):
            writer.write(window, 0, rows)
    return logits
