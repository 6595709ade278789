"""Headers of GGUF files: against the gguf package, and what is said of broken ones."""

from __future__ import annotations

import os
import re
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from model.errors import ModelError
from model.gguf_file import INTERLEAVED_IDS, TENSOR_TYPES, GGUFFile, shard_names

IK_TYPES = Path(__file__).parents[3] / "shared/data/tensor-types/ik_types.npz"
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


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GGUFFile]:
    def write_and_open(content: bytes) -> GGUFFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return GGUFFile.open(path)

    return write_and_open


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
    folder: Path, count: int = 3, *, total: int | None = None, numbers: Sequence[int] | None = None
) -> list[Path]:
    """A split file: shard i holds tensor `t{i}` of i + 1 float32, the first shard also the metadata."""
    paths = [folder / name for name in shard_names(f"big-00001-of-{count:05}.gguf")]
    for i, path in enumerate(paths):
        keys = [ARCHITECTURE, u32("llama.block_count", 7)] if i == 0 else []
        keys += [u32("split.no", numbers[i] if numbers else i), u32("split.count", count)]
        keys.append(u32("split.tensors.count", count if total is None else total))
        data = np.full(i + 1, i, dtype="<f4").tobytes()
        path.write_bytes(file_bytes(keys, [entry(f"t{i}", [i + 1], 0, 0)], data))
    return paths


def test_every_kind_of_value_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, "test")
    whole = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63),
    }  # fmt: skip
    for kind, value in whole.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_float32("float32", 1 / 3)
    writer.add_float64("float64", 1 / 3)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "naïve ☃\n")
    writer.add_string("empty", " ")
    writer.add_array("texts", ["a", "", "b c", "☃"])
    writer.add_array("whole numbers", [1, -2, 3])
    writer.add_array("numbers", [0.5, -1.25])
    writer.add_array("bools", [True, False, True])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    file = GGUFFile.open(path)
    assert {kind: file.metadata[kind] for kind in whole} == whole
    assert all(type(file.metadata[kind]) is int for kind in whole)
    assert file.metadata["float32"] == np.float32(1 / 3) and type(file.metadata["float32"]) is float
    assert file.metadata["float64"] == 1 / 3
    assert file.metadata["yes"] is True and file.metadata["no"] is False
    assert file.metadata["text"] == "naïve ☃\n"
    assert file.metadata["texts"] == ["a", "", "b c", "☃"]
    for name, expected in {
        "whole numbers": [1, -2, 3],
        "numbers": [0.5, -1.25],
        "bools": [True, False, True],
    }.items():
        assert isinstance(file.metadata[name], np.ndarray)
        assert file.metadata[name].tolist() == expected
    assert file.metadata["bools"].dtype == bool
    assert file.architecture == "test"
    assert file.tensors == {}


def test_lists_of_lists_and_a_byte_that_is_no_bool(opened: Callable[[bytes], GGUFFile]) -> None:
    inner = struct.pack("<IQHH", 2, 2, 5, 6) + struct.pack("<IQ", STRING, 1) + text("x")
    file = opened(
        file_bytes([key("nested", LIST, struct.pack("<IQ", LIST, 2) + inner), key("odd", 7, b"\x02")])
    )
    numbers, texts = file.metadata["nested"]
    assert numbers.tolist() == [5, 6] and texts == ["x"]
    assert file.metadata["odd"] is True


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_lie_where_the_writer_put_them(tmp_path: Path, version: int) -> None:
    rng = np.random.default_rng(0)
    stored = {
        "matrix": (rng.standard_normal((3, 5)).astype(np.float32), "F32", (3, 5)),
        "cube": (rng.standard_normal((2, 3, 7)).astype(np.float16), "F16", (2, 3, 7)),
        "blocks": (rng.integers(0, 256, (4, 2 * 34), dtype=np.uint8), "Q8_0", (4, 64)),
    }
    path = tmp_path / "tensors.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_custom_alignment(64)
    for name, (array, kind, _) in stored.items():
        writer.add_tensor(name, array, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", version)
    path.write_bytes(content)

    file = GGUFFile.open(path)
    assert list(file.tensors) == list(stored)
    for name, (array, kind, shape) in stored.items():
        info = file.tensors[name]
        assert (info.name, info.shape, info.type_name, info.path) == (name, shape, kind, path)
        assert info.type_id == Kind[kind]
        assert info.n_bytes == array.nbytes
        assert info.n_elements == np.prod(shape)
        assert content[info.offset : info.offset + info.n_bytes] == array.tobytes()
        assert file.raw(name).dtype == np.uint8
        assert file.raw(name).tobytes() == array.tobytes()


def test_a_real_file_reads_as_with_the_gguf_package(smollm: Path) -> None:
    file, reader = GGUFFile.open(smollm), gguf.GGUFReader(smollm)
    assert file.path == smollm and file.paths == [smollm]
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            value = file.metadata[name]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), name
    assert len(file.metadata) == len(reader.fields) - 3
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.type_id == tensor.tensor_type and info.type_name == tensor.tensor_type.name
        assert (info.n_bytes, info.offset) == (tensor.n_bytes, tensor.data_offset)


