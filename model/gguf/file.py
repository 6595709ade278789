"""GGUF files: the header read at once (`gguf.header`), the tensors left where they are, memory-mapped.

A split file (`NAME-00001-of-0000N.gguf`) is one GGUFFile, whichever of its shards is opened. Nothing here
decodes a weight (`verify.model.gguf.dequantize`) or knows an architecture.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from verify.model.errors import ModelError, short
from verify.model.gguf.header import TensorInfo, read_header
from verify.model.gguf.held import Held, check_held, fingerprint, held

T = TypeVar("T")
D = TypeVar("D")

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

_NOUNS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list of texts",
    np.ndarray: "a list of numbers",
}


class GGUFFile:
    """An open GGUF file, or all shards of a split one. Usable in a `with`.

    path: the file, or the first shard; paths: all of them. metadata: key -> Python number, bool or str, a
    list of str, or a numpy array for a list of numbers. tensors: name -> TensorInfo, in the file's order.
    n_bytes, fingerprint: size and hash (`held.fingerprint`) of all shards, as they were opened.
    """

    path: Path
    paths: list[Path]
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    n_bytes: int
    fingerprint: str

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
        self._maps: dict[Path, mmap.mmap] | None = {shard.path: shard.data for shard in shards}
        self._held = {shard.path: shard.held for shard in shards}
        self.n_bytes = sum(shard.held.size for shard in shards)
        self.fingerprint = fingerprint([shard.held for shard in shards])

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read the header of the file, and of every other shard where it is one of a split file.

        Raises ModelError: no such file, not a GGUF file, a version or byte order that is not read, a header
        or tensor data cut off, sizes that cannot be, an unknown tensor type, a name there twice, and shards
        that are missing, doubled or of different files.
        """
        path = Path(path)
        opened = _read_shard(path)
        count = opened.metadata.get("split.count", 1)
        if _count_in(path.name) == 1:
            if type(count) is not int or count not in (0, 1):
                raise ModelError(
                    f"{path}: metadata key split.count is {short(count)}, expected a name that ends in"
                    " -NNNNN-of-NNNNN.gguf, which leads to the other shards"
                )
            return cls([opened])
        # First of all: a number in a name is not enough to go and look for as many files.
        _expect_count(opened, _count_in(path.name))
        try:
            present = {other.name for other in path.parent.iterdir()}
        except OSError as error:
            raise ModelError(f"{path.parent}: cannot be listed: {error.strerror or error}") from None
        missing = _some(name for name in _beside(path.name) if name not in present)
        if missing:
            raise ModelError(f"{path}: expected {count} shards beside each other, missing: {missing}")
        return cls(_checked([_read_shard(path.with_name(name)) for name in _beside(path.name)]))

    def close(self) -> None:
        """Let go of the maps. An array from `raw` stays good; its file is unmapped with the last of them."""
        self._maps = None

    def check_unchanged(self) -> None:
        """Raises ModelChanged where a file is gone, replaced or written to since it was opened."""
        for path, then in self._held.items():
            check_held(path, then)

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
            raise ModelError(f"{self.path}: metadata key {key}: expected {_noun(kind)}, got {short(value)}")
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

    def raw(self, name: str, rows: range | None = None) -> np.ndarray:
        """The stored bytes of a tensor, uint8 [n_bytes]: a read-only view of the map, nothing copied.

        rows: only those of a range of the first dimension, of step 1. Raises ModelError for a tensor that is
        not there, after `close`, and where the file has become shorter since it was opened: to touch what is
        no longer there would end the process.
        """
        info = self.tensor(name)
        if self._maps is None:
            raise ModelError(f"{self.path}: tensor {name} cannot be read: the file has been closed")
        held = self._maps[info.path]
        if held.size() < info.offset + info.n_bytes:
            raise ModelError(
                f"{info.path}: is cut off: it has {held.size()} bytes now, and had more when it was opened:"
                f" tensor {name} ends at byte {info.offset + info.n_bytes}"
            )
        data = np.frombuffer(held, np.uint8, info.n_bytes, info.offset)
        if rows is None:
            return data
        row_bytes = info.n_bytes // info.shape[0]
        return data[rows.start * row_bytes : rows.stop * row_bytes]


