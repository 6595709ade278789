"""`verify ppl` on the tiny model, as tests run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from support.cli import Done, verify
from support.tiny_model import write_text, write_tiny_model


class Tiny(NamedTuple):
    model: Path
    text: Path


def write_tiny(folder: Path, **change: Any) -> Tiny:
    """change: see `write_tiny_model`."""
    return Tiny(write_tiny_model(folder / "tiny.gguf", **change), write_text(folder / "text.txt"))


def command(tiny: Tiny, out: Path, *more: str) -> list[str]:
    """Arguments of `verify ppl` with windows of 64 tokens, 6 of them."""
    model = [] if "-m" in more else ["-m", str(tiny.model)]
    text = [] if "-f" in more else ["-f", str(tiny.text)]
    return ["ppl", *model, *text, "-c", "64", "--chunks", "6", "--device", "cpu", "--out", str(out), *more]


def run(tiny: Tiny, out: Path, *more: str) -> tuple[Done, dict[str, Any]]:
    """The run of `command`, and what its run.json says ({} if it wrote none)."""
    done = verify(*command(tiny, out, *more))
    written = out / "run.json"
    return done, json.loads(written.read_text()) if written.is_file() else {}
