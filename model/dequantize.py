"""Stored weights to float32.

Plain types and the commonest block types are decoded in torch, on the device asked for; every other type that
the `gguf` package decodes is decoded by it, in numpy, and moved. Both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from model.errors import ModelError
from model.gguf_file import TENSOR_TYPES, GGUFFile, TensorInfo

PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Weights decoded at a time, so that what lies between the bytes and the result stays in a CPU's cache.
_TORCH_CHUNK = 1 << 19
_GGUF_CHUNK = 1 << 18


def dequantize(
    file: GGUFFile, name: str, *, rows: slice | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A tensor's weights, float32, in torch's order of dimensions; always memory of its own.

    rows: a slice of the first dimension, cut to its length as Python does; other rows are not read. Raises
    ModelError for a tensor that is not there or of a type that is not decoded, ValueError for rows with a
    step or of a tensor without dimensions.
    """
    info = file.tensor(name)
    if not type_is_supported(info.type_name):
        raise ModelError(f"{info.path}: tensor {name}: weights of type {info.type_name} are not decoded")
    if rows is None:
        return _decode(file.raw(name), info, device).view(info.shape)
    if not info.shape or rows.step not in (None, 1):
        raise ValueError(f"rows of {name}: expected a slice without a step of a tensor with rows, got {rows}")
    first, last, _ = rows.indices(info.shape[0])
    last = max(first, last)
    if len(info.shape) == 1 and info.type_name not in PLAIN_TYPES:
        # Its only row is one run of blocks, which begin where `rows` need not.
        return _decode(file.raw(name), info, device)[first:last].clone()
    row_bytes = info.n_bytes // info.shape[0] if info.shape[0] else 0
    data = file.raw(name)[first * row_bytes : last * row_bytes]
    return _decode(data, info, device).view(last - first, *info.shape[1:])


@cache
def type_is_supported(type_name: str) -> bool:
    """Whether weights of a type (`Q4_1`, as in TensorInfo.type_name) can be decoded."""
    if type_name in PLAIN_TYPES or type_name in _DECODERS:
        return True
    found = next((kind for kind in TENSOR_TYPES.values() if kind.name == type_name), None)
    if found is None:
        return False
    try:
        _by_gguf(np.zeros(found.block_bytes, np.uint8), type_name)
    except (KeyError, NotImplementedError):
        return False
    return True


def _decode(data: np.ndarray, info: TensorInfo, device: torch.device | str) -> torch.Tensor:
    """float32 [weights] of consecutive rows of a tensor, given their bytes."""
    if not data.size:  # no stride that torch could see other numbers in
        return torch.empty(0, dtype=torch.float32, device=device)
    if info.type_name not in PLAIN_TYPES and info.type_name not in _DECODERS:
        return torch.from_numpy(_by_gguf(data, info.type_name)).to(device)
    # torch warns of memory that cannot be written, as the file's map; a copy of the bytes costs little.
    stored = torch.from_numpy(data.copy()).to(device)
    if info.type_name in PLAIN_TYPES:
        return stored.view(PLAIN_TYPES[info.type_name]).to(torch.float32)
    return _by_torch(stored, info)


def _by_torch(stored: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    kind = TENSOR_TYPES[info.type_id]
    blocks = stored.view(-1, kind.block_bytes)
    out = torch.empty((blocks.shape[0], kind.block_size), dtype=torch.float32, device=stored.device)
    decode = _DECODERS[info.type_name]
    step = _TORCH_CHUNK // kind.block_size if stored.device.type == "cpu" else max(blocks.shape[0], 1)
    for first in range(0, blocks.shape[0], step):
        decode(blocks[first : first + step], out[first : first + step])
    return out.view(-1)


def _by_gguf(data: np.ndarray, type_name: str) -> np.ndarray:
    """float32 [weights] by the gguf package. Raises KeyError, NotImplementedError for types it has not."""
    import gguf  # here, because few models need it and it is slow to import

    kind = gguf.GGMLQuantizationType[type_name]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    n_blocks, step = data.size // block_bytes, _GGUF_CHUNK // block_size
    out = np.empty((n_blocks, block_size), dtype=np.float32)
    # Its decoders go row by row, which is slow where rows are short: a run of blocks is as good as a row.
    with np.errstate(all="ignore"):
        for first in range(0, n_blocks, step):
            run = data[first * block_bytes : (first + step) * block_bytes]
            out[first : first + step] = gguf.quants.dequantize(run, kind).reshape(-1, block_size)
    return out.reshape(-1)


def _halves(stored: torch.Tensor) -> torch.Tensor:
    """float32 of f16 numbers, [blocks, 2n] uint8 to [blocks, n]."""
    return stored.contiguous().view(torch.float16).to(torch.float32)


def _nibbles(stored: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The 4-bit numbers of [blocks, 16] bytes, written to out [blocks, 32]: low halves first, then high."""
    pairs = out.view(-1, 2, 16)
    pairs[:, 0] = stored & 15
    pairs[:, 1] = stored >> 4
    return out


# Each takes blocks [n, block_bytes] uint8 and fills out [n, block_size] float32. A product and a sum are two
# steps, two roundings, as in the gguf package; a fused multiply-add would be another number.


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """d * (q - 8): d f16, 32 q of 4 bits."""
    _nibbles(blocks[:, 2:], out).sub_(8).mul_(_halves(blocks[:, :2]))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """d * q + m: d, m f16, 32 q of 4 bits."""
    scales = _halves(blocks[:, :4])
    _nibbles(blocks[:, 4:], out).mul_(scales[:, :1]).add_(scales[:, 1:])


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """d * q: d f16, 32 q int8."""
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks[:, :2]))


_DECODERS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}
