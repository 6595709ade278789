"""Quantised caches against the `gguf` package, to the bit, and against their own step."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from support.problems import problem
from verify.kernels.cache import FP4_VALUES, IQ4_NL_VALUES, dequantise, ggml_blocks, quantise, through_cache
from verify.kernels.cache_types import BLOCK, CACHE_TYPES, CacheSpec, bits_per_number, parse_cache
from verify.kernels.errors import SpecError
from verify.kernels.faults.altered import AlteredKernel
from verify.kernels.judging.readback import look
from verify.kernels.registry import build_kernel
from verify.model.gguf.decoders.legacy import q6_0

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


@pytest.mark.parametrize("cache_type", [name for name in CACHE_TYPES if name != "q6_0"])
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
        "q8_0": largest / 127 / 2, "q6_0": largest / 32, "q4_0": largest / 8, "q5_0": largest / 16,
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
    with pytest.raises(ValueError, match="cache: unknown type 'q6_k', expected one of f16, bf16, q8_0"):
        quantise(torch.zeros(1, 32), "q6_k")
    with pytest.raises(ValueError, match="q8_0 needs head sizes in multiples of 32, got 80"):
        quantise(torch.zeros(1, 80), "q8_0")


def test_q6_0_has_the_layout_that_models_are_read_in() -> None:
    """ik_llama.cpp's, which the `gguf` package does not have: the decoder of weights is the other opinion."""
    x = numbers()
    blocks = ggml_blocks(quantise(x, "q6_0")).view(-1, 26)
    decoded = q6_0(blocks)
    found = decoded.codes.float().reshape(len(blocks), BLOCK) * decoded.scale.reshape(-1, 1).float()
    assert torch.equal(found.view_as(x), dequantise(quantise(x, "q6_0")))
    assert bits_per_number("q6_0") * BLOCK / 8 == 26


@pytest.mark.parametrize(
    ("kind", "largest", "least"), [("e4m3", 448.0, 2.0**-9), ("e5m2", 57344.0, 2.0**-16)]
)
def test_fp8_keeps_its_numbers_saturates_and_underflows(kind: str, largest: float, least: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    every = codes.view(torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2).float()
    every = every[torch.isfinite(every)]
    assert every.max() == largest and every[every > 0].min() == least
    assert torch.equal(through_cache(every, kind), every)
    # Half-way to the next is as near as it gets: beyond the largest there is only the largest.
    edge = torch.tensor([largest, largest * 1.01, 3e38, -3e38, least / 2 * 1.01, least / 2 * 0.99])
    assert through_cache(edge, kind).tolist() == [largest, largest, largest, -largest, least, 0.0]


def test_a_scale_is_of_what_it_says() -> None:
    x = torch.randn(2, 6, 3, 64, generator=torch.Generator().manual_seed(0)) * 50
    x[:, 4:] = 1e4
    seen = torch.arange(6) < torch.tensor([[4], [6]])
    shapes = {"": [1, 1, 1, 1], "0.5": [1, 1, 1, 1], "tensor": [2, 1, 1, 1], "head": [2, 1, 3, 1]}
    for scale, shape in {**shapes, "token": [2, 6, 3, 1]}.items():
        kept = quantise(x, "e4m3", scale=scale, seen=seen)
        assert kept.scale is not None and list(kept.scale.shape) == shape
        found = dequantise(kept)
        if scale in ("tensor", "head"):
            # Keys that no row sees are no part of it: they saturate instead.
            assert found[0, 4:].max() < 1e3 < found[1, 4:].min()
            assert (kept.scale[0] * 448).amax() == x[0, :4].abs().amax()
    narrow = [float((through_cache(x[:, :4], "e4m3", scale=s) - x[:, :4]).norm()) for s in ("1", "token")]
    assert narrow[1] < narrow[0]


def test_nvfp4_rounds_to_the_nearest_number_of_its_block() -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 40)[:, None]
    for scale in ("", "tensor"):
        y = x.view(1, 40, 1, 64)
        kept = quantise(y, "nvfp4", scale=scale)
        assert kept.scale is not None and kept.factor is not None
        assert kept.scale.dtype == torch.float8_e4m3fn and kept.scale.shape[-1] == 64 // 16
        steps = kept.scale.float() * kept.factor
        table = torch.tensor([sign * value for value in FP4_VALUES for sign in (1, -1)])
        possible = steps[..., None, None] * table
        blocks = y.unflatten(-1, (-1, 16))
        nearest = (possible - blocks[..., None]).abs().amin(-1)
        error = (dequantise(kept).unflatten(-1, (-1, 16)) - blocks).abs()
        assert torch.allclose(error, nearest, rtol=1e-5, atol=1e-7)
    assert bits_per_number("nvfp4") == 4.5
    assert dequantise(quantise(torch.zeros(1, 32), "nvfp4")).abs().max() == 0
    # 2.5 and 5 lie between two codes: the even one.
    tie = torch.tensor([2.5, 5.0, -0.25, 0.75, 1.75, 6.0] + [0.0] * 10)
    assert dequantise(quantise(tie, "nvfp4"))[:6].tolist() == [2.0, 4.0, 0.0, 1.0, 2.0, 6.0]


