from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from model.errors import ModelError
from model.gguf_file import GGUFFile


def write(path: Path, tensors: dict[str, np.ndarray], **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_uint16(key.replace("__", "."), value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path / "small.gguf", {"a": MATRIX, "b": MATRIX[0]}, answer=42)


def test_metadata_shapes_and_bytes(small: Path) -> None:
    file = GGUFFile.open(small)
    assert file.architecture == "llama"
    assert file.metadata["answer"] == 42
    assert file.tensors["a"].shape == (3, 4)
    assert file.tensors["a"].type_name == "F32"
    assert file.tensors["a"].n_elements == 12
    assert np.array_equal(file.raw("a").view(np.float32).reshape(3, 4), MATRIX)
    assert np.array_equal(file.raw("b").view(np.float32), MATRIX[0])


def test_values_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "kinds.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_int64("n", -5)
    writer.add_float64("x", 1.5)
    writer.add_bool("flag", True)
    writer.add_string("text", "Löwe")
    writer.add_array("words", ["a", "", "ü"])
    writer.add_array("numbers", [1, -2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile.open(path).metadata
    assert (found["n"], found["x"], found["flag"], found["text"]) == (-5, 1.5, True, "Löwe")
    assert found["words"] == ["a", "", "ü"]
    assert found["numbers"].tolist() == [1, -2, 3]


def shards(folder: Path, count: int = 3) -> list[Path]:
    return [
        write(
            folder / f"m-{i + 1:05d}-of-{count:05d}.gguf",
            {f"t{i}": MATRIX + i},
            split__no=i,
            split__count=count,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("opened", [0, 2])
def test_any_shard_opens_the_whole_model(tmp_path: Path, opened: int) -> None:
    paths = shards(tmp_path)
    file = GGUFFile.open(paths[opened])
    assert file.paths == paths
    assert sorted(file.tensors) == ["t0", "t1", "t2"]
    assert np.array_equal(file.raw("t2").view(np.float32).reshape(3, 4), MATRIX + 2)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[1].unlink()
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf: this shard of the model is missing"):
        GGUFFile.open(paths[0])


def test_a_doubled_shard_is_named(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf: metadata key split\.no is 1, expected 2"):
        GGUFFile.open(paths[0])


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    paths = shards(tmp_path, 2)
    write(paths[1], {"t0": MATRIX}, split__no=1, split__count=2)
    with pytest.raises(ModelError, match="tensor t0 is there twice"):
        GGUFFile.open(paths[0])


def test_a_shard_under_another_name_is_refused(tmp_path: Path) -> None:
    (path, *_) = shards(tmp_path)
    renamed = path.rename(tmp_path / "alone.gguf")
    with pytest.raises(ModelError, match=r"split\.count is 3"):
        GGUFFile.open(renamed)


def header(*, version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s)) + s.encode()


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"GGUF", "truncated: version at byte 4"),
        (header(version=1), "version is 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(tensors=2**60), "tensor count is 1152921504606846976, more than the rest"),
        (header(keys=2**40), "key count is"),
        (header(), "general.architecture is missing"),
        (header(keys=1, rest=struct.pack("<Q", 2**50) + bytes(50)), "length of metadata key 0"),
        (
            header(keys=1, rest=text("x") + struct.pack("<I", 99) + bytes(9)),
            "x has the unknown value type 99",
        ),
        (header(keys=1, rest=text("x") + struct.pack("<IIQ", 9, 4, 2**61)), "length of x is"),
        (header(keys=1, rest=text("x") + struct.pack("<IIQ", 9, 9, 0)), "x is an array of type 9"),
        (header(keys=2, rest=2 * ARCHITECTURE), "general.architecture is there twice"),
        (header(keys=1, rest=text("general.architecture") + struct.pack("<Id", 12, 1.0)), "expected str"),
        (header(tensors=1, keys=1, rest=ARCHITECTURE + tensor("t", [8])), "truncated: tensor t needs bytes"),
        (header(tensors=1, keys=1, rest=ARCHITECTURE + tensor("t", [8], 77)), "type id 77 is not known"),
        (header(tensors=1, keys=1, rest=ARCHITECTURE + tensor("t", [8], 216)), "row-interleaved type of ik"),
        (header(tensors=1, keys=1, rest=ARCHITECTURE + tensor("t", [8, 0])), "shape [0, 8]"),
        (header(tensors=1, keys=1, rest=ARCHITECTURE + tensor("t", [8] * 5)), "5 dimensions"),
        (header(tensors=1, keys=1, rest=ARCHITECTURE + tensor("t", [40], 2)), "multiple of 32 for Q4_0"),
        (header(tensors=1, keys=1, rest=ARCHITECTURE + tensor("t", [8], offset=7)), "offset 7"),
        (
            header(keys=2, rest=ARCHITECTURE + text("general.alignment") + struct.pack("<II", 4, 24)),
            "general.alignment is 24",
        ),
    ],
)
def test_files_that_lie_are_refused_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        GGUFFile.open(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    end = max(t.offset + t.n_bytes for t in GGUFFile.open(small).tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in range(0, end, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            GGUFFile.open(cut)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="is a folder"):
        GGUFFile.open(tmp_path)


def test_a_large_vocabulary_is_read_without_the_slow_reader(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token{i}" for i in range(262_144)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    started = time.process_time()
    assert len(GGUFFile.open(path).metadata["tokenizer.ggml.tokens"]) == 262_144
    # Not a benchmark: a reader that makes an object of every number needs ten seconds and more.
    assert time.process_time() - started < 5
