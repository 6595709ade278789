"""What a GGUF file holds: metadata, and tensors as views of the mapped file.

The header is read here rather than by the `gguf` package, whose reader needs seconds for a large vocabulary
and raises on tensor types that it does not know. Layout (little-endian): magic `GGUF`, version u32, tensor
count u64, key count u64, the keys, the tensor table (name, dimensions innermost first, type, offset), then
the tensors, aligned. Nothing is believed before it is checked against the size of the file.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from model.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

# Value types of the metadata: id -> struct format, or numpy dtype of an array of them.
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# The least bytes that one key and one tensor take in the header.
_LEAST_KEY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
# ik_llama.cpp stores rows interleaved under these ids.
_INTERLEAVED = range(202, 400)

# Type id -> (name, weights a block, bytes a block).
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGML_QUANT_SIZES
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: shape outermost first (rows, columns), where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    n_bytes: int
    path: Path
    offset: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


class GGUFFile:
    """An open model: `metadata` of its first shard, `tensors` of all of them."""

    def __init__(self, path: Path, shards: Sequence[_Shard]) -> None:
        self.path = path
        self.paths = [shard.path for shard in shards]
        self.metadata: dict[str, Any] = shards[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._maps = {shard.path: shard.data for shard in shards}
        for shard in shards:
            for info in shard.tensors:
                if info.name in self.tensors:
                    other = self.tensors[info.name].path.name
                    raise ModelError(f"{shard.path}: tensor {info.name} is there twice, also in {other}")
                self.tensors[info.name] = info
        self.architecture = str(self.require("general.architecture", str))

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Open a file, and with a shard of a split model all of its shards. Raises ModelError."""
        path = Path(path)
        match = _SHARD.fullmatch(path.name)
        if match is None:
            shard = _Shard(path)
            count = shard.metadata.get("split.count", 0)
            if isinstance(count, int) and count > 1:
                raise ModelError(
                    f"{path}: split.count is {count}, expected a name that ends in -00001-of-{count:05d}.gguf"
                )
            return cls(path, [shard])
        return cls(path, _open_shards(path, match))

    def require(self, key: str, kind: type) -> Any:
        """The value of a metadata key. Raises ModelError if it is missing or of another type."""
        if key not in self.metadata:
            raise ModelError(f"{self.path}: metadata key {key} is missing")
        value = self.metadata[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ModelError(
                f"{self.path}: metadata key {key}: expected {kind.__name__}, got {type(value).__name__}"
            )
        return value

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor [n_bytes] uint8, a view of the mapped file. Raises ModelError."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path}: tensor {name} is missing")
        return self._maps[info.path][info.offset : info.offset + info.n_bytes]


def _open_shards(path: Path, match: re.Match[str]) -> list[_Shard]:
    count = int(match["count"])
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    if count < 1 or path.name not in names:
        raise ModelError(f"{path}: shard {int(match['number'])} of {count}, expected 1 to {count}")
    shards = []
    for i, name in enumerate(names):
        shard_path = path.with_name(name)
        if not shard_path.is_file():
            raise ModelError(f"{shard_path}: this shard of the model is missing")
        shard = _Shard(shard_path)
        for key, expected in (("split.no", i), ("split.count", count)):
            if shard.metadata.get(key) != expected:
                found = shard.metadata.get(key)
                raise ModelError(f"{shard_path}: metadata key {key} is {found}, expected {expected}")
        shards.append(shard)
    return shards