def test_mla_fp8_is_656_bytes_a_token() -> None:
    x = torch.randn(5, 576, generator=torch.Generator().manual_seed(0)) * 3
    kept = quantise(x, "fp8_ds_mla")
    assert kept.scale is not None and kept.rope is not None
    stored = (kept.codes, kept.scale, kept.rope)
    assert sum(y[0].numel() * y.element_size() for y in stored) == 656
    found = dequantise(kept)
    assert torch.equal(found[:, 512:], x[:, 512:].bfloat16().float())
    error = (found - x)[:, :512].unflatten(-1, (4, 128)).abs()
    largest = x[:, :512].unflatten(-1, (4, 128)).abs().amax(-1, keepdim=True)
    assert bool((error <= x[:, :512].unflatten(-1, (4, 128)).abs() * 2.0**-4 + largest * 2.0**-18).all())
    # V is the latent part of K, alone or not.
    assert torch.equal(dequantise(quantise(x[:, :512], "fp8_ds_mla")), found[:, :512])
    assert parse_cache("fp8_ds_mla").bytes_a_token(1, 576, 512) == 656
    with pytest.raises(ValueError, match="fp8_ds_mla needs head sizes of 128 times a whole number"):
        quantise(torch.zeros(1, 64), "fp8_ds_mla")


def test_the_grammar_says_types_rotation_scales_and_layers() -> None:
    for text in ("f16", "q8_0/q4_0", "q4_0+rotate=mainline", "e4m3+scale=head", "q4_0/f16+rotate=64"):
        assert str(parse_cache(text)) == text
    both = parse_cache("q4_0+rotate=ik@0-1:q8_0@28-29:f16")
    assert str(both) == "q4_0+rotate=ik@0-1:q8_0@28-29:f16"
    assert [str(both.at(layer)) for layer in (None, 0, 1, 2, 29, 30)] == [
        "q4_0+rotate=ik", "q8_0", "q8_0", "q4_0+rotate=ik", "f16", "q4_0+rotate=ik",
    ]  # fmt: skip
    assert both.at(28).as_given and not both.as_given and CacheSpec().as_given
    assert str(parse_cache("q4_0@3:f16")) == "q4_0@3-3:f16"
    assert parse_cache("q8_0/q4_0").bytes_a_token(4, 128, 128) == 4 * (136 + 72)
    assert parse_cache("e4m3+scale=token").bytes_a_token(4, 128, 128) == 2 * 4 * (128 + 4)
    assert parse_cache("q4_0@0-0:q8_0").bytes_a_token(4, 128, 128, 0) == 2 * 4 * 136


def test_rotation_follows_the_rules_of_engines() -> None:
    def blocks(text: str, k: int, v: int) -> tuple[int, int]:
        return tuple(parse_cache(text).blocks(k, v))

    assert blocks("q4_0+rotate=mainline", 128, 128) == (128, 64)
    assert blocks("q4_0+rotate=mainline", 192, 128) == (64, 64)
    assert blocks("q4_0/f16+rotate=mainline", 256, 256) == (256, 0)
    assert blocks("q4_0+rotate=mainline", 80, 80) == (0, 0)
    assert blocks("f16+rotate=ik", 96, 96) == (32, 32)
    assert blocks("q8_0+rotate=ik", 576, 512) == (64, 64)
    assert blocks("q8_0+rotate=32", 128, 64) == (32, 32)
    assert blocks("q8_0", 128, 128) == (0, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("q4_2", "unknown type 'q4_2', did you mean 'q4_"),
        ("q8_0/", "unknown type ''"),
        ("q8_0+rotate=48", "rotate=48: expected mainline or ik, or a power of two"),
        ("q8_0+spin=1", "'spin=1': expected K"),
        ("q8_0+rotate=ik+rotate=ik", "'rotate=ik': expected K"),
        ("q8_0+scale=head", "scale=head: expected e4m3, e5m2 or nvfp4"),
        ("e4m3+scale=-1", "scale=-1: expected tensor, head, token or a number above 0"),
        ("nvfp4+scale=token", "nvfp4 has a scale for each 16"),
        ("q8_0@2-1:f16", "@2-1:f16: expected @FIRST-LAST:CACHE"),
        ("q8_0@1-3:f16@3-4:q4_0", "layer 3 is named twice"),
    ],
)
def test_what_is_no_cache_is_said_in_a_line(text: str, said: str) -> None:
    with pytest.raises(SpecError) as found:
        parse_cache(text)
    assert said in str(found.value) and repr(text) in str(found.value) and "\n" not in str(found.value)


def test_a_result_in_float16_has_no_numbers_as_small_as_a_bf16_cache_holds() -> None:
    """2^-24 is its least: what is lost below is the result's, and no other codec."""
    call = problem(dtype=torch.bfloat16)
    small = replace(call, k=call.k * 2.0**-20, v=call.v * 2.0**-20)
    seen = look(build_kernel("eager:cache=bf16,out=f16"), small)
    assert seen.fault is None and seen.v.kind == "bf16"
    # A value that is another one by more than that still shows.
    other = AlteredKernel(
        "altered", build_kernel("eager:cache=bf16,out=f16"), lambda c: replace(c, v=c.v + 2.0**-22)
    )
    assert look(other, small).fault is not None