def test_the_sizes_of_types_are_those_of_ggml() -> None:
    # Q8_1 and Q8_K are for activations and Q1_0 has no decoder: files hold none that could be used.
    expected = {
        int(kind): (kind.name, *sizes)
        for kind, sizes in gguf.GGML_QUANT_SIZES.items()
        if kind.name not in ("Q8_1", "Q8_K", "Q1_0")
    }
    assert {i: tuple(kind)[:3] for i, kind in TENSOR_TYPES.items() if i < 100} == expected


def test_the_sizes_of_ik_types_are_those_of_rows_from_there() -> None:
    if not IK_TYPES.is_file():
        pytest.skip("the rows of ik_llama.cpp's types are not beside this checkout")
    widths = {}
    with np.load(IK_TYPES) as rows:
        for name in rows.files:
            if name.endswith("_bytes"):
                number, kind = name.removesuffix("_bytes").split("_", 1)
                widths[int(number), kind.upper()] = rows[name].shape[1]
    ours = {
        (i, kind.name): kind.row_header + 1024 // kind.block_size * kind.block_bytes
        for i, kind in TENSOR_TYPES.items()
        if i > 100
    }
    assert widths and {name: ours.get(name) for name in widths} == widths


def test_a_row_header_counts_in_every_row(opened: Callable[[bytes], GGUFFile]) -> None:
    per_row = 4 + 2 * 136  # IQ4_KS, 512 weights
    file = opened(file_bytes([], [entry("t", [512, 3], 144, 0)], bytes(3 * per_row)))
    assert file.tensors["t"].n_bytes == 3 * per_row


def test_raw_copies_nothing_and_cannot_be_written(opened: Callable[[bytes], GGUFFile]) -> None:
    file = opened(GOOD)
    first = file.raw("first")
    assert not first.flags.owndata
    assert np.shares_memory(first, file.raw("first"))
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_a_view_outlives_the_file_and_nothing_else_does(opened: Callable[[bytes], GGUFFile]) -> None:
    with opened(GOOD) as file:
        view = file.raw("first")
    assert view.tobytes() == bytes(range(16))
    assert file.metadata["llama.block_count"] == 2
    with pytest.raises(ModelError, match=r"model\.gguf: tensor first .* closed"):
        file.raw("first")


