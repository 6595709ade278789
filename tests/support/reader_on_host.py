"""`kernels/flash/reader.cu` on the CPU: compiled with g++ over stand-ins for the device's instructions."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verify.kernels.flash import compiled
from verify.kernels.flash.compiled import Asked, ReaderKind

HAS_COMPILER = shutil.which("g++") is not None
_STAND_IN = Path(__file__).with_name("reader_on_host.cpp")


@functools.cache
def library(kind: ReaderKind) -> ctypes.CDLL:
    """Has `launch(Asked*, x, y, z, late)`."""
    folder = Path(tempfile.mkdtemp(prefix="verify-reader-"))
    try:
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f'-DREADER="{compiled.SOURCES[-1]}"']
        macros = [f"-D{name}={value}" for name, value in kind.macros.items()]
        built = str(folder / "reader.so")
        subprocess.run([*command, *macros, "-o", built, str(_STAND_IN)], check=True)
        return ctypes.CDLL(built)
    finally:
        shutil.rmtree(folder)


class OnHost:
    """In the place of `compiled.Compiled`. late: copies come as late as the reader's waits allow."""

    asm = {"cubin": b"on the host"}  # noqa: RUF012
    late = False
    grids: list[tuple[int, ...]] = []  # noqa: RUF012

    def __init__(self, kind: ReaderKind, device: object) -> None:
        self._library = library(kind)

    def launch(self, grid: Sequence[int], asked: Asked) -> None:
        self.grids.append(tuple(grid))
        self._library.launch(ctypes.byref(asked), *grid, int(self.late))


def stand_in(monkeypatch: Any, *, late: bool = False) -> None:
    """From here on `reader=cuda` runs on CPU tensors."""
    monkeypatch.setattr(OnHost, "late", late)
    monkeypatch.setattr(OnHost, "grids", [])
    monkeypatch.setattr(compiled, "compiled", OnHost)
    monkeypatch.setattr(compiled, "why_not_on", lambda device: None)
    monkeypatch.setattr(compiled, "on_device", lambda q: True)
