"""How the oracle multiplies: what is chosen, and that what is chosen is what multiplies."""

from __future__ import annotations

import pytest
import torch

from verify.kernels import oracle_products
from verify.kernels.exact import exact_attention
from verify.kernels.int8_products import int8_bmm
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.oracle_products import (
    CLEARLY_FASTER,
    PRODUCTS,
    chosen_products,
    is_in_hardware,
    multiplying,
    products_in_use,
    quicker,
    timed_products,
)
from verify.kernels.registry import build_kernel

CPU = torch.device("cpu")


def test_a_cpu_has_float64_and_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(oracle_products, "time")
    timed_products.cache_clear()
    assert chosen_products("auto", CPU) == "float64" == products_in_use(CPU)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_name_is_itself(name: str) -> None:
    assert chosen_products(name, CPU) == name


def test_a_card_with_float64_in_hardware_cuts_nothing() -> None:
    """Half the rate of float32 or the same, and a 64th of it."""
    assert is_in_hardware(1e-3, 2e-3) and is_in_hardware(1e-3, 1e-3)
    assert not is_in_hardware(1e-3, 32e-3)


def test_slices_are_chosen_where_they_are_clearly_faster() -> None:
    assert quicker(CLEARLY_FASTER * 1e-3, 1e-3) == "int8"
    # What tensor cores with float64 could gain on paper, and what is slower.
    assert {quicker(1.4e-3, 1e-3), quicker(0.5e-3, 1e-3)} == {"float64"}


@pytest.mark.parametrize("spec", ["exact", "exact:acc=float64", "exact:acc=double-float32"])
def test_what_is_in_use_multiplies(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For attention that names none; a specification that does keeps its own."""
    calls: list[str] = []
    for name in PRODUCTS:

        def counted(
            a: torch.Tensor,
            b: torch.Tensor,
            name: str = name,
            product: oracle_products.Product = PRODUCTS[name],
        ) -> torch.Tensor:
            calls.append(name)
            return product(a, b)

        monkeypatch.setattr(oracle_products, "PRODUCTS", {**oracle_products.PRODUCTS, name: counted})
    monkeypatch.setattr("verify.kernels.exact.PRODUCTS", oracle_products.PRODUCTS)
    call = draw("gaussian", InputSizes(n_kv=(70,)), 0)
    asked = spec.partition("acc=")[2]
    build_kernel(spec).run(call)
    assert set(calls) == {asked or "float64"}
    calls.clear()
    with multiplying(CPU, "int8"):
        build_kernel(spec).run(call)
        assert set(calls) == {asked or "int8"}
        calls.clear()
        exact_attention(call)
        assert set(calls) == {"int8"}
    calls.clear()
    exact_attention(call)
    assert set(calls) == {"float64"}


def test_it_ends_with_what_began_it_and_is_of_one_kind_of_device() -> None:
    with pytest.raises(RuntimeError), multiplying(CPU, "int8"):
        assert products_in_use(CPU) == "int8"
        with multiplying(torch.device("cuda"), "double-float32"):
            assert products_in_use(CPU) == "int8"
        raise RuntimeError
    assert products_in_use(CPU) == "float64"
    with pytest.raises(KeyError), multiplying(CPU, "int4"):
        pass


def test_slices_are_int8_bmm() -> None:
    assert PRODUCTS["int8"] is int8_bmm
