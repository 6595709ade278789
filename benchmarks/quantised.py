"""Decode over quantised caches on the CUDA device at hand, against float16; and `kv=auto` against all parts.

    python benchmarks/quantised.py --out FILE.json [--seconds 90] [--sweep-seconds 60]

First `lines`: 96/8 heads of 128, one query, each cache with the reader that `flash` chooses and then with
Triton's; float16 also without the overlap of launches, and of one tile, which is what two launches take.
Then `sweep`: microseconds by parts, and what `kv=auto` takes over the best of 1 to 64. Times as in
`decode.py`: graph replays over inputs beyond the level-2 cache. What matters most comes first, and nothing is
begun after the seconds of a section: the file has what there was time for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from commit import gpu_run
from decode import GLM, MLA, cache_bytes, tensors

from verify.kernels.cache_types import AS_GIVEN, parse_cache
from verify.kernels.call import Call, checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.flash.launch import Prepared
from verify.kernels.flash.prepare import prepare
from verify.kernels.heads import Heads
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.timing import input_sets, time_calls

LENGTHS = (131_072, 32_768, 8192, 1024, 4096, 65_536, 16_384, 2048)
CACHES = ("q8_0", "q4_0", "e4m3")
SWEPT_LENGTHS = (1024, 4096, 16_384, 65_536)
SWEPT_SHAPES = (
    Heads(32, 8, 64, 64), MLA, Heads(16, 4, 256, 256), Heads(9, 3, 64, 64), Heads(4, 1, 256, 256),
    Heads(64, 1, 128, 128), Heads(8, 8, 128, 128), Heads(32, 8, 128, 128), GLM, Heads(128, 8, 128, 128),
    Heads(12, 1, 128, 128),
)  # fmt: skip
PARTS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)


def options_of(parts: int) -> TileOptions:
    """parts: 0 for `kv=auto`."""
    kv = KVCuts("parts", parts) if parts else KVCuts("auto", 0)
    return TileOptions(plan=Plan(kv=kv, sms=torch.cuda.get_device_properties(0).multi_processor_count))


def kernel_of(cache: str, reader: str = "auto", parts: int = 0, overlap: bool = True) -> FlashKernel:
    held = AS_GIVEN if cache == "f16" else parse_cache(cache)
    return FlashKernel("flash", options_of(parts), cache=held, reader=reader, overlap=overlap)


def call_of(shape: Heads, n_kv: int) -> Call:
    q, k, v = tensors(shape, n_kv)
    kv_len = torch.full((1, 1), n_kv, dtype=torch.int32, device=q.device)
    return checked_call(q, k, v, kv_len=kv_len, scale=shape.k_size**-0.5)


def share_of_f16(cache: str) -> float:
    one, f16 = (parse_cache(name).bytes_a_token(GLM.kv, GLM.k_size, GLM.v_size) for name in (cache, "f16"))
    return one / f16


def calls_ready(cache: str, shape: Heads, n_kv: int, **how: Any) -> list[Prepared]:
    """As many as have inputs beyond the level-2 cache."""
    size = int(cache_bytes(shape, n_kv) * share_of_f16(cache))
    found = []
    for _ in range(input_sets(size)):
        ready = kernel_of(cache, **how).prepare(call_of(shape, n_kv))
        assert ready is not None
        if cache != "f16":
            assert ready.planes is not None and not ready.expand
            # Keys and values as they were given are not read again.
            few = {name: getattr(ready.call, name)[:, :1].expand(-1, n_kv, -1, -1) for name in "kv"}
            ready.call = replace(ready.call, **few)
        found.append(ready)
    return found


def in_parts(ready: Prepared, parts: int) -> Prepared:
    """The same call in so many parts."""
    other = prepare(ready.call, options_of(parts), ready.tiles, overlap=ready.overlap)
    other.planes, other.expand = ready.planes, ready.expand
    return other


def timed(ready: list[Prepared], replays: int = 15) -> float:
    return round(time_calls([each.launch for each in ready], replays=replays).median_us, 3)


def errors(cache: str, n_kv: int) -> dict[str, Any]:
    """Relative to exact attention over what the cache holds; and of that, to exact over what was given."""
    call, kernel = call_of(GLM, n_kv), kernel_of(cache)
    due, given = exact_attention(kernel.held(call)), exact_attention(call).out
    found = kernel.run(call)
    return {
        "cache": cache,
        "n_kv": n_kv,
        "error": float((found.out.double() - due.out).norm() / due.out.norm()),
        "lse_error": float((found.lse.double() - due.lse).abs().max()),
        "cache_error": float((due.out - given).norm() / given.norm()),
    }


def measured(cache: str, n_kv: int, **how: Any) -> dict[str, Any]:
    line: dict[str, Any] = {"cache": cache, "n_kv": n_kv, **how}
    ready = calls_ready(cache, GLM, n_kv, **how)
    reader = "" if ready[0].planes is None else ready[0].planes.reader
    return line | {"reader": reader, "parts": ready[0].launches[0].slots, "us": timed(ready)}


def plan() -> list[tuple[str, int, dict[str, Any]]]:
    """What is measured, the most important first."""
    todo: list[tuple[str, int, dict[str, Any]]] = [
        (cache, n, {}) for n in LENGTHS for cache in ("f16", *CACHES)
    ]
    todo += [("f16", n, {"overlap": overlap}) for n in (64, 1024, 4096) for overlap in (True, False)]
    todo += [
        (cache, n, {"reader": reader})
        for n in LENGTHS[:3]
        for reader, caches in (("wide", ("q8_0", "e4m3")), ("chunks", ("q4_0", "q8_0")))
        for cache in caches
    ]
    return todo


def swept(cache: str, shape: Heads, n_kv: int) -> dict[str, Any]:
    ready = calls_ready(cache, shape, n_kv)
    chosen = ready[0].launches[0].slots
    # A quarter of the parts takes two to four times as long.
    parts = [p for p in sorted({*PARTS, chosen}) if chosen <= 4 * p and 64 * p <= max(n_kv, 64)]
    us = {p: timed([in_parts(each, p) for each in ready], replays=7) for p in parts}
    line = {"cache": cache, "shape": str(shape), "n_kv": n_kv, "auto": chosen}
    return line | {"over_best": round(us[chosen] / min(us.values()), 4), "us": us}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--sweep-seconds", type=float, default=60)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    result: dict[str, Any] = {
        **gpu_run(GLM),
        "lines": [],
        "sweep": [],
    }
    base: dict[int, float] = {}

    def run(section: str, seconds: float, todo: Sequence[Callable[[], dict[str, Any]]]) -> None:
        begun = time.time()
        for work in todo:
            if time.time() - begun > seconds:
                result[f"{section}_stopped"] = f"after {seconds:g} s"
                break
            try:
                line = work()
            except Exception as error:  # one that does not run is a line of the table
                line = {"failed": f"{type(error).__name__}: {error}"[:300]}
            if section == "lines" and "us" in line:
                if line["cache"] == "f16":
                    base.setdefault(line["n_kv"], line["us"])
                line["of_f16"] = round(base[line["n_kv"]] / line["us"], 4)
            result[section].append(line)
            print(json.dumps(line), flush=True)
            # What was measured is kept, whatever the next one does.
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    lines = [partial(measured, cache, n_kv, **how) for cache, n_kv, how in plan()]
    lines[12:12] = [partial(errors, cache, 8192) for cache in CACHES]
    run("lines", arguments.seconds, lines)
    sweep = [
        (c, s, n)
        for s in SWEPT_SHAPES
        for n in SWEPT_LENGTHS
        for c in (("f16", *CACHES) if s.k_size == s.v_size else ("f16",))
    ]
    run("sweep", arguments.sweep_seconds, [partial(swept, *one) for one in sweep])
    worst = max((x for x in result["sweep"] if "us" in x), key=lambda x: x["over_best"], default=None)
    print("worst of kv=auto:", json.dumps(worst))


if __name__ == "__main__":
    main()
