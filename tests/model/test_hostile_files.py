"""Files that mean harm: a corpus of the smallest, and in the slow tier 20,000 that chance makes.

Whatever a file says, it opens or is refused by our own error in one line; nothing hangs, crashes, or takes
memory far beyond the file's size.
"""

from __future__ import annotations

import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.gguf_bytes import (
    ARCHITECTURE,
    GOOD,
    LIST,
    STRING,
    U32,
    check_refusal,
    entry,
    file_bytes,
    key,
    text,
    u32,
    write_shards,
)
from verify.model.errors import ModelError
from verify.model.gguf.dequantize import dequantize, type_is_supported
from verify.model.gguf.file import GGUFFile
from verify.model.gguf.types import TENSOR_TYPES

HUGE = 2**63 - 1
HOSTILE = {
    "other magic": (b"\x93NUMPY rest of it", ["not a GGUF file", "NUM", "expected b'GGUF'"]),
    "shorter than the magic": (b"GG", ["not a GGUF file"]),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1", ["not a GGUF file", "git-lfs"]),
    "version 1": (file_bytes(version=1), ["version 1", "expected version 2 or 3"]),
    "version 4": (file_bytes(version=4), ["version 4", "expected version 2 or 3"]),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ["big-endian"]),
    "big-endian magic": (b"FUGG" + struct.pack(">IQQ", 3, 0, 0), ["big-endian"]),
    "key twice": (file_bytes([ARCHITECTURE] * 2), ["metadata key general.architecture is there twice"]),
    "tensor twice": (file_bytes([], [entry("t", [4], 0, 0)] * 2, bytes(16)), ["tensor t is there twice"]),
    "unknown value": (file_bytes([key("k", 13, b"")]), ["metadata key k", "type 13"]),
    "unknown value in a list": (
        file_bytes([key("k", LIST, struct.pack("<IQ", 99, 1) + bytes(8))]),
        ["metadata key k", "type 99"],
    ),
    "lists without end": (
        file_bytes([key("k", LIST, struct.pack("<IQ", LIST, 1) * 5000)]),
        ["metadata key k", "at most 4 lists"],
    ),
    "key that is no text": (file_bytes([key(b"\xff", U32, bytes(4))]), ["name of metadata key 0", "UTF-8"]),
    "value that is no text": (file_bytes([key("k", STRING, text(b"\xff"))]), ["metadata key k", "UTF-8"]),
    "value of a list that is no text": (
        file_bytes([key("k", LIST, struct.pack("<IQ", STRING, 2) + text("a") + text(b"\xff"))]),
        ["metadata key k", "UTF-8", "value 1"],
    ),
    "alignment 0": (
        file_bytes([u32("general.alignment", 0)]),
        ["general.alignment", "power of two", "got 0"],
    ),
    "alignment 24": (file_bytes([u32("general.alignment", 24)]), ["general.alignment", "got 24"]),
    "alignment in words": (
        file_bytes([key("general.alignment", STRING, text("32"))]),
        ["general.alignment", "got '32'"],
    ),
    "offset off the alignment": (
        file_bytes([], [entry("t", [4], 0, 8)], bytes(64)),
        ["tensor t", "multiple of 32", "got 8"],
    ),
    "five dimensions": (
        file_bytes([], [entry("t", [1] * 5, 0, 0)], bytes(4)),
        ["tensor t", "at most 4", "got 5"],
    ),
    "half a block": (
        file_bytes([], [entry("t", [48, 2], 3, 0)], bytes(99)),
        ["tensor t", "multiple of 32", "Q4_1", "got 48"],
    ),
    "unknown type": (
        file_bytes([], [entry("t", [4], 77, 0)], bytes(16)),
        ["tensor t", "type 77", "not a tensor type"],
    ),
    "cut-off tensor": (
        file_bytes([], [entry("t", [4], 0, 0), entry("u", [100], 0, 32)], bytes(32 + 300)),
        ["cut off", "tensor u needs 400 bytes", "present are 300"],
    ),
    "tensor far away": (
        file_bytes([], [entry("t", [4], 0, 2**40)], bytes(16)),
        ["tensor t needs 16 bytes", "present are 0"],
    ),
    "enormous tensor": (file_bytes([], [entry("t", [HUGE, HUGE, HUGE], 0, 0)]), ["tensor t needs"]),
    "many keys": (file_bytes(n_keys=HUGE), ["at byte 24", f"metadata of {HUGE} keys"]),
    "many tensors": (file_bytes(n_tensors=HUGE), ["at byte 24", f"table of {HUGE} tensors"]),
    "long key": (
        file_bytes([struct.pack("<Q", HUGE)], data=bytes(64)),
        ["name of metadata key 0", f"got {HUGE}"],
    ),
    "many numbers": (
        file_bytes([key("k", LIST, struct.pack("<IQ", 6, HUGE))], data=bytes(64)),
        ["metadata key k"],
    ),
    "many texts": (
        file_bytes([key("k", LIST, struct.pack("<IQ", STRING, HUGE))], data=bytes(64)),
        ["metadata key k", f"{HUGE}"],
    ),
    "long text in a list": (
        file_bytes([key("k", LIST, struct.pack("<IQ", STRING, 1) + struct.pack("<Q", HUGE))], data=bytes(64)),
        ["value 0 of metadata key k", f"{HUGE} bytes"],
    ),
    "no name that fits a line": (
        file_bytes([], [entry("a\x1b[2J\nb", [4], 0, 0)], bytes(16)),
        ["the name of tensor 0", "printable", "\\x1b[2J\\nb"],
    ),
    "key that fits no line": (
        file_bytes([key("a\rb", U32, bytes(4))]),
        ["the name of metadata key 0", "printable", "a\\rb"],
    ),
    "name of 257 bytes": (
        file_bytes([], [entry("x" * 257, [4], 0, 0)], bytes(16)),
        ["the name of tensor 0", "at most 256 bytes, got 257"],
    ),
    "no rows": (file_bytes([], [entry("t", [4, 0], 0, 0)]), ["tensor t", "1 or more, got 4 x 0"]),
    "2^63 rows of nothing": (
        file_bytes([], [entry("t", [0, HUGE], 144, 0)]),
        ["tensor t", f"1 or more, got 0 x {HUGE}"],
    ),
    "a tensor on another": (
        file_bytes([], [entry("t", [16], 0, 32), entry("u", [16], 0, 0)], bytes(96)),
        ["tensor t begins at byte", "inside tensor u"],
    ),
    "two tensors in one place": (
        file_bytes([], [entry("t", [4], 0, 0), entry("u", [4], 0, 0)], bytes(16)),
        ["tensor u begins at byte", "inside tensor t"],
    ),
    "alignment 2^40": (
        file_bytes(
            [key("general.alignment", 10, struct.pack("<Q", 1 << 40))], [entry("t", [4], 0, 0)], bytes(64)
        ),
        ["tensor t needs 16 bytes", "present are 0"],
    ),
    "alignment true": (
        file_bytes([key("general.alignment", 7, b"\1")]),
        ["general.alignment", "got True"],
    ),
    "split.count that is a list": (
        file_bytes([key("split.count", LIST, struct.pack("<IQ2I", U32, 2, 0, 0))]),
        ["split.count is a list of 2"],
    ),
    "five lists in each other": (
        file_bytes([key("k", LIST, struct.pack("<IQ", LIST, 1) * 5 + struct.pack("<IQ", 0, 0))]),
        ["metadata key k", "at most 4 lists"],
    ),
}


