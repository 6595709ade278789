"""Tensors of a file as float32, a slice of rows at a time.

F32, F16, BF16 and the legacy block types that small models come in are decoded by torch; all others by the
`gguf` package, which is the oracle for these too (a test compares them bit by bit).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import gguf
import numpy as np
import torch

from model.errors import ModelError
from model.gguf_file import TENSOR_TYPES, GGUFFile

BLOCK = 32


def dequantize(
    file: GGUFFile, name: str, *, rows: slice | None = None, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """The tensor in float32, shape outermost first; `rows` selects along the first dimension.

    Raises ModelError if it is missing, or of a type that cannot be decoded.
    """
    raw = file.raw(name)
    info = file.tensors[name]
    shape = info.shape
    _, block, block_bytes = TENSOR_TYPES[info.type_id]
    by_row = raw.reshape(math.prod(shape[:-1]), shape[-1] // block * block_bytes)
    if rows is not None:
        if len(shape) == 1:
            raise ModelError(f"{file.path}: tensor {name} has one dimension, rows of it cannot be selected")
        each = math.prod(shape[1:-1])
        start, stop, _ = rows.indices(shape[0])
        by_row = by_row[start * each : stop * each]
        shape = (max(stop - start, 0), *shape[1:])
    if not by_row.size:
        return torch.empty(shape, device=device)
    decode = _DECODERS.get(info.type_name)
    if decode is not None:
        return decode(_tensor(by_row).to(device)).view(shape)
    try:
        values = gguf.quants.dequantize(by_row, gguf.GGMLQuantizationType(info.type_id))
    except NotImplementedError:
        raise ModelError(
            f"{file.path}: tensor {name}: type {info.type_name} cannot be decoded here"
        ) from None
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(shape).to(device)


def _tensor(raw: np.ndarray) -> torch.Tensor:
    """A view of the mapped file; torch warns that it must not be written to, which nothing here does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(raw)


def _plain(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def decode(raw: torch.Tensor) -> torch.Tensor:
        # A copy: what is handed out must not change with the file, nor be read-only.
        return raw.contiguous().view(dtype).to(torch.float32, copy=True)

    return decode


def _blocks(raw: torch.Tensor, block_bytes: int) -> torch.Tensor:
    return raw.reshape(-1, block_bytes)


def _halves(columns: torch.Tensor) -> torch.Tensor:
    """[blocks, 2] bytes as float16 [blocks, 1] in float32."""
    return columns.contiguous().view(torch.float16).float()


def _nibbles(quants: torch.Tensor) -> torch.Tensor:
    """[blocks, 16] bytes as [blocks, 32]: the low nibbles, then the high ones."""
    return torch.cat((quants & 15, quants >> 4), 1)


def _q4_0(raw: torch.Tensor) -> torch.Tensor:
    blocks = _blocks(raw, 18)
    return _halves(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).to(torch.int8) - 8).float()


def _q4_1(raw: torch.Tensor) -> torch.Tensor:
    blocks = _blocks(raw, 20)
    scaled = _halves(blocks[:, :2]) * _nibbles(blocks[:, 4:]).float()
    return scaled.add_(_halves(blocks[:, 2:4]))


def _q8_0(raw: torch.Tensor) -> torch.Tensor:
    blocks = _blocks(raw, 34)
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _halves(blocks[:, :2])


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F32": _plain(torch.float32),
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}
