"""Weights decoded on a GPU: every bit as on the CPU, where the decoders of others are the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verify.model.gguf.dequantize import decode, type_is_supported
from verify.model.gguf.types import TYPES_BY_NAME

pytestmark = pytest.mark.cuda
DECODED = [name for name in TYPES_BY_NAME if type_is_supported(name)]


@pytest.mark.parametrize("kind", DECODED)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (67, 4)])
def test_every_bit_is_as_on_the_cpu(kind: str, rows: int, blocks: int) -> None:
    found = TYPES_BY_NAME[kind]
    width = blocks * found.block_size
    raw = np.random.default_rng(0).bytes(rows * found.row_bytes(width))
    stored = torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).copy())
    expected = decode(stored.clone(), kind, width)
    got = decode(stored.cuda(), kind, width)
    assert got.device.type == "cuda"
    got = got.cpu()
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int32), expected[~nan].view(torch.int32))


@pytest.mark.parametrize("kind", ["Q4_K", "IQ1_KT"])
def test_parts_decoded_one_after_another_are_as_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = TYPES_BY_NAME[kind]
    stored = torch.randint(0, 256, (64 * found.row_bytes(1024),), dtype=torch.uint8, device="cuda")
    whole = decode(stored, kind, 1024)
    monkeypatch.setattr("verify.model.gguf.dequantize.GPU_CHUNK", 5000)
    parts = decode(stored, kind, 1024)
    assert torch.equal(parts.view(torch.int32), whole.view(torch.int32))
