"""GGUF files, versions 2 and 3: the header read at once, the tensors left where they are, memory-mapped.

A file is the magic `GGUF`, version u32, tensor count u64, key count u64, the keys with their values, the
tensor table (name, dimensions innermost first, type, offset) and the tensors, aligned; little-endian. A split
file (`NAME-00001-of-0000N.gguf`) is one GGUFFile, whichever of its shards is opened. Nothing here decodes a
weight (`model.dequantize`) or knows an architecture.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
import struct
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self, TypeVar, cast

import numpy as np

from model.errors import ModelError

T = TypeVar("T")
D = TypeVar("D")


class TensorType(NamedTuple):
    """How a type stores a row: row_header bytes, then block_bytes for every block_size weights."""

    name: str
    block_size: int
    block_bytes: int
    row_header: int = 0


# ggml's types by id. From 133 on they are ik_llama.cpp's own.
TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4), 1: TensorType("F16", 1, 2), 2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20), 6: TensorType("Q5_0", 32, 22), 7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34), 10: TensorType("Q2_K", 256, 84), 11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144), 13: TensorType("Q5_K", 256, 176), 14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66), 17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98), 19: TensorType("IQ1_S", 256, 50), 20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110), 22: TensorType("IQ2_S", 256, 82), 23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1), 25: TensorType("I16", 1, 2), 26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8), 28: TensorType("F64", 1, 8), 29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2), 34: TensorType("TQ1_0", 256, 54), 35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17), 40: TensorType("NVFP4", 64, 36), 133: TensorType("Q6_0", 32, 26),
    137: TensorType("IQ2_K", 256, 76), 138: TensorType("IQ3_K", 256, 110),
    139: TensorType("IQ4_K", 256, 144), 140: TensorType("IQ5_K", 256, 176),
    141: TensorType("IQ6_K", 256, 212), 144: TensorType("IQ4_KS", 256, 136, 4),
    145: TensorType("IQ2_KS", 256, 70, 2), 146: TensorType("IQ4_KSS", 256, 128, 4),
    152: TensorType("IQ5_KS", 256, 168, 4), 153: TensorType("IQ2_KT", 256, 68, 4),
    154: TensorType("IQ3_KT", 256, 100, 4), 155: TensorType("IQ4_KT", 256, 128, 4),
    156: TensorType("IQ3_KS", 256, 102, 2), 157: TensorType("IQ2_KL", 256, 86, 2),
    158: TensorType("IQ1_KT", 256, 56, 4),
}  # fmt: skip

# ik_llama.cpp's row-interleaved types: the id is that of the plain type and 200, except for the named.
INTERLEAVED_IDS = range(202, 400)
_INTERLEAVED_NAMES = {335: "IQ2_BN", 398: "Q8_KV", 399: "Q8_K"}

_SUPPORTED_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_MOST_NESTED_LISTS = 4
# The fewest bytes that a tensor takes in the table, a key with its value, and a value in a list (an empty
# text is its length, an empty list its type and length).
_LEAST_TENSOR, _LEAST_KEY, _LEAST_VALUE = 24, 13, 8

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# Kinds of values by id; numpy's names for the numbers.
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
    12: "<f8",
}  # fmt: skip
_STRING, _LIST = 8, 9

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

_NOUNS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list of texts",
    np.ndarray: "a list of numbers",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and how.

    shape: outermost dimension first, as torch has it (the reverse of GGUF's). n_bytes, offset: of its data,
    from the start of the file `path`, which may be any shard of a split file.
    """

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
    """An open GGUF file, or all shards of a split one. Usable in a `with`.

    path: the file, or the first shard; paths: all of them. metadata: key -> Python number, bool or str, a
    list of str, or a numpy array for a list of numbers. tensors: name -> TensorInfo, in the file's order.
    """

    path: Path
    paths: list[Path]
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def __init__(self, shards: list[_Shard]) -> None:
        self.path = shards[0].path
        self.paths = [shard.path for shard in shards]
        self.metadata = shards[0].metadata
        self.tensors = {}
        for shard in shards:
            for info in shard.tensors:
                if info.name in self.tensors:
                    other = self.tensors[info.name].path.name
                    raise ModelError(f"{info.path}: tensor {info.name} is in {other} as well, expected once")
                self.tensors[info.name] = info
        self._data: dict[Path, np.ndarray] | None = {shard.path: shard.data for shard in shards}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read the header of the file, and of every other shard where it is one of a split file.

        Raises ModelError: no such file, not a GGUF file, a version or byte order that is not read, a header
        or tensor data cut off, sizes that cannot be, an unknown tensor type, a name there twice, and shards
        that are missing, doubled or of different files.
        """
        path = Path(path)
        names = shard_names(path.name)
        if len(names) == 1:
            shard = _read_shard(path)
            count = shard.metadata.get("split.count", 1)
            if count not in (0, 1):
                raise ModelError(
                    f"{path}: metadata key split.count is {_short(count)}, expected a name that ends in"
                    " -NNNNN-of-NNNNN.gguf, which leads to the other shards"
                )
            return cls([shard])
        _expect_file(path)
        paths = [path.with_name(name) for name in names]
        missing = [p.name for p in paths if not p.is_file()]
        if missing:
            raise ModelError(
                f"{path}: expected {len(names)} shards beside each other, missing: {_some(missing)}"
            )
        return cls(_checked([_read_shard(p) for p in paths]))

    def close(self) -> None:
        """Let go of the maps. An array from `raw` stays good; its file is unmapped with the last of them."""
        self._data = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def architecture(self) -> str:
        """`general.architecture`. Raises ModelError where the file does not say."""
        return self.require("general.architecture", str)

    def require(self, key: str, kind: type[T]) -> T:
        """The value of a key, of the given kind: bool, int, float (any number), str, list or numpy.ndarray.

        Raises ModelError, naming file and key, where it is missing or of another kind.
        """
        if key not in self.metadata:
            raise ModelError(f"{self.path}: metadata key {key} is missing, expected {_noun(kind)}")
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        # A bool is an int to Python, and is not one to a reader of files.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ModelError(f"{self.path}: metadata key {key}: expected {_noun(kind)}, got {_short(value)}")
        return value

    def optional(self, key: str, kind: type[T], default: D) -> T | D:
        """As `require`, but `default` where the key is missing. Raises ModelError for another kind."""
        return self.require(key, kind) if key in self.metadata else default

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, of whatever kind it is, or `default` where the key is missing."""
        return self.metadata.get(key, default)

    def tensor(self, name: str) -> TensorInfo:
        """Where a tensor lies. Raises ModelError, naming file and tensor, where there is none."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path}: tensor {name} is missing")
        return info

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, uint8 [n_bytes]: a read-only view of the map, nothing copied.

        Raises ModelError for a tensor that is not there, and after `close`.
        """
        info = self.tensor(name)
        if self._data is None:
            raise ModelError(f"{self.path}: tensor {name} cannot be read: the file has been closed")
        return self._data[info.path][info.offset : info.offset + info.n_bytes]