@pytest.mark.parametrize("content, said", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_and_little_memory(
    tmp_path: Path, content: bytes, said: list[str]
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        check_refusal(path, *said)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20, f"{peak} bytes were allocated for a file of {len(content)}"


def test_a_list_as_the_number_of_tensors_in_a_split_file(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, 2)
    of_list = key("split.tensors.count", LIST, struct.pack("<IQ2I", U32, 2, 2, 2))
    paths[0].write_bytes(file_bytes([u32("split.no", 0), u32("split.count", 2), of_list]))
    check_refusal(paths[0], "split.tensors.count", "expected a whole number", "a list of 2")


def test_a_name_that_leads_to_9999_shards_leads_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "big-00001-of-09999.gguf"
    path.write_bytes(GOOD)
    check_refusal(path, "split.count", "expected a whole number")
    path.write_bytes(file_bytes([u32("split.no", 0), u32("split.count", 9_999)]))
    tracemalloc.start()
    try:
        check_refusal(path, "missing: big-00002-of-09999.gguf", "and 9994 more")
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()


def test_shards_that_are_links_to_each_other(tmp_path: Path) -> None:
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    first.symlink_to(second.name)
    second.symlink_to(first.name)
    with pytest.raises(ModelError, match="symbolic links"):
        GGUFFile.open(first)
    first.unlink()
    first.write_bytes(file_bytes([u32("split.no", 0), u32("split.count", 2)]))
    with pytest.raises(ModelError, match=r"split\.no 0 is there more than once"):
        GGUFFile.open(second)


def test_a_file_that_is_cut_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(GOOD)
    file = GGUFFile.open(path)
    os.truncate(path, len(GOOD) - 40)
    assert file.raw("first").size == 16
    with pytest.raises(ModelError, match=r"m\.gguf: is cut off: it has \d+ bytes now.* tensor second ends"):
        file.raw("second")


# What follows is the fuzzer. A file may be taken or refused; these are the ways to go wrong.


def check_harmless(path: Path) -> None:
    """Opens, and decodes what opens; or one line that names the file, or a shard of it."""
    size = sum(p.stat().st_size for p in path.parent.iterdir() if p.is_file())
    tracemalloc.start()
    try:
        open_and_decode(path, size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A short text, a list of nothing, an entry of the table are 10 to 20 times as large in Python.
    assert peak < 32 * size + (1 << 20), f"{peak} bytes were taken for a file of {size}"


def open_and_decode(path: Path, size: int) -> None:
    try:
        file = GGUFFile.open(path)
    except ModelError as error:
        message = str(error)
        assert path.name.partition("-0")[0] in message, f"the file is not named: {message}"
        assert len(message.splitlines()) == 1 and len(message) < 1500, message
        return
    for name, info in file.tensors.items():
        assert file.raw(name).size == info.n_bytes <= size
        assert info.n_elements <= 6 * size  # IQ1_S has 5.1 weights a byte
    # Two of them, others for other files: an example should take little time.
    names, first = sorted(file.tensors), zlib.crc32(path.read_bytes())
    for name in (names[first % len(names)], names[first // 2 % len(names)]) if names else ():
        info = file.tensors[name]
        if type_is_supported(info.type_name):
            assert dequantize(file, name).shape == info.shape


EVERY_KIND = file_bytes(
    [
        ARCHITECTURE,
        *(
            key(f"number {kind}", kind, struct.pack(form, 1))
            for kind, form in enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f"])
        ),
        key("yes", 7, b"\1"),
        *(
            key(f"wide {kind}", kind, struct.pack(form, 1))
            for kind, form in ((10, "<Q"), (11, "<q"), (12, "<d"))
        ),
        key("numbers", LIST, struct.pack("<IQ3f", 6, 3, 1, 2, 3)),
        key("texts", LIST, struct.pack("<IQ", STRING, 3) + text("a") + text("") + text("bc")),
        key(
            "lists", LIST, struct.pack("<IQIQIQ", LIST, 2, LIST, 1, 0, 0) + struct.pack("<IQ2I", U32, 2, 1, 2)
        ),
        u32("general.alignment", 32),
    ],
    [entry("t", [8, 2], 0, 0)],
    bytes(64),
)


def of_every_type() -> bytes:
    """A file with two rows of a block of every type."""
    entries, data = [], b""
    for number, kind in TENSOR_TYPES.items():
        entries.append(entry(kind.name, [kind.block_size, 2], number, len(data)))
        n_bytes = 2 * kind.row_bytes(kind.block_size)
        data += np.random.default_rng(number).bytes(n_bytes) + bytes(-n_bytes % 32)
    return file_bytes([ARCHITECTURE], entries, data)


SEEDS = (GOOD, EVERY_KIND, of_every_type())
SIZES = st.sampled_from(
    [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 256, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, HUGE, HUGE + 1]
) | st.integers(0, (1 << 64) - 1)  # fmt: skip
SMALL = st.integers(0, 5) | SIZES
TYPE_IDS = st.sampled_from(sorted(TENSOR_TYPES)) | st.integers(0, 450) | st.just((1 << 32) - 1)
NAMES = st.sampled_from(["t", "u", "general.alignment", "split.count", "token_embd.weight"]) | st.text(
    max_size=8
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good file with a few numbers, bytes or pieces of it changed, cut, moved or doubled."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(["number", "byte", "cut", "insert", "remove", "double"])):
            case "number":
                width = draw(st.sampled_from([1, 2, 4, 8]))
                near = draw(SIZES | st.sampled_from([len(content), len(content) - at, len(content) + 1]))
                content[at : at + width] = (near % (1 << 8 * width)).to_bytes(width, "little")
            case "byte":
                content[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = draw(st.binary(max_size=16))
            case "remove":
                del content[at : at + draw(st.integers(1, 64))]
            case "double":
                content[at:at] = content[at : at + draw(st.integers(1, 256))]
    return bytes(content)


def packed(width: int) -> Callable[[int], bytes]:
    return lambda number: (number % (1 << 8 * width)).to_bytes(width, "little")


STRINGS = st.binary(max_size=12).map(text) | st.builds(
    lambda n, raw: packed(8)(n) + raw, SIZES, st.binary(max_size=12)
)
VALUES = st.recursive(
    st.tuples(st.integers(0, 14), st.binary(max_size=9)) | st.tuples(st.just(STRING), STRINGS),
    lambda inner: st.builds(
        lambda items, lie: (
            LIST,
            packed(4)(items[0][0] if items else 0)
            + packed(8)(len(items) if lie is None else lie)
            + b"".join(raw for _, raw in items),
        ),
        st.lists(inner, max_size=5),
        st.none() | SIZES,
    ),
    max_leaves=12,
)
KEYS = st.lists(
    st.builds(lambda name, value: key(name, *value), NAMES, VALUES)
    | st.builds(lambda n: key("general.alignment", 10, packed(8)(n)), SIZES)
    | st.builds(lambda n: u32("split.count", n % (1 << 32)), SMALL),
    max_size=5,
)
ENTRIES = st.lists(
    st.builds(
        entry,
        NAMES,
        st.lists(SMALL | st.sampled_from([256, 512]), max_size=5),
        TYPE_IDS,
        SMALL.map(lambda n: n * 32 % (1 << 64)) | SIZES,
    ),
    max_size=5,
)
HEADERS = st.builds(
    lambda keys, entries, data, version, n_keys, n_tensors: file_bytes(
        keys, entries, bytes(data), version=version, n_keys=n_keys, n_tensors=n_tensors
    ),
    KEYS, ENTRIES, st.integers(0, 4096), st.sampled_from([3, 3, 3, 2, 1, 3 << 24]), *[st.none() | SIZES] * 2,
)  # fmt: skip


def many(examples: int) -> settings:
    # Far above what the smallest machine needs for an example: an example without end fails.
    return settings(
        max_examples=examples, deadline=timedelta(seconds=20), derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture
def fuzz_folder(tmp_path: Path) -> Path:
    """One folder for all examples of a test: 10,000 of them would be slow to make. The decoders' tables are
    made before memory is counted."""
    path = tmp_path / "every.gguf"
    path.write_bytes(of_every_type())
    file = GGUFFile.open(path)
    for name in filter(type_is_supported, file.tensors):
        dequantize(file, name)
    folder = tmp_path / "fuzz"
    folder.mkdir()
    return folder


def write_and_check(folder: Path, content: bytes) -> None:
    path = folder / "fuzzed.gguf"
    path.write_bytes(content)
    check_harmless(path)


@given(mutated())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_file_does_no_harm(fuzz_folder: Path, content: bytes) -> None:
    write_and_check(fuzz_folder, content)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(mutated())
@many(10_000)
def test_changed_files_do_no_harm(fuzz_folder: Path, content: bytes) -> None:
    write_and_check(fuzz_folder, content)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(HEADERS)
@many(8_000)
def test_made_up_headers_do_no_harm(fuzz_folder: Path, content: bytes) -> None:
    write_and_check(fuzz_folder, content)


SHARDS = st.lists(
    st.one_of(
        st.none(),  # missing
        st.integers(0, 3),  # a link to another, or itself
        st.builds(
            lambda number, count, total, tensor: file_bytes(
                [key("split.no", *number), key("split.count", *count), key("split.tensors.count", *total)],
                [entry(f"t{tensor}", [1], 0, 0)],
                bytes(4),
            ),
            *[st.integers(0, 4).map(lambda n: (U32, packed(4)(n))) | VALUES] * 3,
            st.integers(0, 3),
        ),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(SHARDS, st.integers(0, 3), st.sampled_from([None, 0, 2, 3, 9_999]))
@many(2_000)
def test_sets_of_shards_do_no_harm(
    fuzz_folder: Path, shards: Sequence[bytes | int | None], opened: int, count: int | None
) -> None:
    for old in fuzz_folder.iterdir():
        old.unlink()
    count = len(shards) if count is None else count
    paths = [fuzz_folder / f"fuzzed-{i + 1:05}-of-{count:05}.gguf" for i in range(4)]
    for path, shard in zip(paths, shards, strict=False):
        if isinstance(shard, bytes):
            path.write_bytes(shard)
        elif shard is not None:
            path.symlink_to(paths[shard].name)
    check_harmless(paths[opened])