class _Shard:
    """One file: its keys, its tensor table, its bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as f:
                head = f.read(8)
                if head[:4] != MAGIC:
                    raise ModelError(
                        f"{path}: not a GGUF file (it begins with {head[:4]!r}, expected {MAGIC!r})"
                    )
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise ModelError(f"{path}: is a folder, expected a GGUF file") from None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
        self.data = np.frombuffer(mapped, dtype=np.uint8)
        cursor = _Cursor(path, mapped, 4)
        version = cursor.scalar("<I", "version")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                raise ModelError(f"{path}: is big-endian, expected a little-endian GGUF file")
            raise ModelError(f"{path}: GGUF version is {version}, expected one of {VERSIONS}")
        tensors = cursor.count("tensor count", _LEAST_TENSOR)
        keys = cursor.count("key count", _LEAST_KEY)
        self.metadata = _read_metadata(cursor, keys)
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ModelError(f"{path}: general.alignment is {alignment!r}, expected a power of two")
        table = [_read_tensor(cursor, alignment) for _ in range(tensors)]
        start = -(-cursor.position // alignment) * alignment
        self.tensors = [_placed(path, entry, start, len(mapped)) for entry in table]


class _Cursor:
    """A place in the header. Every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, position: int) -> None:
        self.path, self.data, self.position = path, data, position

    def take(self, n: int, what: str) -> int:
        """Where the next n bytes begin. Raises ModelError where the file ends before."""
        start = self.position
        if n > len(self.data) - start:
            raise ModelError(
                f"{self.path}: truncated: {what} at byte {start} needs {n} bytes,"
                f" the file ends at {len(self.data)}"
            )
        self.position += n
        return start

    def scalar(self, layout: str, what: str) -> Any:
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout), what))[0]

    def count(self, what: str, least: int) -> int:
        """A number of things of at least `least` bytes each, that the rest of the file can hold."""
        number = int(self.scalar("<Q", what))
        if number > (len(self.data) - self.position) // least:
            raise ModelError(f"{self.path}: {what} is {number}, more than the rest of the file can hold")
        return number

    def text(self, what: str) -> str:
        length = self.count(f"length of {what}", 1)
        start = self.take(length, what)
        return self.data[start : start + length].decode("utf-8", errors="replace")


def _read_metadata(cursor: _Cursor, keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(keys):
        key = cursor.text(f"metadata key {i}")
        if key in metadata:
            raise ModelError(f"{cursor.path}: metadata key {key} is there twice")
        metadata[key] = _read_value(cursor, cursor.scalar("<I", f"type of {key}"), key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind], key)
    if kind == _STRING:
        return cursor.text(key)
    if kind != _ARRAY:
        raise ModelError(f"{cursor.path}: metadata key {key} has the unknown value type {kind}")
    of = cursor.scalar("<I", f"type of {key}")
    if of == _STRING:
        return [cursor.text(key) for _ in range(cursor.count(f"length of {key}", 8))]
    if of not in _SCALARS:
        raise ModelError(
            f"{cursor.path}: metadata key {key} is an array of type {of}, expected numbers or text"
        )
    dtype = np.dtype(_SCALARS[of].replace("B", "u1").replace("b", "i1"))
    length = cursor.count(f"length of {key}", dtype.itemsize)
    start = cursor.take(length * dtype.itemsize, key)
    return np.frombuffer(cursor.data, dtype=dtype, count=length, offset=start).copy()


def _read_tensor(cursor: _Cursor, alignment: int) -> TensorInfo:
    """An entry of the tensor table; its offset still counts from the start of the tensor data."""
    name = cursor.text("a tensor's name")
    path = cursor.path
    n_dims = cursor.scalar("<I", f"dimensions of {name}")
    if not 1 <= n_dims <= MOST_DIMENSIONS:
        raise ModelError(f"{path}: tensor {name} has {n_dims} dimensions, expected 1 to {MOST_DIMENSIONS}")
    dims = [int(cursor.scalar("<Q", f"shape of {name}")) for _ in range(n_dims)]
    if min(dims) < 1:
        raise ModelError(f"{path}: tensor {name} has shape {dims[::-1]}, expected sizes from 1")
    kind = cursor.scalar("<I", f"type of {name}")
    if kind not in TENSOR_TYPES:
        why = "is not known here"
        if kind in _INTERLEAVED:
            why = "is a row-interleaved type of ik_llama.cpp: use the plain file"
        raise ModelError(f"{path}: tensor {name}: type id {kind} {why}")
    type_name, block, block_bytes = TENSOR_TYPES[kind]
    if dims[0] % block:
        raise ModelError(
            f"{path}: tensor {name}: rows of {dims[0]}, expected a multiple of {block} for {type_name}"
        )
    offset = int(cursor.scalar("<Q", f"offset of {name}"))
    if offset % alignment:
        raise ModelError(f"{path}: tensor {name}: offset {offset} is not a multiple of {alignment}")
    n_bytes = math.prod(dims) // block * block_bytes
    return TensorInfo(name, tuple(reversed(dims)), kind, type_name, n_bytes, path, offset)


def _placed(path: Path, info: TensorInfo, start: int, size: int) -> TensorInfo:
    """The entry with its offset in the file. Raises ModelError where the file ends before the tensor does."""
    begin = start + info.offset
    if begin + info.n_bytes > size:
        raise ModelError(
            f"{path}: truncated: tensor {info.name} needs bytes {begin} to {begin + info.n_bytes},"
            f" the file ends at {size}"
        )
    return TensorInfo(info.name, info.shape, info.type_id, info.type_name, info.n_bytes, path, begin)
