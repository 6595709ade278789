"""Attention shapes of models that people run, by name.

`NAME` is the whole model on one GPU, `NAME@N` one GPU of N in split mode graph, which shares the KV heads
out; `Hq/HkvxD` or `Hq/HkvxDk/Dv` is a shape by its numbers.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from verify.kernels.errors import SpecError, nearest
from verify.kernels.heads import Heads, OfHeads

_NUMBERS = re.compile(r"(\d+)/(\d+)x(\d+)(?:/(\d+))?")


class _ModelFields(NamedTuple):
    name: str
    heads: Heads
    sliding_window: int | None = None
    sinks: bool = False
    v_in_k: bool = False


class ModelShape(_ModelFields, OfHeads):
    """Heads of a model's layers; sliding_window and sinks where these have them.

    v_in_k: V is a view of the first v_size numbers of K (MLA).
    """

    __slots__ = ()

    def to_json(self) -> dict[str, object]:
        """As `verify plan --json` lists it."""
        sizes = {"k_size": self.k_size, "v_size": self.v_size}
        options = {"sliding_window": self.sliding_window, "sinks": self.sinks, "v_in_k": self.v_in_k}
        heads = {"q_heads": self.q_heads, "kv_heads": self.kv_heads}
        return {"name": self.name, **heads, **sizes, **options, "ratio": self.ratio}

    def cache_bytes(self, n_kv: int, item_size: int = 2) -> int:
        """Bytes of K and V that one row of n_kv keys reads, each once."""
        width = self.k_size if self.v_in_k else self.k_size + self.v_size
        return n_kv * self.kv_heads * width * item_size

    def __str__(self) -> str:
        size = str(self.k_size) if self.k_size == self.v_size else f"{self.k_size}/{self.v_size}"
        return f"{self.name} ({self.q_heads}/{self.kv_heads} heads, r = {self.ratio}, size {size})"


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("glm-4.5-air", Heads(96, 8, 128, 128)),
        ModelShape("glm-4.5", Heads(96, 8, 128, 128)),
        ModelShape("glm-4.7-flash", Heads(20, 1, 576, 512), v_in_k=True),
        ModelShape("llama-3-8b", Heads(32, 8, 128, 128)),
        ModelShape("qwen2.5-7b", Heads(28, 4, 128, 128)),
        ModelShape("smollm2", Heads(9, 3, 64, 64)),
        ModelShape("gemma-3", Heads(8, 4, 256, 256), sliding_window=1024),
        ModelShape("gemma-3-full", Heads(8, 4, 256, 256)),
        ModelShape("gpt-oss", Heads(64, 8, 64, 64), sliding_window=128, sinks=True),
        ModelShape("gpt-oss-full", Heads(64, 8, 64, 64), sinks=True),
        ModelShape("qwen3-30b-a3b", Heads(32, 4, 128, 128)),
        ModelShape("qwen3-235b-a22b", Heads(64, 4, 128, 128)),
        ModelShape("gemma-2-9b", Heads(16, 8, 256, 256), sliding_window=4096),
        ModelShape("gemma-2-9b-full", Heads(16, 8, 256, 256)),
        ModelShape("minimax-m2", Heads(48, 8, 128, 128)),
        # Layers that see all keys, and those with a window.
        ModelShape("step-3.5", Heads(64, 8, 128, 128)),
        ModelShape("step-3.5-window", Heads(96, 8, 128, 128), sliding_window=512),
        ModelShape("qwen3-next", Heads(16, 2, 256, 256)),
        ModelShape("qwen3.5-27b", Heads(24, 4, 256, 256)),
        ModelShape("qwen3.5-35b-a3b", Heads(16, 2, 256, 256)),
        ModelShape("qwen3.5-397b-a17b", Heads(32, 2, 256, 256)),
        ModelShape("gemma-4-31b", Heads(32, 4, 512, 512)),
        ModelShape("gemma-4-31b-window", Heads(32, 16, 256, 256), sliding_window=1024),
        ModelShape("deepseek-v3.2", Heads(128, 1, 576, 512), v_in_k=True),
        ModelShape("glm-5", Heads(64, 1, 576, 512), v_in_k=True),
        ModelShape("mistral-small-3", Heads(32, 8, 128, 128)),
        ModelShape("mistral-small-4", Heads(32, 1, 320, 256), v_in_k=True),
    )
}


def shape_named(text: str) -> ModelShape:
    """The shape of a name, a name and a number of GPUs, or numbers. Raises SpecError."""
    name, at, gpus = text.partition("@")
    if match := _NUMBERS.fullmatch(name):
        q, kv, k, v = (int(x) if x else 0 for x in match.groups())
        shape = ModelShape(name, Heads(q, kv, k, v or k))
    elif name in SHAPES:
        shape = SHAPES[name]
    else:
        known = ", ".join(SHAPES)
        raise SpecError(f"shape {text!r}: unknown shape{nearest(name, SHAPES)} (known: {known}, or 96/8x128)")
    if min(shape.q_heads, shape.kv_heads, shape.k_size, shape.v_size) < 1:
        raise SpecError(f"shape {text!r}: expected heads and head sizes from 1")
    if shape.q_heads % shape.kv_heads:
        raise SpecError(f"shape {text!r}: {shape.q_heads} query heads do not divide among {shape.kv_heads}")
    if not at:
        return shape
    if not gpus.isdecimal() or int(gpus) < 1 or shape.kv_heads % int(gpus):
        raise SpecError(f"shape {text!r}: {shape.kv_heads} KV heads cannot be shared out over {gpus!r} GPUs")
    n = int(gpus)
    return shape._replace(name=text, heads=shape.heads.with_kv(shape.kv_heads // n))