def shard_names(name: str) -> list[str]:
    """The names of all shards, in order, of the split file that `name` is a shard of; else [name].

    >>> shard_names("m-00002-of-00003.gguf")
    ['m-00001-of-00003.gguf', 'm-00002-of-00003.gguf', 'm-00003-of-00003.gguf']
    >>> shard_names("m.gguf")
    ['m.gguf']
    """
    found = _SHARD_NAME.fullmatch(name)
    if not found or not 1 <= int(found["number"]) <= int(found["count"]):
        return [name]
    stem, count = found["stem"], int(found["count"])
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


class _Shard(NamedTuple):
    path: Path
    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    data: np.ndarray


def _checked(shards: list[_Shard]) -> list[_Shard]:
    """The shards, if their own numbers say that they are all of one file, in this order."""
    for shard in shards:
        for key in ("split.no", "split.count"):
            if type(shard.metadata.get(key)) is not int:
                got = _short(shard.metadata.get(key))
                raise ModelError(
                    f"{shard.path}: metadata key {key}: expected a whole number in a shard, got {got}"
                )
        count = shard.metadata["split.count"]
        if count != len(shards):
            raise ModelError(
                f"{shard.path}: metadata key split.count is {count}, expected {len(shards)} as in the name"
            )
    times = Counter(shard.metadata["split.no"] for shard in shards)
    for index, shard in enumerate(shards):
        number = shard.metadata["split.no"]
        if times[number] > 1:
            same = [other.path.name for other in shards if other.metadata["split.no"] == number]
            raise ModelError(f"{shard.path}: split.no {number} is there more than once, in {_some(same)}")
        if number != index:
            raise ModelError(
                f"{shard.path}: metadata key split.no is {number}, expected {index} as in the name"
            )
    expected = shards[0].metadata.get("split.tensors.count")
    present = sum(len(shard.tensors) for shard in shards)
    if expected is not None and expected != present:
        raise ModelError(
            f"{shards[0].path}: metadata key split.tensors.count is {_short(expected)},"
            f" but the shards hold {present} tensors"
        )
    return shards


