"""Decode over quantised caches on the CUDA device at hand, against float16: readers, tiles, parts, errors.

    python benchmarks/quantised.py --out FILE.json [--seconds 170]

Shape 96/8 heads of 128, one query. Times as in `decode.py`: graph replays over inputs beyond the level-2
cache. What matters most comes first, and nothing new is begun after `--seconds`: the file has what there was
time for. A variant that does not compile is a line with its error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from commit import commit
from decode import GLM, cache_bytes, tensors

from verify.kernels.cache_types import parse_cache
from verify.kernels.call import Call, checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.flash.tiles import Tiles
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.timing import input_sets, time_calls

LENGTHS = (8192, 32_768, 131_072, 16_384, 65_536)
CACHES = ("q8_0", "q4_0", "e4m3")
READERS = ("wide", "swapped", "chunks")


class Variant(NamedTuple):
    """One kernel: its cache, reader, tile of keys, warps, stages and parts (0: auto)."""

    cache: str
    reader: str = "chunks"
    keys: int = 64
    warps: int = 4
    stages: int = 4
    parts: int = 0

    def kernel(self) -> FlashKernel:
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        kv = KVCuts("parts", self.parts) if self.parts else KVCuts("auto", 0)
        options = TileOptions(plan=Plan(kv=kv, sms=sms))
        if self.cache == "f16":
            return FlashKernel("flash", options)
        tiles = Tiles(16, self.keys, self.warps, self.stages)
        cache = parse_cache(self.cache)
        return FlashKernel("flash", options, cache=cache, reader=self.reader, tiles=tiles)


def call_of(n_kv: int) -> Call:
    q, k, v = tensors(GLM, n_kv)
    kv_len = torch.full((1, 1), n_kv, dtype=torch.int32, device=q.device)
    return checked_call(q, k, v, kv_len=kv_len, scale=GLM.k_size**-0.5)


def share_of_f16(cache: str) -> float:
    one = parse_cache(cache)
    given = parse_cache("f16").bytes_a_token(GLM.kv, GLM.k_size, GLM.v_size)
    return one.bytes_a_token(GLM.kv, GLM.k_size, GLM.v_size) / given


def measured(variant: Variant, n_kv: int) -> dict[str, Any]:
    """us of a call, and the error relative to exact attention over what the cache holds (at 8,192 keys)."""
    line: dict[str, Any] = {**variant._asdict(), "n_kv": n_kv}
    try:
        calls = []
        size = cache_bytes(GLM, n_kv) * share_of_f16(variant.cache)
        for _ in range(input_sets(int(size))):
            kernel = variant.kernel()
            prepared = kernel.prepare(call_of(n_kv))
            assert prepared is not None
            assert variant.cache == "f16" or not prepared.expand
            # Keys and values as they were given are not read again.
            if prepared.planes is not None:
                few = {name: getattr(prepared.call, name)[:, :1].expand(-1, n_kv, -1, -1) for name in "kv"}
                prepared.call = replace(prepared.call, **few)
            calls.append(prepared.launch)
        line["us"] = time_calls(calls, replays=15).median_us
        line["parts_run"] = prepared.launches[0].slots
        if n_kv == 8192:
            call, kernel = call_of(n_kv), variant.kernel()
            due = exact_attention(kernel.held(call)).out
            line["error"] = float((kernel.run(call).out.double() - due).norm() / due.norm())
            line["f16_error"] = float((due - exact_attention(call).out).norm() / due.norm())
    except Exception as error:  # one that does not compile is a line of the table
        said = str(error).splitlines()[0][:160] if str(error) else ""
        line["failed"] = f"{type(error).__name__}: {said}"
    return line


def plan() -> list[tuple[Variant, int]]:
    """What is measured, the most important first."""
    lengths = LENGTHS[:3]
    todo = [(Variant("f16"), n) for n in lengths]
    # As it was: as many parts as float16 has.
    todo += [(Variant(cache, parts=16), n) for cache in ("q8_0", "q4_0") for n in lengths]
    todo += [
        (Variant(cache, reader), n)
        for reader in READERS
        for cache in CACHES
        for n in lengths
        if (cache, reader) != ("e4m3", "chunks")
    ]
    shapes = ((128, 4, 3), (128, 8, 3), (64, 4, 3), (32, 4, 4))
    todo += [
        (Variant(cache, reader, *shape), n)
        for shape in shapes
        for reader in ("wide", "swapped")
        for cache in CACHES
        for n in (32_768, 131_072)
    ]
    todo += [
        (Variant(cache, reader, parts=parts), n)
        for parts in (24, 32, 64)
        for reader in ("wide", "swapped")
        for cache in CACHES
        for n in lengths
    ]
    return (
        todo
        + [(Variant("f16"), n) for n in LENGTHS[3:]]
        + [(Variant(cache, reader), n) for reader in READERS[:2] for cache in CACHES for n in LENGTHS[3:]]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=170)
    arguments = parser.parse_args()
    begun = time.time()
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": str(GLM),
        "lines": [],
    }
    base: dict[int, float] = {}
    for variant, n_kv in plan():
        if time.time() - begun > arguments.seconds:
            result["stopped"] = f"after {arguments.seconds:g} s"
            break
        line = measured(variant, n_kv)
        if variant.cache == "f16" and "us" in line:
            base[n_kv] = line["us"]
        if "us" in line and n_kv in base:
            line["of_f16"] = base[n_kv] / line["us"]
        result["lines"].append(line)
        print(json.dumps(line), flush=True)
        # What was measured is kept, whatever the next one does.
        if arguments.out:
            arguments.out.write_text(json.dumps({**result, "seconds": time.time() - begun}, indent=1) + "\n")


if __name__ == "__main__":
    main()
