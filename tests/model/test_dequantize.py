"""Decoded weights: bit by bit against the decoders of others, blocks worked out by hand, and rows."""

from __future__ import annotations

import re
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from support.gguf_bytes import entry, file_bytes
from verify.model.errors import ModelError
from verify.model.gguf.dequantize import decode, dequantize, type_is_supported
from verify.model.gguf.file import GGUFFile
from verify.model.gguf.types import TENSOR_TYPES, TYPES_BY_NAME

STANDARD = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
]  # fmt: skip
IK = [
    "Q6_0", "IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K", "IQ2_KS", "IQ3_KS", "IQ4_KS", "IQ5_KS", "IQ4_KSS",
    "IQ2_KL", "IQ1_KT", "IQ2_KT", "IQ3_KT", "IQ4_KT",
]  # fmt: skip
PLAIN = ["F32", "F16", "BF16"]
NOT_WEIGHTS = ["I8", "I16", "I32", "I64", "F64"]
# A row of every type of ik_llama.cpp's with what its own CPU decoder makes of it, and a larger set.
ORACLE = Path(__file__).parent / "oracles/ik_types.npz"
LARGE_ORACLE = Path(__file__).parents[3] / "shared/data/tensor-types/ik_types.npz"
DOCUMENT = Path(__file__).parents[2] / "docs/tensor-types.md"
# A slice's ends, as [first:last].
ROWS = [slice(*ends) for ends in [(2, 5), (None, None), (4, None), (-1, None), (3, 3), (5, 2), (1, 99)]]
VIEWS = {"F32": np.float32, "F16": np.float16}
Stored = dict[str, tuple[np.ndarray, str]]
Write = Callable[[Stored], GGUFFile]


@pytest.fixture
def stored(tmp_path: Path) -> Write:
    """Writes tensors, name -> (array, type), and opens the file; block types as uint8 rows of bytes."""

    def write(tensors: Stored) -> GGUFFile:
        path = tmp_path / "weights.gguf"
        entries, data = [], b""
        for name, (array, kind) in tensors.items():
            number, found = next((i, found) for i, found in TENSOR_TYPES.items() if found.name == kind)
            sizes = list(reversed(array.shape))
            if found.block_size > 1 or kind == "BF16":
                sizes[0] = (sizes[0] - found.row_header) // found.block_bytes * found.block_size
            entries.append(entry(name, sizes, number, len(data)))
            data += array.tobytes() + bytes(-array.nbytes % 32)
        path.write_bytes(file_bytes([], entries, data))
        return GGUFFile.open(path)

    return write


