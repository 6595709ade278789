"""A llama model rewritten into other shapes and architectures that compute the same function.

    python -m verify.model.dressing OUT.gguf --to glm4moe --experts halves \\
        --copies 4 --kv-heads 8 --live 0,4,7 --head-size 128

A small trained model then runs through the code of a large one (96 query heads over 8 KV heads of 128,
partial NEOX rotation, experts), and its perplexity is known beforehand. Tensors that nothing changes are
copied as they are stored; the others are written in float32, or in float16, which rounds them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import torch

from verify.model.dressing.reshape_feed_forward import FORMS, ExpertLayer, Experts, expert_layer
from verify.model.dressing.reshape_heads import HeadShape
from verify.model.errors import ModelError
from verify.model.gguf.dequantize import dequantize
from verify.model.gguf.file import GGUFFile
from verify.model.locate import locate_model

SOURCE = "llama"
TARGETS = ("llama", "qwen2", "glm4moe", "gpt-oss")
# A sink that takes no share of the softmax; -inf would be a broken file to whoever looks for those.
NO_SINK = -1e30
# More is a slip of the pen: tensors of that size are made in memory.
MOST_COPIES = 64
# Architectures whose rotation takes halves rather than neighbours.
_NEOX = ("qwen2", "glm4moe", "gpt-oss")
# What a target calls the norm before the feed-forward.
_FFN_NORM = {"glm4moe": "post_attention_norm", "gpt-oss": "post_attention_norm"}
_SIGMOID = 2


@dataclass(frozen=True)
class Dress:
    """What the model is rewritten into."""

    to: str = SOURCE  # architecture
    copies: int = 1  # of each query head
    kv_heads: int | None = None  # None: as they are
    live: tuple[int, ...] | None = None  # places of the original KV heads among them; None: the first
    head_size: int | None = None  # None: as it is
    experts: Experts = "dense"  # layout of the feed-forward
    dense_first: int = 1  # layers that keep a dense feed-forward before the ones with experts
    layers: int | None = None  # only the first so many are kept, another function of course; None: all
    dtype: str = "f32"  # type of the weights
    seed: int = 0  # of what is drawn
    idle: int = 0  # query heads a KV head beside the copies, whose answer nothing reads
    sink: float = NO_SINK  # gpt-oss: logit of every sink; by default it changes nothing
    window: int | None = None  # gpt-oss: keys that every second layer sees; None: more than there are

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise ModelError(f"--to {self.to}: expected one of: {', '.join(TARGETS)}")
        if self.experts not in FORMS:
            raise ModelError(f"--experts {self.experts}: expected one of: {', '.join(FORMS)}")
        allowed = {
            "llama": ("dense", "cancel"),
            "qwen2": ("dense",),
            "glm4moe": ("shared", "cancel", "halves"),
            "gpt-oss": ("clamped",),
        }[self.to]
        if self.to != "gpt-oss" and (self.sink != NO_SINK or self.window is not None):
            raise ModelError(f"--sink, --window: expected --to gpt-oss, {self.to} has neither")
        if self.window is not None and self.window < 1:
            raise ModelError(f"--window {self.window}: expected at least 1")
        if self.experts not in allowed:
            raise ModelError(f"--experts {self.experts}: expected {' or '.join(allowed)} for {self.to}")
        if self.dtype not in ("f32", "f16"):
            raise ModelError(f"--type {self.dtype}: expected f32 or f16")
        if self.copies > MOST_COPIES:
            raise ModelError(f"--copies {self.copies}: expected at most {MOST_COPIES}")


@dataclass(frozen=True)
class _Planned:
    """A tensor to be written; `make` gives its values when their turn comes, so that few are in memory."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    n_bytes: int
    make: Callable[[], np.ndarray]


def dress(source: str | Path, out: str | Path, to: Dress) -> Path:
    """Write the rewritten model and return its path. Raises ModelError."""
    return _Dressmaker(GGUFFile.open(source), to).write(Path(out))


