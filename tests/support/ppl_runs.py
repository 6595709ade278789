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


def write_tiny(folder: Path) -> Tiny:
    return Tiny(write_tiny_model(folder / "tiny.gguf"), write_text(folder / "text.txt"))


def run(tiny: Tiny, out: Path, *more: str) -> tuple[Done, dict[str, Any]]:
    """`verify ppl` with windows of 64 tokens, 6 of them, and what its run.json says ({} if it wrote none)."""
    base = ["ppl", "-m", str(tiny.model), "-f", str(tiny.text), "-c", "64", "--chunks", "6"]
    done = verify(*base, "--device", "cpu", "--out", str(out), *more)
    written = out / "run.json"
    return done, json.loads(written.read_text()) if written.is_file() else {}
