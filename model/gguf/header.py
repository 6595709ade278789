"""Headers of GGUF files, versions 2 and 3, read once from front to back; nothing in them is believed.

A file is the magic `GGUF`, version u32, tensor count u64, key count u64, the keys with their values, the
tensor table (name, dimensions innermost first, type, offset) and the tensors, aligned; little-endian. Every
step is checked against the end of the file before it is taken, so that no length or count in a broken file
leads to a large allocation, and no tensor is placed outside the file or on another one.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np

from verify.model.errors import ModelError, short
from verify.model.gguf.types import TENSOR_TYPES, why_refused

_SUPPORTED_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_MOST_NESTED_LISTS = 4
# Of a key or a tensor, in bytes. GGUF allows 64 for tensors; nobody writes keys as long as it allows.
_LONGEST_NAME = 256
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


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies, and how."""

    name: str  # in the file
    shape: tuple[int, ...]  # outermost dimension first, as torch has it: the reverse of GGUF's
    type_id: int  # number of its type in GGUF
    type_name: str  # name of its type
    n_bytes: int  # of its data
    path: Path  # of the shard that holds it
    offset: int  # of its data from the start of that file

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


class Header(NamedTuple):
    """metadata: key -> Python number, bool or str, a list of str, or a numpy array for a list of numbers."""

    metadata: dict[str, Any]
    tensors: list[TensorInfo]


def read_header(path: Path, data: mmap.mmap) -> Header:
    """The header of a file, given its map. Raises ModelError, saying what was expected, where it has none."""
    return _Reader(path, data).read()


class _Entry(NamedTuple):
    """An entry of the tensor table: sizes innermost first, the offset from the start of the data."""

    name: str
    sizes: list[int]
    type_id: int
    offset: int


class _Reader:
    """A place in a header, and what is read from there on."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def read(self) -> Header:
        self._magic()
        tensor_count = self._number(_U64, "the tensor count")
        key_count = self._number(_U64, "the key count")
        self._expect(tensor_count * _LEAST_TENSOR, f"the table of {tensor_count} tensors")
        self._expect(key_count * _LEAST_KEY, f"the metadata of {key_count} keys")
        metadata: dict[str, Any] = {}
        for index in range(key_count):
            key = self._name(f"metadata key {index}")
            if key in metadata:
                self._fail(f"metadata key {key} is there twice, expected once")
            kind = self._number(_U32, f"the type of metadata key {key}")
            metadata[key] = self._value(kind, f"metadata key {key}")
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._fail(f"metadata key general.alignment: expected a power of two, got {short(alignment)}")
        entries: dict[str, _Entry] = {}
        for index in range(tensor_count):
            entry = self._entry(index, alignment)
            if entry.name in entries:
                self._fail(f"tensor {entry.name} is there twice, expected once")
            entries[entry.name] = entry
        start = -(-self.at // alignment) * alignment
        tensors = [self._placed(entry, start + entry.offset) for entry in entries.values()]
        self._expect_apart(tensors)
        return Header(metadata, tensors)

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

    def _entry(self, index: int, alignment: int) -> _Entry:
        name = self._name(f"tensor {index}")
        rank = self._number(_U32, f"the dimensions of tensor {name}")
        if rank > _MOST_DIMENSIONS:
            self._fail(f"tensor {name}: expected at most {_MOST_DIMENSIONS} dimensions, got {rank}")
        sizes = [self._number(_U64, f"the dimensions of tensor {name}") for _ in range(rank)]
        if 0 in sizes:
            self._fail(f"tensor {name}: expected dimensions of 1 or more, got {_by(sizes)}")
        type_id = self._number(_U32, f"the type of tensor {name}")
        offset = self._number(_U64, f"the offset of tensor {name}")
        found = TENSOR_TYPES.get(type_id)
        if found is None:
            self._fail(f"tensor {name}: {why_refused(type_id)}")
        width = (sizes or [1])[0]
        if width % found.block_size:
            self._fail(
                f"tensor {name}: expected rows of a multiple of {found.block_size} weights of {found.name},"
                f" got {width}"
            )
        if offset % alignment:
            self._fail(f"tensor {name}: expected an offset that is a multiple of {alignment}, got {offset}")
        return _Entry(name, sizes, type_id, offset)

    def _placed(self, entry: _Entry, offset: int) -> TensorInfo:
        kind = TENSOR_TYPES[entry.type_id]
        n_bytes = math.prod(entry.sizes[1:]) * kind.row_bytes((entry.sizes or [1])[0])
        if offset + n_bytes > self.size:
            self._fail(
                f"is cut off: tensor {entry.name} needs {n_bytes} bytes from byte {offset} on,"
                f" present are {max(self.size - offset, 0)} (of a file of {self.size} bytes)"
            )
        shape = tuple(reversed(entry.sizes))
        return TensorInfo(
            name=entry.name,
            shape=shape,
            type_id=entry.type_id,
            type_name=kind.name,
            n_bytes=n_bytes,
            path=self.path,
            offset=offset,
        )

    def _expect_apart(self, tensors: list[TensorInfo]) -> None:
        in_order = sorted(tensors, key=lambda info: info.offset)
        for first, second in pairwise(in_order):
            end = first.offset + first.n_bytes
            if second.offset < end:
                self._fail(
                    f"tensor {second.name} begins at byte {second.offset}, inside tensor {first.name},"
                    f" which ends at byte {end}"
                )

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
            self._fail(f"{what}: expected UTF-8, value {len(strings)} is {short(error.object)}")
        self.at = at
        return strings

    def _name(self, what: str) -> str:
        """A name of a key or tensor: short, and fit to be printed, as errors quote it."""
        length = self._number(_U64, f"the length of the name of {what}")
        if length > _LONGEST_NAME:
            self._fail(
                f"at byte {self.at}: the name of {what}: expected at most {_LONGEST_NAME} bytes, got {length}"
            )
        name = self._text(self._take(length, f"the name of {what}"), f"the name of {what}")
        if not name.isprintable():
            self._fail(f"the name of {what}: expected printable text, got {short(name)}")
        return name

    def _string(self, what: str) -> str:
        return self._text(self._take(self._number(_U64, f"the length of {what}"), what), what)

    def _text(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail(f"{what}: expected UTF-8, got {short(raw)}")

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


def _by(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))
