"""Quantised caches of llama.cpp itself, rotated by its own rule and not, against ours: logits of a tiny file.

Its CPU kernel rounds queries to blocks of q8_0, which `q=q8_0` does too. Attention is in float32 on our side,
as the engine's graph has it before the cache. What is left moves codes of q4_0 to their neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.model_engine import ModelEngine, model_engine
from support.plain_arms import relative
from support.tiny_files import TOKENS, TinyFile, attention, base_keys, dense, outside
from verify.reference import reference_logits


@pytest.fixture(scope="module")
def engine() -> Iterator[ModelEngine]:
    found = model_engine()
    yield found
    found.close()


def with_heads_of(size: int) -> TinyFile:
    shapes = outside()
    for i in range(2):
        shapes |= attention(i, 4, 2, size) | dense(i)
    return TinyFile("llama", base_keys(2, 4, 2, size), shapes)


def ours(path: Path, cache: str, *more: str) -> np.ndarray:
    spec = ",".join((f"eager:cache={cache}", *more))
    return reference_logits(path, TOKENS, kernel=spec, cache_type="f32", device="cpu")


@pytest.mark.parametrize(("size", "types"), [(128, ("q4_0", "q4_0")), (64, ("q8_0", "q4_0"))])
def test_rotation_is_the_engines_own(
    engine: ModelEngine, tmp_path: Path, size: int, types: tuple[str, str]
) -> None:
    """Heads of 128 are rotated in blocks of 128 for K and of 64 for V."""
    path = with_heads_of(size).write(tmp_path / "tiny.gguf")
    plain, cache = engine.logits(path, TOKENS), "/".join(types)
    rotated, unrotated = (engine.logits(path, TOKENS, cache=types, rotated=on) for on in (True, False))
    lost = relative(rotated, plain)
    assert lost > 0.05 and relative(rotated, unrotated) > 0.1
    matched = relative(ours(path, f"{cache}+rotate=mainline", "q=q8_0"), rotated)
    assert matched < lost / 10
    assert relative(ours(path, cache, "q=q8_0"), unrotated) < lost / 10
    # The other one's coordinates are as far off as the cache itself.
    assert relative(ours(path, cache, "q=q8_0"), rotated) > lost
    # Queries that are not rounded: what the engine's 8 bits cost, a good deal less than the cache.
    queries = relative(ours(path, f"{cache}+rotate=mainline"), rotated)
    assert matched < queries < lost / 3
