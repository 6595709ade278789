"""A GPU is woken where torch would use its first device, and nowhere else."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from verify.machine import waking


class Driver:
    """Stands for libcuda: notes what is called."""

    def __init__(self) -> None:
        self.answer = 0
        self.called: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.called.append((name, arguments[-1]))
            return self.answer

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(waking, "may_have_cuda", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    return made


def woken(device: str | None) -> bool:
    thread = waking.wake_gpu(device)
    if thread is not None:
        thread.join()
    return thread is not None


def test_the_first_device_gets_its_context(driver: Driver) -> None:
    for device in (None, "cuda", "cuda:0"):
        driver.called.clear()
        assert woken(device)
        assert driver.called == [("cuInit", 0), ("cuDevicePrimaryCtxRetain", 0)]


def test_nothing_is_woken_that_will_not_be_used(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not woken("cpu") and not woken("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert not woken(None)
    assert driver.called == []


def test_a_driver_that_fails_is_left_to_torch(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.answer = 999
    assert woken(None) and driver.called == [("cuInit", 0)]

    def absent(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert woken(None)
    monkeypatch.setattr(waking, "may_have_cuda", lambda: False)
    assert woken(None) and driver.called == [("cuInit", 0)]
