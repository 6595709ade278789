"""Times tile sizes of the decode kernel on the device at hand: what `flash/tiles.py` was chosen by.

python benchmarks/tune_decode.py [--heads 96 --kv-heads 8 --head-size 128] [--n-kv 8192,65536] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch

from verify.kernels.call import checked_call
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.flash.tiles import Tiles, next_power_of_two, shared_bytes
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.timing import input_sets, read_bandwidth, time_calls


def calls_of(kernel: FlashKernel, heads: int, kv_heads: int, k_size: int, v_size: int, n_kv: int) -> list:
    """One captured call an input set."""
    size = n_kv * kv_heads * (k_size + v_size) * 2
    calls = []
    for _ in range(input_sets(size)):
        q = torch.randn(1, 1, heads, k_size, device="cuda", dtype=torch.float16)
        k = torch.randn(1, n_kv, kv_heads, k_size, device="cuda", dtype=torch.float16)
        v = k[..., :v_size] if v_size < k_size else torch.randn_like(k)
        kv_len = torch.tensor([[n_kv]], device="cuda", dtype=torch.int32)
        prepared = kernel.prepare(checked_call(q, k, v, kv_len=kv_len, scale=k_size**-0.5))
        calls.append(prepared.launch)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--heads", type=int, default=96)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", default="128")
    parser.add_argument("--n-kv", default="8192,32768,65536")
    parser.add_argument("--parts", default="16,33,49,66")
    parser.add_argument("--rows", help="of a tile; default: the fewest that hold a group")
    parser.add_argument("--keys", default="32,64,128")
    parser.add_argument("--warps", default="4,8")
    parser.add_argument("--stages", default="2,3,4,5,6")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = [int(x) for x in args.head_size.split("/")]
    k_size, v_size = sizes[0], sizes[-1]
    numbers = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    begun = time.time()
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    fewest = max(next_power_of_two(args.heads // args.kv_heads), 16)
    results = []
    bandwidth = read_bandwidth()
    print({name: round(value) for name, value in bandwidth.items()}, flush=True)
    for n_kv in numbers(args.n_kv):
        found = []
        for rows, keys, warps, stages, parts in itertools.product(
            *map(numbers, (args.rows or str(fewest), args.keys, args.warps, args.stages, args.parts))
        ):
            tiles = Tiles(rows, keys, warps, stages)
            if (
                shared_bytes(tiles, k_size, v_size, 2, v_size < k_size) > limit
                or time.time() - begun > args.seconds
            ):
                continue
            plan = Plan(kv=KVCuts("parts", parts), block=keys)
            kernel = FlashKernel("flash", TileOptions(plan=plan), tiles=tiles)
            try:
                timing = time_calls(
                    calls_of(kernel, args.heads, args.kv_heads, k_size, v_size, n_kv), replays=7
                )
            except Exception as error:
                print(tiles, parts, repr(error)[:200])
                continue
            found.append((timing.median_us, tuple(tiles), parts))
        found.sort()
        size = n_kv * args.kv_heads * (k_size if v_size < k_size else 2 * k_size) * 2
        for us, tiles, parts in found[:12]:
            print(
                f"n_kv {n_kv} {us:8.2f} us {size / us / 1e3:6.0f} GB/s"
                f" {size / us / 1e3 / bandwidth['read']:.3f} {tiles} parts {parts}"
            )
        results += [(n_kv, *line) for line in found]
        print(f"{time.time() - begun:.0f} s", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"bandwidth": bandwidth, "results": results}))


if __name__ == "__main__":
    main()