def shard_names(name: str) -> list[str]:
    """The names of all shards, in order, of the split file that `name` is a shard of; else [name].

    >>> shard_names("m-00002-of-00003.gguf")
    ['m-00001-of-00003.gguf', 'm-00002-of-00003.gguf', 'm-00003-of-00003.gguf']
    >>> shard_names("m.gguf")
    ['m.gguf']
    """
    return list(_beside(name))


def _count_in(name: str) -> int:
    """How many shards there are by the name of one; 1 for another name."""
    found = _SHARD_NAME.fullmatch(name)
    count = int(found["count"]) if found else 1
    return count if found and 1 <= int(found["number"]) <= count else 1


def _beside(name: str) -> Iterator[str]:
    """`shard_names`, one by one: a name may lead to very many."""
    found, count = _SHARD_NAME.fullmatch(name), _count_in(name)
    if not found or count == 1:
        yield name
        return
    stem = found["stem"]
    for number in range(1, count + 1):
        yield f"{stem}-{number:05}-of-{count:05}.gguf"


class _Shard(NamedTuple):
    path: Path
    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    data: mmap.mmap
    held: Held


def _expect_count(shard: _Shard, count: int) -> None:
    if _whole(shard, "split.count") != count:
        raise ModelError(
            f"{shard.path}: metadata key split.count is {shard.metadata['split.count']},"
            f" expected {count} as in the name"
        )


def _whole(shard: _Shard, key: str) -> int:
    value = shard.metadata.get(key)
    if type(value) is not int:
        raise ModelError(
            f"{shard.path}: metadata key {key}: expected a whole number in a shard, got {short(value)}"
        )
    return value


def _checked(shards: list[_Shard]) -> list[_Shard]:
    """The shards, if their own numbers say that they are all of one file, in this order."""
    for shard in shards:
        _expect_count(shard, len(shards))
    numbers = [_whole(shard, "split.no") for shard in shards]
    for index, (shard, number) in enumerate(zip(shards, numbers, strict=True)):
        if numbers.count(number) > 1:
            same = _some(other.path.name for other, n in zip(shards, numbers, strict=True) if n == number)
            raise ModelError(f"{shard.path}: split.no {number} is there more than once, in {same}")
        if number != index:
            raise ModelError(
                f"{shard.path}: metadata key split.no is {number}, expected {index} as in the name"
            )
    first = shards[0]
    expected = first.metadata.get("split.tensors.count")
    if expected is not None:
        expected = _whole(first, "split.tensors.count")
    for shard in shards[1:]:
        for key in sorted(first.metadata.keys() & shard.metadata.keys() - {"split.no"}):
            ours, theirs = shard.metadata[key], first.metadata[key]
            if type(ours) is not type(theirs) or not np.array_equal(ours, theirs):
                raise ModelError(
                    f"{shard.path}: metadata key {key} is {short(ours)}, but {short(theirs)} in"
                    f" {first.path.name}"
                )
    present = sum(len(shard.tensors) for shard in shards)
    if expected is not None and expected != present:
        raise ModelError(
            f"{shards[0].path}: metadata key split.tensors.count is {expected},"
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
            opened = held(path, file.fileno())
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"{path}: expected a readable GGUF file: {_reason(error)}") from None
    try:
        metadata, tensors = read_header(path, data)
    except BaseException:
        # A caught error keeps these frames alive, and with them the map and its file descriptor.
        data.close()
        raise
    return _Shard(path, metadata, tensors, data, opened)


def _noun(kind: type) -> str:
    return _NOUNS.get(kind, kind.__name__)


def _some(names: Iterable[str], most: int = 4) -> str:
    """The first few names, and how many more there are; empty where there are none."""
    left = iter(names)
    text = ", ".join(islice(left, most))
    more = sum(1 for _ in left)
    return f"{text} and {more} more" if more else text


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
