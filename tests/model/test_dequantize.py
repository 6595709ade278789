from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from model.dequantize import dequantize
from model.errors import ModelError
from model.gguf_file import GGUFFile

KINDS = [
    gguf.GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL")
]


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random bytes of a type; as float16 scales may be NaN there, exponents are kept below the largest."""
    rng = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if block == 1:
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        return gguf.quants.quantize(values, kind).view(np.uint8)
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    # The high byte of every float16 that a block may hold: 0x3f leaves 11 exponents below 2.
    for at in (1, 3, size - 1):
        raw[..., at] &= 0x3F
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_bit_equal_to_the_gguf_package(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    raw = random_blocks(kind, 6, 512)
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile.open(path)
    assert file.tensors["t"].shape == (6, 512)
    expected = gguf.quants.dequantize(raw, kind).astype(np.float32).reshape(6, 512)
    assert np.isfinite(expected).all()
    found = dequantize(file, "t")
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(expected))
    assert torch.equal(dequantize(file, "t", rows=slice(2, 5)), torch.from_numpy(expected[2:5]))
    assert dequantize(file, "t", rows=slice(5, 2)).shape == (0, 512)


def test_what_is_handed_out_can_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", np.ones((2, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile.open(path)
    dequantize(file, "t").zero_()
    assert dequantize(file, "t").sum() == 8


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile.open(path)
    with pytest.raises(ModelError, match="tensor nothing is missing"):
        dequantize(file, "nothing")
    with pytest.raises(ModelError, match="one dimension"):
        dequantize(file, "t", rows=slice(0, 1))