def random_rows(kind: str, rows: tuple[int, ...], blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes of blocks, uint8 [*rows, bytes of a row]: every scale there is, NaN and infinity too."""
    found = TYPES_BY_NAME[kind]
    size = found.row_header + blocks * found.block_bytes
    return np.random.default_rng(seed).integers(0, 256, (*rows, size), dtype=np.uint8)


def expected_weights(raw: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, Kind[kind])


def check_same_bits(got: torch.Tensor, expected: np.ndarray) -> None:
    """Equal in every bit, but for which of the many NaNs a NaN is."""
    assert got.dtype == torch.float32 and got.device.type == "cpu" and got.is_contiguous()
    assert tuple(got.shape) == expected.shape
    values = got.numpy()
    assert np.array_equal(np.isnan(values), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(values[numbers].view(np.int32), expected[numbers].view(np.int32))


@pytest.mark.parametrize("kind", STANDARD)
def test_every_bit_is_as_in_the_gguf_package(stored: Write, kind: str) -> None:
    raw = random_rows(kind, (67,), 3)
    check_same_bits(dequantize(stored({"t": (raw, kind)}), "t"), expected_weights(raw, kind))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_every_half_is_as_in_the_gguf_package(kind: str) -> None:
    every = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    weights = decode(torch.from_numpy(every.copy()), kind, 1 << 16)
    check_same_bits(weights, expected_weights(every, kind).astype(np.float32))


def check_oracle(stored: Write, kind: str, path: Path) -> None:
    number = next(i for i, found in TENSOR_TYPES.items() if found.name == kind)
    with np.load(path) as held:
        raw = held[f"{number}_{kind.lower()}_bytes"]
        expected = held[f"{number}_{kind.lower()}_float32"]
    check_same_bits(dequantize(stored({"t": (raw, kind)}), "t"), expected)


@pytest.mark.parametrize("kind", IK)
def test_every_bit_is_as_in_the_decoder_of_ik_llama_cpp(stored: Write, kind: str) -> None:
    check_oracle(stored, kind, ORACLE)


@pytest.mark.parametrize("kind", IK)
def test_more_rows_are_as_in_the_decoder_of_ik_llama_cpp(stored: Write, kind: str) -> None:
    if not LARGE_ORACLE.is_file():
        pytest.skip("the larger set of ik_llama.cpp's types is not beside this checkout")
    check_oracle(stored, kind, LARGE_ORACLE)


def test_no_type_is_left_out() -> None:
    """Every type that a file may have is in one of the lists above, and in the document."""
    lists = STANDARD + IK + PLAIN + NOT_WEIGHTS
    assert sorted(lists) == sorted(found.name for found in TENSOR_TYPES.values())
    decoded = [kind for kind in lists if type_is_supported(kind)]
    assert decoded == STANDARD + IK + PLAIN
    rows = re.findall(r"^\| ([A-Z0-9_]+) \|", DOCUMENT.read_text(), flags=re.M)
    assert sorted(rows) == sorted(decoded)


@pytest.mark.parametrize("kind", STANDARD + IK)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (1, 2), (5, 1)])
def test_a_block_does_not_depend_on_those_around_it(stored: Write, kind: str, rows: int, blocks: int) -> None:
    raw = random_rows(kind, (8,), 2)
    whole = dequantize(stored({"t": (raw, kind)}), "t").numpy()
    found = TYPES_BY_NAME[kind]
    part = np.ascontiguousarray(raw[:rows, : found.row_bytes(blocks * found.block_size)])
    expected = whole[:rows, : blocks * found.block_size]
    check_same_bits(dequantize(stored({"t": (part, kind)}), "t"), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "IQ2_KS"])
@pytest.mark.parametrize("chunk", [1, 1024, 1500])
def test_a_tensor_larger_than_what_is_decoded_at_a_time(
    stored: Write, monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int
) -> None:
    file = stored({"t": (random_rows(kind, (7,), 3), kind)})
    whole = dequantize(file, "t").numpy()
    monkeypatch.setattr("verify.model.gguf.dequantize.CPU_CHUNK", chunk)
    check_same_bits(dequantize(file, "t"), whole)


def test_blocks_worked_out_by_hand(stored: Write) -> None:
    nibbles = bytes(low | (15 - low) << 4 for low in range(16))
    half = struct.pack("<e", 0.5)
    q4_0 = np.frombuffer(half + nibbles, np.uint8)[None]
    q4_1 = np.frombuffer(half + struct.pack("<e", -3) + nibbles, np.uint8)[None]
    q8_0 = np.frombuffer(half + struct.pack("<32b", *range(-16, 16)), np.uint8)[None]
    file = stored({"a": (q4_0, "Q4_0"), "b": (q4_1, "Q4_1"), "c": (q8_0, "Q8_0")})
    up, down = list(range(16)), list(range(15, -1, -1))
    assert dequantize(file, "a").tolist() == [[0.5 * (q - 8) for q in up + down]]
    assert dequantize(file, "b").tolist() == [[0.5 * q - 3 for q in up + down]]
    assert dequantize(file, "c").tolist() == [[0.5 * q for q in range(-16, 16)]]


def test_plain_types(stored: Write) -> None:
    values = np.array([[1.5, -0.0, 65504.0], [2.0**-24, np.inf, 1 / 3]], dtype=np.float32)
    halves = values.astype(np.float16)
    shorts = torch.from_numpy(values).to(torch.bfloat16)
    file = stored(
        {
            "f32": (values, "F32"),
            "f16": (halves, "F16"),
            "bf16": (shorts.view(torch.uint8).numpy(), "BF16"),
        }
    )
    check_same_bits(dequantize(file, "f32"), values)
    check_same_bits(dequantize(file, "f16"), halves.astype(np.float32))
    check_same_bits(dequantize(file, "bf16"), shorts.float().numpy())


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_0", "Q8_0", "Q4_K", "IQ3_S", "IQ2_KS", "IQ1_KT"])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_those_of_the_whole(stored: Write, kind: str, rows: slice) -> None:
    blocks = 2 if kind != "F32" else 8
    matrix, cube = random_rows(kind, (6,), blocks), random_rows(kind, (6, 3), blocks, seed=1)
    if kind == "F32":
        matrix, cube = matrix.view(np.float32), cube.view(np.float32)
    file = stored({"matrix": (matrix, kind), "cube": (cube, kind)})
    for name in ("matrix", "cube"):
        whole = dequantize(file, name)
        check_same_bits(dequantize(file, name, rows=rows), whole[rows].numpy())


def test_rows_of_a_vector(stored: Write) -> None:
    plain, blocks = np.arange(64, dtype=np.float32), random_rows("Q8_0", (), 2)
    blocks[1::34] = 0x20  # small scales, no NaN
    file = stored({"plain": (plain, "F32"), "blocks": (blocks, "Q8_0")})
    assert dequantize(file, "plain", rows=slice(3, 6)).tolist() == [3, 4, 5]
    assert torch.equal(dequantize(file, "blocks", rows=slice(30, 35)), dequantize(file, "blocks")[30:35])


@pytest.mark.parametrize(("kind", "width"), [("F16", 512), ("Q4_1", 512), ("Q6_K", 512)])
def test_rows_are_read_without_the_others(tmp_path: Path, stored: Write, kind: str, width: int) -> None:
    """Of a file of 2^28 rows, 80 GB or more with a hole in it, a few rows are decoded."""
    number, found = next((i, found) for i, found in TENSOR_TYPES.items() if found.name == kind)
    row_bytes = width // found.block_size * found.block_bytes
    row = (
        random_rows(kind, (), width // found.block_size)
        if kind != "F16"
        else np.arange(1024).astype(np.uint8)
    )
    n_rows, at = 1 << 28, (1 << 28) - 3
    name = b"t"
    table = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, width, n_rows, number, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + table
    head += bytes(-len(head) % 32)
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(head)
        file.seek(len(head) + at * row_bytes)
        file.write(row.tobytes())
        try:
            file.truncate(len(head) + n_rows * row_bytes)
        except OSError as error:
            pytest.skip(f"this file system holds no such file: {error}")
    opened = GGUFFile.open(path)
    assert opened.tensors["t"].shape == (n_rows, width)
    tracemalloc.start()
    rows = dequantize(opened, "t", rows=slice(at, at + 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = row.view(np.float16).astype(np.float32) if kind == "F16" else expected_weights(row, kind)
    check_same_bits(rows[0], expected)
    assert not rows[1].any()
    assert peak < 32 << 20


def test_rows_that_cannot_be(stored: Write) -> None:
    file = stored({"t": (np.zeros((4, 2), np.float32), "F32")})
    with pytest.raises(ValueError, match="without a step"):
        dequantize(file, "t", rows=slice(0, 4, 2))
    with pytest.raises(ValueError, match="without a step"):
        dequantize(file, "t", rows=slice(None, None, -1))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q6_K"])
def test_the_result_is_memory_of_its_own(stored: Write, kind: str) -> None:
    raw = np.zeros_like(random_rows(kind, (4,), 256 if kind in ("F32", "F16") else 1))
    array = raw.view(np.float32) if kind == "F32" else raw.view(np.float16) if kind == "F16" else raw
    file = stored({"t": (array, kind)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = dequantize(file, "t")
        first.fill_(7)
        second = dequantize(file, "t", rows=slice(1, 3))
        second.fill_(7)
    assert not dequantize(file, "t").any()


def test_the_device_is_the_one_asked_for(stored: Write) -> None:
    kinds = ("F16", "Q4_1", "Q6_K")
    file = stored(
        {kind: (random_rows(kind, (2,), 2).view(VIEWS.get(kind, np.uint8)), kind) for kind in kinds}
    )
    for name in kinds:
        assert dequantize(file, name, device="meta").device.type == "meta"
        assert dequantize(file, name, device=torch.device("cpu")).device.type == "cpu"


def test_a_type_that_is_not_decoded_is_named(stored: Write) -> None:
    file = stored({"ids": (np.arange(4, dtype=np.int32), "I32")})
    with pytest.raises(ModelError, match=r"weights\.gguf: tensor ids: weights of type I32 are not decoded"):
        dequantize(file, "ids")


def test_a_tensor_that_is_not_there_is_named(stored: Write) -> None:
    file = stored({"t": (np.zeros(4, np.float32), "F32")})
    with pytest.raises(ModelError, match=r"weights\.gguf: tensor u is missing"):
        dequantize(file, "u")


def test_names_that_are_no_type() -> None:
    assert not any(type_is_supported(name) for name in ["Q4_0_R8", "IQ1_BN", "", "f32"])


@pytest.mark.parametrize("kind", STANDARD + IK + PLAIN)
def test_bytes_on_a_device_are_decoded_there(kind: str) -> None:
    found = TYPES_BY_NAME[kind]
    width = 4 * found.block_size
    meta = torch.empty(3 * found.row_bytes(width), dtype=torch.uint8, device="meta")
    weights = decode(meta, kind, width)
    assert weights.device.type == "meta" and weights.shape == (3 * width,)


def test_a_real_file_decodes_as_with_the_gguf_package(smollm: Path) -> None:
    file = GGUFFile.open(smollm)
    for name in ("token_embd.weight", "blk.0.attn_norm.weight", "blk.29.ffn_down.weight"):
        info = file.tensor(name)
        rows = slice(0, min(300, info.shape[0]))
        raw = file.raw(name).reshape(info.shape[0], -1)[rows]
        expected = expected_weights(raw, info.type_name).reshape(-1, *info.shape[1:])
        check_same_bits(dequantize(file, name, rows=rows), expected)