def _expect_file(path: Path) -> None:
    """Raises ModelError unless a plain file is there."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{path}: no such file, expected a GGUF file") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(path)!r}: expected a readable GGUF file: {_reason(error)}") from None
    if stat.S_ISDIR(mode):
        raise ModelError(f"{path}: is a directory, expected a GGUF file")
    # Opening a pipe would wait for a writer, and no other kind of file can be mapped.
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path}: is not a plain file, expected a GGUF file")


def _read_shard(path: Path) -> _Shard:
    _expect_file(path)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelError(f"{path}: is empty, expected a GGUF file")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"{path}: expected a readable GGUF file: {_reason(error)}") from None
    try:
        metadata, tensors = _Header(path, data).read()
    except BaseException:
        # A caught error keeps these frames alive, and with them the map and its file descriptor.
        data.close()
        raise
    return _Shard(path, metadata, tensors, np.frombuffer(data, dtype=np.uint8))


class _Header:
    """Reads a header from front to back. Every step is first checked against the end of the file, so that no
    length or count in a broken file leads to a large allocation."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def read(self) -> tuple[dict[str, Any], list[TensorInfo]]:
        self._magic()
        tensor_count = self._number(_U64, "the tensor count")
        key_count = self._number(_U64, "the key count")
        self._expect(tensor_count * _LEAST_TENSOR, f"the table of {tensor_count} tensors")
        self._expect(key_count * _LEAST_KEY, f"the metadata of {key_count} keys")
        metadata: dict[str, Any] = {}
        for index in range(key_count):
            key = self._string(f"the name of metadata key {index}")
            if key in metadata:
                self._fail(f"metadata key {key} is there twice, expected once")
            kind = self._number(_U32, f"the type of metadata key {key}")
            metadata[key] = self._value(kind, f"metadata key {key}")
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._fail(f"metadata key general.alignment: expected a power of two, got {_short(alignment)}")
        tensors: dict[str, TensorInfo] = {}
        for index in range(tensor_count):
            info = self._tensor(index, alignment)
            if info.name in tensors:
                self._fail(f"tensor {info.name} is there twice, expected once")
            tensors[info.name] = info
        start = -(-self.at // alignment) * alignment
        return metadata, [self._placed(info, start) for info in tensors.values()]

    def _magic(self) -> None:
        first = self.data[:4]
        if first == b"FUGG":
            self._fail("is big-endian, expected a little-endian GGUF file")
        if first != b"GGUF":
            hint = " (a pointer of git-lfs: fetch the file itself)" if first == b"vers" else ""
            self._fail(f"is not a GGUF file: it starts with {first!r}, expected b'GGUF'{hint}")
        self.at = 4
        version = self._number(_U32, "the version")
        if version and not version & 0xFFFF:
            self._fail("is big-endian, expected a little-endian GGUF file")
        if version not in _SUPPORTED_VERSIONS:
            expected = " or ".join(map(str, _SUPPORTED_VERSIONS))
            self._fail(f"GGUF version {version} is not read, expected version {expected}")

    def _tensor(self, index: int, alignment: int) -> TensorInfo:
        """One entry of the tensor table, its offset still relative to the start of the data."""
        name = self._string(f"the name of tensor {index}")
        rank = self._number(_U32, f"the dimensions of tensor {name}")
        if rank > _MOST_DIMENSIONS:
            self._fail(f"tensor {name}: expected at most {_MOST_DIMENSIONS} dimensions, got {rank}")
        sizes = [self._number(_U64, f"the dimensions of tensor {name}") for _ in range(rank)]
        type_id = self._number(_U32, f"the type of tensor {name}")
        offset = self._number(_U64, f"the offset of tensor {name}")
        found = TENSOR_TYPES.get(type_id)
        if found is None:
            self._fail(f"tensor {name}: {_unknown_type(type_id)}")
        width, rows = (sizes or [1])[0], math.prod(sizes[1:])
        if width % found.block_size:
            self._fail(
                f"tensor {name}: expected rows of a multiple of {found.block_size} weights of {found.name},"
                f" got {width}"
            )
        if offset % alignment:
            self._fail(f"tensor {name}: expected an offset that is a multiple of {alignment}, got {offset}")
        n_bytes = rows * (found.row_header + width // found.block_size * found.block_bytes)
        return TensorInfo(name, tuple(reversed(sizes)), type_id, found.name, n_bytes, self.path, offset)

    def _placed(self, info: TensorInfo, start: int) -> TensorInfo:
        offset = start + info.offset
        if offset + info.n_bytes > self.size:
            self._fail(
                f"is cut off: tensor {info.name} needs {info.n_bytes} bytes from byte {offset} on,"
                f" present are {max(self.size - offset, 0)} (of a file of {self.size} bytes)"
            )
        return replace(info, offset=offset)

    def _value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self._numbers(kind, 1, what)[0].item()
        if kind == _STRING:
            return self._string(what)
        if kind != _LIST:
            self._fail(f"{what}: expected a value of a type of GGUF, got type {kind}")
        if depth == _MOST_NESTED_LISTS:
            self._fail(f"{what}: expected at most {depth} lists in each other")
        kind = self._number(_U32, f"the type in the list of {what}")
        count = self._number(_U64, f"the length of the list of {what}")
        if kind in _NUMBERS:
            return self._numbers(kind, count, what)
        self._expect(count * _LEAST_VALUE, f"the list of {count} values of {what}")
        if kind == _STRING:
            return self._strings(count, what)
        return [self._value(kind, what, depth + 1) for _ in range(count)]

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        stored = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(count * stored.itemsize, what), stored)

    def _strings(self, count: int, what: str) -> list[str]:
        # A vocabulary has some 100,000 of these: the loop is flat, with one check a string.
        data, at, end, length_at = self.data, self.at, self.size, _U64.unpack_from
        strings: list[str] = []
        try:
            for _ in range(count):
                (length,) = length_at(data, at)
                at += 8
                stop = at + length
                if stop > end:
                    self.at = at
                    self._expect(length, f"value {len(strings)} of {what}")
                strings.append(data[at:stop].decode())
                at = stop
        except struct.error:
            self.at = at
            self._expect(8, f"the length of value {len(strings)} of {what}")
        except UnicodeDecodeError as error:
            self._fail(f"{what}: expected UTF-8, value {len(strings)} is {_short(error.object)}")
        self.at = at
        return strings

    def _string(self, what: str) -> str:
        raw = self._take(self._number(_U64, f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail(f"{what}: expected UTF-8, got {_short(raw)}")

    def _number(self, form: struct.Struct, what: str) -> int:
        return cast(int, form.unpack(self._take(form.size, what))[0])

    def _take(self, n_bytes: int, what: str) -> bytes:
        self._expect(n_bytes, what)
        start, self.at = self.at, self.at + n_bytes
        return self.data[start : self.at]

    def _expect(self, n_bytes: int, what: str) -> None:
        if self.at + n_bytes > self.size:
            self._fail(
                f"the header is broken, or cut off, at byte {self.at}: {what} should take {n_bytes} bytes"
                f" or more, {self.size - self.at} are left"
            )

    def _fail(self, message: str) -> NoReturn:
        raise ModelError(f"{self.path}: {message}")


def _unknown_type(type_id: int) -> str:
    if type_id not in INTERLEAVED_IDS:
        return f"type {type_id} is not a tensor type known here"
    plain = TENSOR_TYPES.get(type_id - 200)
    name = plain.name if plain else _INTERLEAVED_NAMES.get(type_id, "a type")
    return (
        f"type {type_id} is {name} with its rows interleaved (ik_llama.cpp's _R4, _R8 and _R16 types),"
        " which is not read: use the plain file"
    )


def _noun(kind: type) -> str:
    return _NOUNS.get(kind, kind.__name__)


def _short(value: object) -> str:
    """A value as an error quotes it: never long."""
    if value is None:
        return "nothing"
    if isinstance(value, list | np.ndarray):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
