"""GGUF files put together byte by byte, so that they may lie."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile, shard_names

U32, STRING, LIST = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def u32(name: str, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


def entry(name: str, sizes: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file_bytes(
    keys: Sequence[bytes] = (),
    entries: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file, byte by byte, with counts that may lie."""
    counts = (len(entries) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(entries)
    return head + bytes(-len(head) % alignment) + data


ARCHITECTURE = key("general.architecture", STRING, text("llama"))
GOOD = file_bytes(
    [
        ARCHITECTURE,
        u32("llama.block_count", 2),
        key("names", LIST, struct.pack("<IQ", STRING, 2) + text("a") + text("é")),
    ],
    [entry("first", [4], 0, 0), entry("second", [32, 2], 8, 32)],
    bytes(range(16)) + bytes(16) + bytes(68),
)


def check_refusal(path: Path, *said: str) -> str:
    """Opening the file raises a ModelError of one line, which names the file and says all of `said`."""
    with pytest.raises(ModelError) as caught:
        GGUFFile.open(path)
    message = str(caught.value)
    assert "\n" not in message, f"more than one line: {message!r}"
    assert path.name in message, f"the file is not named: {message}"
    for part in said:
        assert part in message, f"expected {part!r} in: {message}"
    return message


def write_shards(
    folder: Path,
    count: int = 3,
    *,
    total: int | None = None,
    numbers: Sequence[int] | None = None,
    first: Sequence[bytes] = (),
    later: Sequence[bytes] = (),
) -> list[Path]:
    """A split file: shard i holds tensor `t{i}` of i + 1 float32, the first shard also the metadata.

    first, later: keys that the first shard, and all the others, have beside those.
    """
    paths = [folder / name for name in shard_names(f"big-00001-of-{count:05}.gguf")]
    for i, path in enumerate(paths):
        keys = [ARCHITECTURE, u32("llama.block_count", 7)] if i == 0 else []
        keys += [u32("split.no", numbers[i] if numbers else i), u32("split.count", count)]
        keys.append(u32("split.tensors.count", count if total is None else total))
        keys += later if i else first
        data = np.full(i + 1, i, dtype="<f4").tobytes()
        path.write_bytes(file_bytes(keys, [entry(f"t{i}", [i + 1], 0, 0)], data))
    return paths
