from __future__ import annotations

import pytest

from verify.kernels.errors import SpecError
from verify.kernels.plans.shapes import SHAPES, shape_named


def test_a_model_by_name() -> None:
    shape = shape_named("glm-4.5-air")
    assert (shape.q_heads, shape.kv_heads, shape.ratio, shape.k_size) == (96, 8, 12, 128)
    # K and V in float16, each key of each KV head once.
    assert shape.cache_bytes(1000) == 1000 * 8 * (128 + 128) * 2


def test_one_gpu_of_several_has_its_share_of_the_kv_heads() -> None:
    shape = shape_named("glm-4.5-air@4")
    assert (shape.q_heads, shape.kv_heads, shape.ratio) == (24, 2, 12)


def test_the_values_of_mla_lie_in_its_keys() -> None:
    shape = shape_named("glm-4.7-flash")
    assert shape.v_in_k
    assert shape.cache_bytes(10) == 10 * 576 * 2


def test_a_shape_by_its_numbers() -> None:
    assert shape_named("40/8x64").heads == (40, 8, 64, 64)
    assert shape_named("20/1x576/512").heads == (20, 1, 576, 512)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("glm-4.5-ari", "did you mean 'glm-4.5-air'"),
        ("glm-4.5-air@3", "8 KV heads cannot be shared out over '3' GPUs"),
        ("glm-4.5-air@many", "'many'"),
        ("10/3x64", "10 query heads do not divide among 3"),
        ("", "unknown shape"),
    ],
)
def test_shapes_that_are_none(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        shape_named(text)
    assert said in str(caught.value)


def test_every_shape_divides() -> None:
    for shape in SHAPES.values():
        assert shape.q_heads % shape.kv_heads == 0