class _Dressmaker:
    def __init__(self, file: GGUFFile, to: Dress) -> None:
        self.file, self.to = file, to
        if file.architecture != SOURCE:
            raise ModelError(
                f"{file.path}: general.architecture is {file.architecture!r}, expected {SOURCE!r}"
            )
        for odd in ("rope_freqs.weight", "blk.0.ffn_gate_inp.weight", "blk.0.attn_q.bias"):
            if odd in file.tensors:
                raise ModelError(f"{file.path}: tensor {odd}: a model that has it cannot be dressed")
        heads = self._number("attention.head_count")
        kv_heads = self._number("attention.head_count_kv")
        size = self._number("embedding_length") // heads
        if self.file.metadata.get(f"{SOURCE}.rope.dimension_count", size) != size:
            raise ModelError(f"{file.path}: heads that are rotated in part cannot be dressed")
        blocks = self._number("block_count")
        self.layers = blocks if to.layers is None else to.layers
        if not 1 <= self.layers <= blocks:
            raise ModelError(f"--layers {self.layers}: expected 1 to {blocks}, the layers of {file.path}")
        self.shape = HeadShape(
            heads=heads,
            kv_heads=kv_heads,
            size=size,
            copies=to.copies,
            all_kv_heads=to.kv_heads or kv_heads,
            live=to.live if to.live is not None else tuple(range(kv_heads)),
            new_size=to.head_size or size,
            neox=to.to in _NEOX,
            seed=to.seed,
            idle=to.idle,
        )
        self.kind = gguf.GGMLQuantizationType[to.dtype.upper()]
        # The tensors of a layer's experts are asked for one after another.
        self._experts = lru_cache(maxsize=1)(self._make_experts)

    def write(self, path: Path) -> Path:
        """Raises ModelError where the file would overwrite the model that it is made from."""
        if path.exists() and any(path.samefile(own) for own in self.file.paths):
            raise ModelError(f"{path}: is the model that would be dressed, expected another file to write")
        writer = gguf.GGUFWriter(path, self.to.to)
        self._write_metadata(writer)
        planned = [
            *self._copies("token_embd.weight", "output_norm.weight", "output.weight"),
            *(tensor for layer in range(self.layers) for tensor in self._layer(layer)),
        ]
        for tensor in planned:
            raw = tensor.kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
            dtype = np.dtype(np.float16 if tensor.kind == gguf.GGMLQuantizationType.F16 else np.float32)
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.uint8) if raw else dtype,
                tensor.n_bytes,
                raw_dtype=tensor.kind if raw else None,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(tensor.make())
        writer.close()
        return path

    def _number(self, key: str) -> int:
        return int(self.file.require(f"{SOURCE}.{key}", int))

    def _write_metadata(self, writer: gguf.GGUFWriter) -> None:
        shape, target = self.shape, self.to.to
        numbers: dict[str, Any] = {
            "block_count": self.layers,
            "attention.head_count": shape.all_heads,
            "attention.head_count_kv": shape.all_kv_heads,
            "attention.key_length": shape.new_size,
            "attention.value_length": shape.new_size,
            "rope.dimension_count": shape.size,
        }
        if self.to.experts != "dense":
            first = self._experts(self._dense_first)
            numbers |= {
                "expert_count": first.experts,
                "expert_used_count": first.used,
                "expert_feed_forward_length": first.size,
            }
        if target == "glm4moe":
            numbers |= {
                "expert_shared_count": first.shared,
                "expert_gating_func": _SIGMOID,
                "expert_weights_norm": True,
                "expert_weights_scale": float(first.scale),
                "leading_dense_block_count": self._dense_first,
                "nextn_predict_layers": 0,
            }
        if target == "gpt-oss":
            numbers["attention.sliding_window"] = self.to.window or self._number("context_length")
        for key, value in self.file.metadata.items():
            if key == "general.architecture":
                continue
            own = key.removeprefix(f"{SOURCE}.")
            if own == key:
                _add(writer, key, value)
            elif own not in numbers:
                _add(writer, f"{target}.{own}", value)
        for key, value in numbers.items():
            _add(writer, f"{target}.{key}", value)

    @property
    def _dense_first(self) -> int:
        """Layers without experts; llama has experts in all of them."""
        return self.to.dense_first if self.to.to == "glm4moe" else 0

    def _layer(self, layer: int) -> list[_Planned]:
        shape, prefix = self.shape, f"blk.{layer}."
        width = self._number("embedding_length")
        q_rows, kv_rows = shape.all_heads * shape.new_size, shape.all_kv_heads * shape.new_size

        def source(name: str) -> torch.Tensor:
            return dequantize(self.file, f"{prefix}{name}.weight")

        planned = [
            *self._copies(f"{prefix}attn_norm.weight"),
            self._made(
                f"{prefix}attn_q.weight", (q_rows, width), lambda: shape.query(source("attn_q"), layer)
            ),
            self._made(
                f"{prefix}attn_k.weight", (kv_rows, width), lambda: shape.key(source("attn_k"), layer)
            ),
            self._made(
                f"{prefix}attn_v.weight", (kv_rows, width), lambda: shape.value(source("attn_v"), layer)
            ),
            self._made(
                f"{prefix}attn_output.weight", (width, q_rows), lambda: shape.output(source("attn_output"))
            ),
        ]
        if self.to.to == "gpt-oss":
            sinks = partial(torch.full, (shape.all_heads,), self.to.sink)
            planned.append(self._made(f"{prefix}attn_sinks.weight", (shape.all_heads,), sinks))
            none = partial(torch.zeros, width)
            planned.append(self._made(f"{prefix}attn_output.bias", (width,), none))
        if self.to.to in ("qwen2", "glm4moe", "gpt-oss"):
            for name, rows in (("attn_q", q_rows), ("attn_k", kv_rows), ("attn_v", kv_rows)):
                planned.append(self._made(f"{prefix}{name}.bias", (rows,), partial(torch.zeros, rows)))
        norm = _FFN_NORM.get(self.to.to, "ffn_norm")
        planned += self._copies(f"{prefix}ffn_norm.weight", renamed=f"{prefix}{norm}.weight")
        if self.to.experts == "dense" or layer < self._dense_first:
            names = ("ffn_gate", "ffn_up", "ffn_down")
            return [*planned, *self._copies(*(f"{prefix}{name}.weight" for name in names))]
        for name, values in self._experts(layer).tensors.items():
            if self.to.to == "llama" and name == "exp_probs_b.bias":
                continue
            make = partial(self._expert_tensor, layer, name)
            planned.append(self._made(prefix + name, tuple(values.shape), make))
        return planned

    def _expert_tensor(self, layer: int, name: str) -> torch.Tensor:
        return self._experts(layer).tensors[name]

    def _make_experts(self, layer: int) -> ExpertLayer:
        gate, up, down = (
            dequantize(self.file, f"blk.{layer}.{name}.weight") for name in ("ffn_gate", "ffn_up", "ffn_down")
        )
        return expert_layer(self.to.experts, gate, up, down, seed=self.to.seed * 1009 + layer)

    def _copies(self, *names: str, renamed: str | None = None) -> list[_Planned]:
        """Tensors written as they are stored; one that the file does not have is left out."""
        planned = []
        for name in names:
            info = self.file.tensors.get(name)
            if info is None:
                continue
            kind = gguf.GGMLQuantizationType(info.type_id)
            shape = info.shape
            if kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
                shape = gguf.quant_shape_to_byte_shape(info.shape, kind)
            planned.append(_Planned(renamed or name, shape, kind, info.n_bytes, partial(self.file.raw, name)))
        return planned

    def _made(self, name: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> _Planned:
        """A tensor of new values. Vectors, and the router, stay float32 as engines expect."""
        small = len(shape) == 1 or "ffn_gate_inp" in name or name.endswith(".bias")
        kind = gguf.GGMLQuantizationType.F32 if small else self.kind
        dtype = np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return _Planned(name, shape, kind, n_bytes, lambda: np.ascontiguousarray(make().numpy(), dtype=dtype))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A metadata value with the type that its Python value asks for."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        bits = 32 if -(1 << 31) <= value < 1 << 32 else 64
        add = getattr(writer, f"add_{'u' if value >= 0 else ''}int{bits}")
        add(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 2 with one line on stderr."""
    about = (__doc__ or "").partition("\n")[0]
    parser = _Parser(prog="python -m verify.model.dressing", description=about)
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("-m", "--model", help="a llama GGUF file; the installed small model if not given")
    parser.add_argument("--to", default=SOURCE, help=f"architecture: {', '.join(TARGETS)}")
    parser.add_argument("--copies", type=int, default=1, help="copies of each query head")
    parser.add_argument("--kv-heads", type=int, help="KV heads, dead ones included")
    parser.add_argument("--live", help="places of the original KV heads, such as 0,4,7")
    parser.add_argument("--head-size", type=int, help="head size, padded with zeros")
    parser.add_argument("--idle", type=int, default=0, help="query heads a KV head that nothing reads")
    parser.add_argument("--sink", type=float, default=NO_SINK, help="gpt-oss: the logit of every sink")
    parser.add_argument("--window", type=int, help="gpt-oss: keys that every second layer sees")
    parser.add_argument("--experts", default="dense", help=f"the feed-forward: {', '.join(FORMS)}")
    parser.add_argument("--dense-first", type=int, default=1, help="layers before the first one with experts")
    parser.add_argument("--layers", type=int, help="keep only the first so many layers")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    parser.add_argument("--type", default="f32", help="type of what is rewritten: f32, or f16 (rounds it)")
    given = parser.parse_args(arguments)
    try:
        live = tuple(int(place) for place in given.live.split(",")) if given.live else None
        to = Dress(
            to=given.to,
            copies=given.copies,
            kv_heads=given.kv_heads,
            live=live,
            head_size=given.head_size,
            experts=given.experts,
            dense_first=given.dense_first,
            layers=given.layers,
            dtype=given.type,
            idle=given.idle,
            sink=given.sink,
            window=given.window,
        )
        source = locate_model(given.model)
        if given.out.exists() and not given.force and not given.out.samefile(source):
            raise ModelError(f"{given.out}: is there already, expected a new file (or --force)")
        path = dress(source, given.out, to)
    except OSError as error:
        print(f"error: {error.filename or given.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")
    return 0
