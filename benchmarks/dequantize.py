"""How fast stored weights become float32, type by type, beside a plain copy of the same bytes.

    python benchmarks/dequantize.py --device cpu [--types Q4_K,IQ1_KT] [--out FILE.json]
    python benchmarks/dequantize.py --device cuda --out benchmarks/results/h100-dequantize.json

Two shapes: an expert of GLM-4.5-Air, 1408 x 4096, and an embedding of 262,144 x 640 for the types whose
blocks divide its rows. The bytes are random and lie on the device; what is timed is `decode` of
verify.model.gguf.dequantize. F32 is not: its weights are the bytes.

On a GPU, inputs go round so that they are never in the level-2 cache. `seconds` is of calls one after
another, launches included, as a layer's weights are decoded; `device_seconds` is of the same calls replayed
as a CUDA graph. On a CPU there is one thread, seconds are of that thread (waiting for a shared core does not
count), and ours, the `gguf` package's numpy and the copy take turns; the least of each is kept.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from commit import commit

from verify.kernels.timing import input_sets, time_calls
from verify.machine.environment import describe, prepare_torch, prepare_variables
from verify.model.gguf.dequantize import decode, type_is_supported
from verify.model.gguf.file import GGUFFile
from verify.model.gguf.types import TYPES_BY_NAME

SHAPES = {"expert 1408 x 4096": (1408, 4096), "embedding 262144 x 640": (262_144, 640)}
VOCABULARY = 262_144
GPU_CALLS = 40


def random_bytes(type_name: str, rows: int, width: int) -> np.ndarray:
    size = TYPES_BY_NAME[type_name].row_bytes(width)
    return np.random.default_rng(0).integers(0, 256, (rows, size), dtype=np.uint8)


def by_gguf(raw: np.ndarray, type_name: str) -> Callable[[], object] | None:
    """The package's decoder, where it has the type."""
    if type_name not in gguf.GGMLQuantizationType.__members__:
        return None
    kind = gguf.GGMLQuantizationType[type_name]

    def call() -> object:
        with np.errstate(all="ignore"):
            return gguf.quants.dequantize(raw, kind)

    return call


def on_cpu(type_name: str, rows: int, width: int, repeats: int) -> dict[str, float]:
    """Seconds of each way, the least of `repeats` turns."""
    raw = random_bytes(type_name, rows, width)
    stored = torch.from_numpy(raw).view(-1)
    ways: dict[str, Callable[[], object] | None] = {
        "seconds": lambda: decode(stored, type_name, width),
        "gguf_seconds": by_gguf(raw, type_name),
        "copy_seconds": stored.clone,
    }
    found: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            if way is None:
                continue
            began = time.thread_time()
            way()
            spent = time.thread_time() - began
            if turn:  # the first turn makes tables
                found[name] = min(found.get(name, spent), spent)
    return found


def on_cuda(type_name: str, rows: int, width: int, repeats: int) -> dict[str, float]:
    """Seconds a call: the least of `repeats` runs of GPU_CALLS calls, and of replays of a CUDA graph."""
    one = torch.from_numpy(random_bytes(type_name, rows, width)).view(-1).cuda()
    sets = [one.clone() for _ in range(min(input_sets(one.nbytes), 64))]
    copies = [torch.empty_like(x) for x in sets]
    calls = [lambda x=x: decode(x, type_name, width) for x in sets]
    plain = [lambda x=x, y=y: y.copy_(x) for x, y in zip(sets, copies, strict=True)]
    found = {}
    count = max(GPU_CALLS * SHAPES["expert 1408 x 4096"][0] * 4096 // (rows * width), 3)
    for name, ways in (("seconds", calls), ("copy_seconds", plain)):
        best = float("inf")
        for _ in range(repeats + 1):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for i in range(count):
                ways[i % len(ways)]()
            torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - began) / count)
        found[name] = best
    # Results of a graph live as long as it does: a few calls.
    found["device_seconds"] = time_calls(calls[:4], replays=7).low_us / 1e6
    found["copy_device_seconds"] = time_calls(plain, replays=7).low_us / 1e6
    return found


def vocabulary_seconds(repeats: int) -> dict[str, float]:
    """Opening a file whose header holds a vocabulary of 262,144 words, with scores and types."""
    text = lambda raw: struct.pack("<Q", len(raw)) + raw  # noqa: E731
    list_of = lambda name, kind, raw: text(name) + struct.pack("<IIQ", 9, kind, VOCABULARY) + raw  # noqa: E731
    keys = [
        list_of(b"tokenizer.ggml.tokens", 8, b"".join(text(f"word {i}".encode()) for i in range(VOCABULARY))),
        list_of(b"tokenizer.ggml.scores", 6, np.arange(VOCABULARY, dtype="<f4").tobytes()),
        list_of(b"tokenizer.ggml.token_type", 5, np.ones(VOCABULARY, dtype="<i4").tobytes()),
    ]
    wall, thread = float("inf"), float("inf")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + b"".join(keys))
        for _ in range(repeats):
            began = time.perf_counter(), time.thread_time()
            GGUFFile.open(path).close()
            wall = min(wall, time.perf_counter() - began[0])
            thread = min(thread, time.thread_time() - began[1])
    return {"words": VOCABULARY, "seconds": thread, "wall_s": wall}


def line(type_name: str, shape: str, weights: int, n_bytes: int, found: dict[str, float]) -> dict[str, Any]:
    """A row of the results: rates in billions of weights a second, of which a float32 takes 4 bytes."""
    entry: dict[str, Any] = {"type": type_name, "shape": shape, "weights": weights, "bytes": n_bytes, **found}
    for name in ("seconds", "gguf_seconds", "device_seconds", "copy_seconds", "copy_device_seconds"):
        if name in found:
            entry[name.replace("seconds", "gweights_s")] = round(weights / found[name] / 1e9, 3)
    if "gguf_seconds" in found:
        entry["speed_of_gguf"] = round(found["gguf_seconds"] / found["seconds"], 2)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--types", help="names, with commas between; default: all that are decoded")
    parser.add_argument("--shapes", default="expert,embedding", help="of: expert, embedding")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prepare_variables()
    prepare_torch()
    torch.set_num_threads(1)
    measure = on_cuda if arguments.device == "cuda" else on_cpu
    names = arguments.types.split(",") if arguments.types else list(TYPES_BY_NAME)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "environment": describe(arguments.device),
        "vocabulary": vocabulary_seconds(arguments.repeats),
        "results": (results := []),
    }
    print(result["vocabulary"])
    for shape, (rows, width) in SHAPES.items():
        if shape.split()[0] not in arguments.shapes.split(","):
            continue
        for name in names:
            kind = TYPES_BY_NAME[name]
            if name == "F32" or not type_is_supported(name) or width % kind.block_size:
                continue
            found = measure(name, rows, width, arguments.repeats)
            results.append(line(name, shape, rows * width, rows * kind.row_bytes(width), found))
            shown = {key: value for key, value in results[-1].items() if not key.endswith("seconds")}
            print(" ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
