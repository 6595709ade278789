"""Quantised caches against the `gguf` package, to the bit, and against their own step."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from verify.kernels.cache import IQ4_NL_VALUES, dequantise, ggml_blocks, quantise, through_cache
from verify.kernels.cache_types import BLOCK, CACHE_TYPES, bits_per_number

BY_GGUF = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")


def numbers() -> torch.Tensor:
    """Gaussian blocks of all magnitudes, and the awkward ones: zeros, ties, one sign, halves."""
    generator = torch.Generator().manual_seed(1)
    gaussian = torch.randn(200, 4 * BLOCK, generator=generator) * torch.logspace(-4, 4, 200)[:, None]
    tie = torch.tensor([3.0, -3.0] * (BLOCK // 2))
    positive = torch.arange(1.0, BLOCK + 1)
    halves = torch.cat((torch.tensor([127.0]), torch.arange(BLOCK - 1) + 0.5))
    awkward = torch.cat((torch.zeros(BLOCK), tie, positive, halves))
    return torch.cat((gaussian, awkward[None], -awkward[None])).to(torch.float16)


@pytest.mark.parametrize("cache_type", BY_GGUF)
def test_quantises_to_the_bytes_of_gguf(cache_type: str) -> None:
    kind = gguf.GGMLQuantizationType[cache_type.upper()]
    expected = gguf.quantize(numbers().float().numpy(), kind)
    assert np.array_equal(ggml_blocks(quantise(numbers(), cache_type)).numpy(), expected)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_dequantises_to_the_bits_of_gguf(cache_type: str) -> None:
    kind = gguf.GGMLQuantizationType[cache_type.upper()]
    expected = gguf.dequantize(ggml_blocks(quantise(numbers(), cache_type)).numpy(), kind)
    found = dequantise(quantise(numbers(), cache_type)).numpy()
    assert np.array_equal(found.view(np.uint32) << 1, expected.view(np.uint32) << 1)  # -0 is 0
    blocks = ggml_blocks(quantise(numbers(), cache_type))
    assert bits_per_number(cache_type) * numbers().shape[1] / 8 == blocks.shape[1]


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_errors_are_within_a_step(cache_type: str) -> None:
    """Half a step of the block, and a whole one at the end that a type cannot reach, plus d's rounding."""
    x = numbers().float().view(-1, BLOCK)
    found = dequantise(quantise(x, cache_type)).view(-1, BLOCK)
    largest = x.abs().amax(-1)
    span = x.amax(-1) - x.amin(-1)
    steps = {
        "q8_0": largest / 127 / 2, "q4_0": largest / 8, "q5_0": largest / 16,
        "q4_1": span / 15 / 2, "q5_1": span / 31 / 2, "iq4_nl": largest * 26 / 127,
    }  # fmt: skip
    allowed = steps[cache_type] + largest * 2.0**-10 + 2.0**-17
    assert bool(((x - found).abs().amax(-1) <= allowed).all())


def test_iq4_nl_keeps_numbers_of_its_table() -> None:
    table = torch.tensor(IQ4_NL_VALUES * 2, dtype=torch.float16)
    assert torch.equal(through_cache(table[None] / 64, "iq4_nl"), table[None] / 64)


def test_layout_follows_the_tensor() -> None:
    x = torch.randn(2, 5, 3, 64, dtype=torch.float16)
    found = quantise(x, "q5_1")
    assert found.codes.shape == x.shape and found.codes.dtype == torch.int8
    assert found.minimum is not None
    assert found.scale.shape == found.minimum.shape == (2, 5, 3, 2)
    alone = quantise(x[1, 4], "q5_1")
    assert torch.equal(dequantise(found)[1, 4], dequantise(alone))


def test_refuses_other_types_and_head_sizes() -> None:
    with pytest.raises(ValueError, match="cache: unknown type 'q6_k', expected one of q8_0"):
        quantise(torch.zeros(1, 32), "q6_k")
    with pytest.raises(ValueError, match="q8_0 needs head sizes in multiples of 32, got 80"):
        quantise(torch.zeros(1, 80), "q8_0")
