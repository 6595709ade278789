"""Headers of GGUF files: against the gguf package, and what is said of broken ones."""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from support.gguf_bytes import (
    ARCHITECTURE,
    GOOD,
    LIST,
    STRING,
    check_refusal,
    entry,
    file_bytes,
    key,
    text,
    u32,
    write_shards,
)
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile, shard_names
from verify.model.gguf.types import INTERLEAVED_IDS, TENSOR_TYPES, TYPES_BY_NAME

IK_TYPES = Path(__file__).parent / "oracles/ik_types.npz"


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GGUFFile]:
    def write_and_open(content: bytes) -> GGUFFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return GGUFFile.open(path)

    return write_and_open


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
    widths = {}
    with np.load(IK_TYPES) as rows:
        for name in rows.files:
            if name.endswith("_bytes"):
                number, kind = name.removesuffix("_bytes").split("_", 1)
                widths[int(number), kind.upper()] = rows[name].shape[1]
    ours = {(i, kind.name): kind.row_bytes(1024) for i, kind in TENSOR_TYPES.items() if i > 100}
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


def test_a_large_vocabulary(tmp_path: Path) -> None:
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
    file = GGUFFile.open(path)
    assert file.metadata["tokenizer.ggml.tokens"][262_143] == "word 262143"
    assert file.metadata["tokenizer.ggml.scores"][262_143] == 262_143


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


@pytest.mark.parametrize(
    ("type_id", "name"),
    [
        (202, "Q4_0_R8"),
        (212, "Q4_K_R4"),
        (230, "BF16_R16"),
        (339, "IQ4_K_R4"),
        (352, "IQ5_KS_R4"),
        (399, "Q8_K_R8"),
        (300, "a type"),
    ],
)
def test_row_interleaved_types_are_refused_by_name(tmp_path: Path, type_id: int, name: str) -> None:
    assert type_id in INTERLEAVED_IDS
    path = tmp_path / "interleaved.gguf"
    path.write_bytes(file_bytes([], [entry("t", [256, 8], type_id, 0)], bytes(1 << 14)))
    plain = name.rpartition("_R")[0]
    use = f"use the plain file, of {plain}" if plain in TYPES_BY_NAME else "use a file of a plain type"
    check_refusal(path, "tensor t", f"type {type_id} is {name} of ik_llama.cpp", "rows interleaved", use)


@pytest.mark.parametrize(
    ("type_id", "name"), [(15, "Q8_K"), (31, "Q4_0_4_4"), (41, "Q1_0"), (134, "IQ1_BN"), (151, "Q8_KV")]
)
def test_types_without_a_decoder_are_refused_by_name(tmp_path: Path, type_id: int, name: str) -> None:
    path = tmp_path / "refused.gguf"
    path.write_bytes(file_bytes([], [entry("t", [256, 8], type_id, 0)], bytes(1 << 14)))
    check_refusal(path, "tensor t", f"type {type_id} is {name}, which is not decoded")


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
    check_refusal(paths[0], "metadata key split.count", "got nothing")


def floats(name: str, *values: float) -> bytes:
    return key(name, LIST, struct.pack(f"<IQ{len(values)}f", 6, len(values), *values))


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ([], [u32("llama.block_count", 8)]),
        ([u32("llama.rope.dimension_count", 64)], [u32("llama.rope.dimension_count", 32)]),
        ([], [key("general.architecture", STRING, text("qwen3"))]),
        ([], [key("llama.block_count", STRING, text("7"))]),
        ([floats("llama.scale", 1.0, 2.0)], [floats("llama.scale", 1.0, 3.0)]),
        ([floats("llama.scale", 1.0, 2.0)], [floats("llama.scale", 1.0)]),
    ],
    ids=["number", "key of its own", "text", "type", "array", "length"],
)
def test_a_shard_that_contradicts_the_first_is_refused_by_key(
    tmp_path: Path, first: list[bytes], later: list[bytes]
) -> None:
    paths = write_shards(tmp_path, first=first, later=later)
    name = later[0][8 : 8 + int.from_bytes(later[0][:8], "little")].decode()
    with pytest.raises(ModelError, match=f"{paths[1].name}: metadata key {name} is .* in {paths[0].name}$"):
        GGUFFile.open(paths[2])
    # The same in every shard is no contradiction.
    same = later if first else [u32("llama.block_count", 7)]
    GGUFFile.open(write_shards(tmp_path, first=same if first else [], later=same)[1]).close()


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
