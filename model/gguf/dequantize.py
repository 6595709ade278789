"""Stored weights to float32, in two steps: the bytes of a tensor's rows (`GGUFFile.raw`), and their weights,
on the device where the bytes are (`decode`)."""

from __future__ import annotations

import numpy as np
import torch

from verify.model.errors import ModelError
from verify.model.gguf.decoders import DECODERS, ROW_DECODERS
from verify.model.gguf.file import GGUFFile
from verify.model.gguf.types import TYPES_BY_NAME

PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Weights decoded at a time: what lies between the bytes and the result should stay in a cache, and every step
# should take longer than it takes to start it.
CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 23


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
    width = info.shape[-1] if info.shape else 1
    if rows is None:
        return decode(_copied(file.raw(name), device), info.type_name, width).view(info.shape)
    if not info.shape or rows.step not in (None, 1):
        raise ValueError(f"rows of {name}: expected a slice without a step of a tensor with rows, got {rows}")
    wanted = range(*rows.indices(info.shape[0]))
    if len(info.shape) == 1 and info.type_name not in PLAIN_TYPES:
        # Its only row is one run of blocks, which begin where `rows` need not.
        whole = decode(_copied(file.raw(name), device), info.type_name, width)
        return whole[wanted.start : wanted.stop].clone()
    if len(info.shape) == 1:
        width = 1
    weights = decode(_copied(file.raw(name, wanted), device), info.type_name, width)
    return weights.view(len(wanted), *info.shape[1:])


def decode(stored: torch.Tensor, type_name: str, width: int) -> torch.Tensor:
    """float32 [rows * width], the weights of rows of `width` weights of a type that is supported.

    stored: their bytes, uint8 [rows * bytes of a row], contiguous, on the device where the weights are
    wanted. The weights are memory of their own, or for F32 the bytes' own.
    """
    kind = TYPES_BY_NAME[type_name]
    if not stored.numel():
        return torch.empty(0, dtype=torch.float32, device=stored.device)
    if type_name in PLAIN_TYPES:
        return stored.view(PLAIN_TYPES[type_name]).to(torch.float32)
    chunk = GPU_CHUNK if stored.device.type == "cuda" else CPU_CHUNK
    if type_name in DECODERS:
        decoder, blocks = DECODERS[type_name], stored.view(-1, kind.block_bytes)
        out = torch.empty((blocks.shape[0], kind.block_size), device=stored.device)
        step = max(chunk // kind.block_size, 1)
        for first in range(0, blocks.shape[0], step):
            decoder(blocks[first : first + step]).write(out[first : first + step])
        return out.view(-1)
    lines = stored.view(-1, kind.row_bytes(width))
    blocks_a_row = width // kind.block_size
    out = torch.empty((lines.shape[0], blocks_a_row, kind.block_size), device=stored.device)
    step = max(chunk // width, 1)
    for first in range(0, lines.shape[0], step):
        some = lines[first : first + step]
        blocks = some[:, kind.row_header :].reshape(-1, kind.block_bytes)
        scales = (
            some[:, : kind.row_header].clone().view({2: torch.float16, 4: torch.float32}[kind.row_header])
        )
        of_blocks = scales.to(torch.float32).repeat_interleave(blocks_a_row, dim=0)
        ROW_DECODERS[type_name](blocks, of_blocks).write(out[first : first + step].flatten(0, 1))
    return out.view(-1)


def type_is_supported(type_name: str) -> bool:
    """Whether weights of a type (`Q4_1`, as in TensorInfo.type_name) can be decoded."""
    return type_name in PLAIN_TYPES or type_name in DECODERS or type_name in ROW_DECODERS


def _copied(data: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """The bytes on a device. torch warns of memory that cannot be written, as a map; a copy is cheap."""
    return torch.from_numpy(data.copy()).to(device)
