"""What can run here is told without loading torch where torch could only say no."""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from verify.kernels import here


def absent(name: str) -> Any:
    raise OSError(name)


@pytest.mark.parametrize(
    ("version", "driver", "asked"),
    [
        ("2.13.0+cpu", True, False),
        ("2.13.0", False, False),
        ("2.13.0", True, True),
        ("2.13.0+rocm6.4", False, True),
    ],
)
def test_torch_is_asked_where_it_may_say_yes(
    version: str, driver: bool, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    monkeypatch.setattr(ctypes, "CDLL", (lambda name: None) if driver else absent)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(here, "_ask_torch", lambda: True)
    monkeypatch.delitem(sys.modules, "torch")
    assert here.has_cuda() == asked


@pytest.mark.parametrize("says", [True, False])
def test_torch_that_is_loaded_is_asked(says: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: says))
    monkeypatch.setitem(sys.modules, "torch", loaded)  # type: ignore[arg-type]
    monkeypatch.setattr(here, "_may_have_cuda", lambda: False)
    assert here.has_cuda() == says


def test_what_is_missing_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    monkeypatch.setattr(here.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(here, "has_cuda", lambda: True)
    assert here.why_not_flash() == "Triton is not installed"
    assert here.why_not_library("flash_attn") == "flash-attn is not installed"
    there |= {"triton", "flash_attn"}
    assert here.why_not_flash() is None and here.why_not_library("flash_attn") is None
    monkeypatch.setattr(here, "has_cuda", lambda: False)
    assert here.why_not_flash() == here.why_not_library("flash_attn") == "no CUDA device"