def test_no_file_descriptor_is_kept(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open file descriptors cannot be counted here")
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    good.write_bytes(GOOD)
    bad.write_bytes(GOOD[:60])
    before = len(list(Path("/proc/self/fd").iterdir()))
    caught = []
    for _ in range(20):
        with GGUFFile.open(good) as file:
            file.raw("first")
        try:
            GGUFFile.open(bad)
        except ModelError as error:
            caught.append(error)  # and with it the frames of the reader
    assert len(caught) == 20
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_large_vocabulary_is_read_in_well_under_a_second(tmp_path: Path) -> None:
    words = b"".join(text(f"word {i}") for i in range(262_144))
    scores = np.arange(262_144, dtype="<f4").tobytes()
    content = file_bytes(
        [
            key("tokenizer.ggml.tokens", LIST, struct.pack("<IQ", STRING, 262_144) + words),
            key("tokenizer.ggml.scores", LIST, struct.pack("<IQ", 6, 262_144) + scores),
        ]
    )
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(content)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        file = GGUFFile.open(path)
        seconds.append(time.perf_counter() - started)
    assert file.metadata["tokenizer.ggml.tokens"][262_143] == "word 262143"
    assert file.metadata["tokenizer.ggml.scores"][262_143] == 262_143
    assert min(seconds) < 0.6, f"{min(seconds):.2f} s"


def test_a_required_value_is_of_its_kind(opened: Callable[[bytes], GGUFFile]) -> None:
    file = opened(GOOD)
    assert file.require("llama.block_count", int) == 2
    as_float = file.require("llama.block_count", float)
    assert as_float == 2.0 and type(as_float) is float
    assert file.require("names", list) == ["a", "é"]
    for name, kind, said in [
        ("missing", int, "metadata key missing is missing, expected a whole number"),
        ("names", str, "metadata key names: expected a text, got a list of 2"),
        ("llama.block_count", bool, "metadata key llama.block_count: expected true or false, got 2"),
        ("general.architecture", float, "expected a number, got 'llama'"),
        ("names", np.ndarray, "expected a list of numbers, got a list of 2"),
    ]:
        with pytest.raises(ModelError, match=re.escape(said)) as caught:
            file.require(name, kind)
        assert str(file.path) in str(caught.value)


def test_a_bool_is_not_a_whole_number(opened: Callable[[bytes], GGUFFile]) -> None:
    file = opened(file_bytes([key("flag", 7, b"\x01")]))
    assert file.require("flag", bool) is True
    for kind in (int, float):
        with pytest.raises(ModelError, match="metadata key flag"):
            file.require("flag", kind)


def test_an_optional_value_is_checked_where_it_is_there(opened: Callable[[bytes], GGUFFile]) -> None:
    file = opened(GOOD)
    assert file.optional("missing", int, None) is None
    assert file.optional("llama.block_count", int, 9) == 2
    with pytest.raises(ModelError, match="metadata key names: expected a whole number"):
        file.optional("names", int, 9)
    assert file.get("missing") is None and file.get("missing", 3) == 3 and file.get("llama.block_count") == 2


def test_a_file_without_architecture_opens_and_says_so_when_asked(
    opened: Callable[[bytes], GGUFFile],
) -> None:
    file = opened(file_bytes())
    with pytest.raises(ModelError, match=r"general\.architecture is missing"):
        _ = file.architecture


def test_a_missing_tensor_is_named(opened: Callable[[bytes], GGUFFile]) -> None:
    file = opened(GOOD)
    for ask in (file.raw, file.tensor):
        with pytest.raises(ModelError, match=r"model\.gguf: tensor blk\.9 is missing"):
            ask("blk.9")


def test_what_is_no_file(tmp_path: Path) -> None:
    check_refusal(tmp_path / "none.gguf", "no such file")
    check_refusal(tmp_path, "is a directory")
    (tmp_path / "file").write_bytes(b"")
    check_refusal(tmp_path / "file", "is empty")
    check_refusal(tmp_path / "file" / "model.gguf", "no such file")
    check_refusal(tmp_path / ("x" * 300 + ".gguf"), "expected a readable GGUF file")
    with pytest.raises(ModelError, match="expected a readable GGUF file"):
        GGUFFile.open("a\0b")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    os.mkfifo(tmp_path / "pipe")
    check_refusal(tmp_path / "pipe", "is not a plain file")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "m.gguf").write_bytes(GOOD)
    monkeypatch.setattr(Path, "open", denied)
    check_refusal(tmp_path / "m.gguf", "Permission denied")


HUGE = 2**63 - 1
BROKEN = {
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
        ["name of metadata key 0", f"{HUGE} bytes"],
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
}


@pytest.mark.parametrize("content, said", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_line_and_little_memory(
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


@pytest.mark.parametrize(
    ("type_id", "name"),
    [
        (202, "Q4_0"),
        (212, "Q4_K"),
        (230, "BF16"),
        (335, "IQ2_BN"),
        (339, "IQ4_K"),
        (399, "Q8_K"),
        (300, "a type"),
    ],
)
def test_row_interleaved_types_are_refused_by_name(tmp_path: Path, type_id: int, name: str) -> None:
    assert type_id in INTERLEAVED_IDS
    path = tmp_path / "interleaved.gguf"
    path.write_bytes(file_bytes([], [entry("t", [256, 8], type_id, 0)], bytes(1 << 14)))
    check_refusal(
        path, "tensor t", f"type {type_id} is {name} with its rows interleaved", "use the plain file"
    )


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    header = len(GOOD) - 100  # the tensors' bytes are the last 100
    for n in range(4, len(GOOD)):
        path.write_bytes(GOOD[:n])
        message = check_refusal(path, "cut off")
        if n < header - 32:
            assert re.search(r"at byte \d+", message), message
            assert int(re.findall(r"at byte (\d+)", message)[0]) <= n
    path.write_bytes(GOOD)
    assert len(GGUFFile.open(path).tensors) == 2


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_lead_to_a_file_or_a_clear_refusal(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(GOOD)
    for place, value in changes:
        content[place] = value
    path = tmp_path_factory.mktemp("changed") / "changed.gguf"
    path.write_bytes(content)
    try:
        file = GGUFFile.open(path)
    except ModelError as error:
        assert "changed.gguf" in str(error) and "\n" not in str(error)
    else:
        for name, info in file.tensors.items():
            assert file.raw(name).size == info.n_bytes


def test_a_tensor_beyond_four_gigabytes_is_found(tmp_path: Path) -> None:
    far = 5 << 30
    head = file_bytes([], [entry("near", [4], 0, 0), entry("far", [4], 0, far)])
    path = tmp_path / "sparse.gguf"
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.seek(len(head) + far)
        file.write(bytes(range(16)))
    assert GGUFFile.open(path).raw("far").tobytes() == bytes(range(16))


def test_names_of_shards() -> None:
    assert shard_names("m.gguf") == ["m.gguf"]
    assert shard_names("a-00001-of-00001.gguf") == ["a-00001-of-00001.gguf"]
    assert shard_names("a-00002-of-00002.gguf") == ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    for odd in ("a-00003-of-00002.gguf", "a-00000-of-00002.gguf", "a-1-of-2.gguf", "a-00001-of-00002.bin"):
        assert shard_names(odd) == [odd]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_shard_opens_all(tmp_path: Path, which: int) -> None:
    paths = write_shards(tmp_path)
    file = GGUFFile.open(paths[which])
    assert file.path == paths[0] and file.paths == paths
    assert file.metadata["llama.block_count"] == 7 and file.architecture == "llama"
    assert list(file.tensors) == ["t0", "t1", "t2"]
    for i in range(3):
        assert file.tensors[f"t{i}"].path == paths[i]
        assert file.raw(f"t{i}").view("<f4").tolist() == [i] * (i + 1)


def test_a_file_that_is_one_of_one_needs_no_more(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00001.gguf"
    path.write_bytes(GOOD)
    assert GGUFFile.open(path).paths == [path]
    path.write_bytes(file_bytes([ARCHITECTURE, u32("split.no", 0), u32("split.count", 1)]))
    assert GGUFFile.open(path).paths == [path]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, 8)
    paths[1].unlink()
    check_refusal(paths[0], "expected 8 shards", "missing: big-00002-of-00008.gguf")
    check_refusal(paths[1], "no such file")
    for path in paths[2:]:
        path.unlink()
    assert len(check_refusal(paths[0], "and 3 more")) < 400


def test_a_shard_that_is_there_twice_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    shutil.copy(paths[1], paths[2])
    message = check_refusal(paths[1], "split.no 1 is there more than once")
    assert paths[2].name in message


def test_shards_that_do_not_fit_their_names(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, numbers=[1, 0, 2])
    check_refusal(paths[0], "split.no is 1, expected 0")
    paths = write_shards(tmp_path, total=9)
    check_refusal(paths[0], "split.tensors.count is 9", "hold 3 tensors")
    paths = write_shards(tmp_path)
    (tmp_path / "whole.gguf").write_bytes(paths[1].read_bytes())
    check_refusal(tmp_path / "whole.gguf", "split.count is 3", "-NNNNN-of-NNNNN.gguf")
    write_shards(tmp_path, 4)[0].rename(paths[0])
    check_refusal(paths[0], "split.count is 4, expected 3")
    paths[0].write_bytes(GOOD)
    check_refusal(paths[0], "metadata key split.no", "got nothing")


def test_a_tensor_in_two_shards_names_both(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, 2)
    keys = [u32("split.no", 1), u32("split.count", 2)]
    paths[1].write_bytes(file_bytes(keys, [entry("t0", [1], 0, 0)], bytes(4)))
    with pytest.raises(ModelError, match=f"{paths[1].name}: tensor t0 is in {paths[0].name} as well"):
        GGUFFile.open(paths[0])


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-4])
    with pytest.raises(
        ModelError, match=rf"{paths[2].name}: is cut off: tensor t2 needs 12 bytes .* present are 8"
    ):
        GGUFFile.open(paths[0])
