"""Decode attention on the CUDA device at hand: our kernel, its plans, and other libraries, in one run.

    python benchmarks/decode.py --out benchmarks/results/decode.json [--only SECTION,...]

Every time is a CUDA-graph replay over inputs that together exceed the level-2 cache
(`verify.kernels.timing`); GB/s counts K and V once; shares are of the read bandwidth measured in the same
run, over a tensor of 4 GB; `of_plain_read` is the time of a plain reduction over as many bytes, over that of
the kernel. Errors are 2-norms over those of float64.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from commit import commit
from peers import PEERS

from verify.kernels.cache_types import bits_per_number
from verify.kernels.call import checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.heads import Heads
from verify.kernels.registry import build_kernel
from verify.kernels.timing import Timing, input_sets, read_bandwidth, read_time, time_calls

LONG = (8192, 16_384, 32_768, 65_536, 131_072)


GLM = Heads(96, 8, 128, 128)
MLA = Heads(20, 1, 576, 512)
SPLIT_MODE_GRAPH = (Heads(48, 4, 128, 128), Heads(24, 2, 128, 128), Heads(12, 1, 128, 128))
OTHERS = (Heads(32, 8, 128, 128), Heads(9, 3, 64, 64), Heads(4, 1, 256, 256))
# Plans tried for a shape where the best is looked for; `auto` fills the multiprocessors once.
PARTS = ("auto", "8", "16", "32", "64", "132")
GROUPINGS = (
    "heads=12",
    "heads=8+4",
    "heads=8+4,launch=views",
    "heads=8+4,launch=each",
    "heads=4+4+4",
    "heads=4+4+4,launch=each",
)


def tensors(shape: Heads, n_kv: int, rows: int = 1, needle: bool = False) -> tuple[torch.Tensor, ...]:
    """q [1, rows, Hq, Dk], k [1, n_kv, Hkv, Dk], v [1, n_kv, Hkv, Dv]; MLA's v is the head of k."""
    q = torch.randn(1, rows, shape.q, shape.k_size, device="cuda", dtype=torch.float16)
    k = torch.randn(1, n_kv, shape.kv, shape.k_size, device="cuda", dtype=torch.float16)
    if needle:
        # The key in the middle answers the first head of its group almost alone.
        k[0, n_kv // 2] = q[0, 0, :: shape.q // shape.kv] * 1.5
    v = k[..., : shape.v_size] if shape.v_size < shape.k_size else torch.randn_like(k)
    return q, k, v


def cache_bytes(shape: Heads, n_kv: int) -> int:
    width = shape.k_size if shape.v_size < shape.k_size else shape.k_size + shape.v_size
    return n_kv * shape.kv * width * 2


def flash_call(
    spec: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, path: str = "decode"
) -> Callable:
    kernel = build_kernel(spec)
    assert isinstance(kernel, FlashKernel), kernel.notes
    n_kv, rows = k.shape[1], q.shape[1]
    kv_len = torch.arange(n_kv - rows + 1, n_kv + 1, dtype=torch.int32, device="cuda")[None]
    scale = q.shape[3] ** -0.5
    prepared = kernel.prepare(checked_call(q, k, v, kv_len=kv_len, scale=scale, path=path))
    assert prepared is not None
    return prepared.launch


def timed(name: str, shape: Heads, n_kv: int, replays: int = 15) -> Timing | str:
    """Time of a kernel by its name, or why it has none."""
    calls = []
    try:
        for _ in range(input_sets(cache_bytes(shape, n_kv))):
            q, k, v = tensors(shape, n_kv)
            if name in PEERS:
                calls.append(PEERS[name](q, k, v, shape.k_size**-0.5))
            else:
                calls.append(flash_call(name, q, k, v))
        return time_calls(calls, replays=replays)
    except Exception as error:  # a peer that cannot run is a line of the table
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


class Bench:
    def __init__(self) -> None:
        self.begun = time.time()
        self.results: dict[str, Any] = {}
        self.read = 1.0

    def line(
        self, section: str, shape: Heads, n_kv: int, name: str, timing: Timing | str, **more: Any
    ) -> dict:
        size = cache_bytes(shape, n_kv)
        entry: dict[str, Any] = {"shape": str(shape), "n_kv": n_kv, "kernel": name, **more}
        if isinstance(timing, str):
            entry["failed"] = timing
        else:
            rate = size / timing.median_us / 1e3
            entry |= {
                "us": round(timing.median_us, 3),
                "low_us": round(timing.low_us, 3),
                "high_us": round(timing.high_us, 3),
                "gb_s": round(rate, 1),
                "share": round(rate / self.read, 4),
            }
        self.results.setdefault(section, []).append(entry)
        return entry

    def show(self, entry: dict[str, Any]) -> None:
        print(" ".join(f"{key} {value}" for key, value in entry.items()), flush=True)

    def bandwidth(self) -> None:
        found = read_bandwidth()
        self.read = found["read"]
        self.results["bandwidth_gb_s"] = {name: round(value, 1) for name, value in found.items()}
        print(self.results["bandwidth_gb_s"], flush=True)

    def glm(self) -> None:
        for n_kv in LONG:
            plain = read_time(cache_bytes(GLM, n_kv), 11)
            for name in ("flash:kv=auto", "sdpa:cudnn", "sdpa:flash", "flashinfer"):
                found = timed(name, GLM, n_kv, 21)
                more = {}
                if isinstance(found, Timing):
                    more = {
                        "plain_read_us": round(plain, 3),
                        "of_plain_read": round(plain / found.median_us, 4),
                    }
                self.show(self.line("glm", GLM, n_kv, name, found, **more))

    def flex(self) -> None:
        for n_kv in LONG:
            self.show(self.line("glm", GLM, n_kv, "flex", timed("flex", GLM, n_kv, 7)))

    def best(self, section: str, shape: Heads, n_kv: int, parts: tuple[str, ...] = PARTS) -> None:
        """The best of our plans against the best of the peers."""
        ours = {f"flash:kv={kv}": timed(f"flash:kv={kv}", shape, n_kv, 7) for kv in parts}
        theirs = {name: timed(name, shape, n_kv, 7) for name in ("sdpa:cudnn", "sdpa:flash")}
        clock = lambda t: math.inf if isinstance(t, str) else t.median_us  # noqa: E731
        us = {name: clock(timing) for name, timing in (ours | theirs).items()}
        mine, peer = min(ours, key=us.__getitem__), min(theirs, key=us.__getitem__)
        self.show(
            self.line(
                section, shape, n_kv, mine, ours[mine],
                peer=peer, speed_of_peer=round(us[peer] / us[mine], 3),
                all_us={name: round(value, 2) if value < math.inf else None for name, value in us.items()},
            )
        )  # fmt: skip

    def shapes(self) -> None:
        for shape in (*SPLIT_MODE_GRAPH, *OTHERS):
            for n_kv in (8192, 32_768, 65_536):
                self.best("shapes", shape, n_kv)

    def sweep(self) -> None:
        for size in (64, 80, 96, 128, 192, 256):
            for r in (1, 3, 4, 8, 12, 16, 24, 64):
                self.best("sweep", Heads(4 * r, 4, size, size), 32_768, ("auto", "16", "64"))
        for n_kv in (8192, 32_768):
            self.best("sweep", MLA, n_kv, ("auto", "32", "64"))

    def splits(self) -> None:
        for n_kv in LONG:
            for kv in ("auto", "16"):
                for grouping in GROUPINGS:
                    name = f"flash:{grouping},kv={kv}"
                    self.show(self.line("splits", GLM, n_kv, name, timed(name, GLM, n_kv, 7)))

    def errors(self) -> None:
        for family in ("gaussian", "needle"):
            for n_kv in (1024, 4096, 16_384, 65_536, 131_072):
                q, k, v = tensors(GLM, n_kv, needle=family == "needle")
                n = torch.tensor([[n_kv]], dtype=torch.int32, device="cuda")
                call = checked_call(q, k, v, kv_len=n, scale=GLM.k_size**-0.5)
                exact = exact_attention(call).out.flatten()
                found = {name: flash_call(name, q, k, v)().out for name in ("flash:kv=auto", "flash:kv=1")}
                found |= {
                    name: PEERS[name](q, k, v, GLM.k_size**-0.5)() for name in ("sdpa:cudnn", "sdpa:flash")
                }
                found["flash:kv=auto, rounded to f16"] = found["flash:kv=auto"].half()
                error = {
                    name: float((out.flatten().double() - exact).norm() / exact.norm())
                    for name, out in found.items()
                }
                entry = {
                    "family": family,
                    "n_kv": n_kv,
                    **{name: float(f"{e:.3g}") for name, e in error.items()},
                }
                self.results.setdefault("errors", []).append(entry)
                self.show(entry)

    def acc_f16(self) -> None:
        for n_kv in (2048, 8192, 32_768, 131_072):
            q, k, v = tensors(GLM, n_kv)
            n = torch.tensor([[n_kv]], dtype=torch.int32, device="cuda")
            exact = exact_attention(checked_call(q, k, v, kv_len=n, scale=GLM.k_size**-0.5)).out
            entry: dict[str, Any] = {"n_kv": n_kv}
            for kv in (1, 4, 16, 64):
                out = flash_call(f"flash:acc=f16,kv={kv}", q, k, v)().out
                entry[f"acc=f16,kv={kv}"] = float(
                    f"{float((out.double() - exact).norm() / exact.norm()):.3g}"
                )
            self.results.setdefault("acc_f16", []).append(entry)
            self.show(entry)
        for name in ("flash:kv=auto,acc=f16", "flash:kv=auto,p=f32", "flash:kv=auto,p=bf16"):
            self.show(self.line("options", GLM, 65_536, name, timed(name, GLM, 65_536, 7)))

    def window(self) -> None:
        """Every row of a window as if alone, and the same window by the prefill path."""
        rows = 8192
        q, k, v = tensors(GLM, rows, rows)
        useful = 4 * GLM.q * GLM.k_size * rows * (rows + 1) / 2
        for name, path in (("flash", "decode"), ("flash:kv=4", "decode"), ("flash", "prefill")):
            launch = flash_call(name, q, k, v, path)
            timing = time_calls([launch], replays=5)
            padded = useful * (16 / 12 if path == "decode" else 1)
            entry = {
                "rows": rows, "kernel": name, "path": path, "ms": round(timing.median_us / 1e3, 3),
                "tflop_s": round(useful / timing.median_us / 1e6, 1),
                "tflop_s_with_padding": round(padded / timing.median_us / 1e6, 1),
            }  # fmt: skip
            self.results.setdefault("window", []).append(entry)
            self.show(entry)
        by_head = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        from torch.nn.attention import SDPBackend, sdpa_kernel

        for name, backend in (
            ("sdpa:cudnn", SDPBackend.CUDNN_ATTENTION),
            ("sdpa:flash", SDPBackend.FLASH_ATTENTION),
        ):

            def call(backend: Any = backend) -> torch.Tensor:
                with sdpa_kernel([backend]):
                    return torch.nn.functional.scaled_dot_product_attention(
                        *by_head, is_causal=True, enable_gqa=True
                    )

            timing = time_calls([call], replays=5)
            entry = {
                "rows": rows, "kernel": name, "path": "prefill", "ms": round(timing.median_us / 1e3, 3),
                "tflop_s": round(useful / timing.median_us / 1e6, 1),
            }  # fmt: skip
            self.results["window"].append(entry)
            self.show(entry)
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
        product = time_calls([lambda: a @ a], replays=5)
        self.results["matrix_product_tflop_s"] = round(2 * 8192**3 / product.median_us / 1e6, 1)
        print("matrix product, TFLOP/s", self.results["matrix_product_tflop_s"])

    def cache(self) -> None:
        """Quantised caches, read by the kernel or expanded to float16 at every call, against float16."""
        f16 = {n: timed("flash:kv=auto", GLM, n, 7) for n in (8192, 65_536)}
        for n_kv, reference in f16.items():
            for cache in ("q8_0", "q4_0"):
                for expand, parts in (("fused", ("16", "33", "49", "66")), ("f16", ("auto",))):
                    names = [f"flash:kv={kv},cache={cache},expand={expand}" for kv in parts]
                    found = {name: timed(name, GLM, n_kv, 7) for name in names}
                    fine = {name: t for name, t in found.items() if isinstance(t, Timing)}
                    best = min(fine, key=lambda name: fine[name].median_us, default=names[0])
                    entry = self.line("cache", GLM, n_kv, best, found[best])
                    if best in fine and isinstance(reference, Timing):
                        us = fine[best].median_us
                        stored = cache_bytes(GLM, n_kv) / 16 * bits_per_number(cache)
                        entry |= {
                            "gb_s": round(stored / us / 1e3, 1),
                            "share": round(stored / us / 1e3 / self.read, 4),
                            "speed_of_f16": round(reference.median_us / us, 3),
                            "all_us": {name: round(t.median_us, 2) for name, t in fine.items()},
                        }
                    self.show(entry)

    def twice(self) -> None:
        """Two runs: the same bits."""
        q, k, v = tensors(GLM, 65_536)
        launch = flash_call("flash:kv=auto", q, k, v)
        first = launch()
        out, lse = first.out.clone(), first.lse.clone()
        same = all(
            torch.equal(again.out, out) and torch.equal(again.lse, lse)
            for again in (launch() for _ in range(20))
        )
        self.results["same_bits_in_21_runs"] = same
        print("same bits in 21 runs:", same)


SECTIONS = ("glm", "splits", "shapes", "errors", "acc_f16", "window", "twice", "cache", "sweep", "flex")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, in order")
    parser.add_argument("--seconds", type=float, default=540, help="begin no section after this many")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    bench = Bench()
    properties = torch.cuda.get_device_properties(0)
    bench.results["environment"] = {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": sys.version.split()[0],
        "commit": commit(),
        "command": "python " + " ".join(sys.argv),
    }
    print(bench.results["environment"], flush=True)
    bench.bandwidth()
    for section in args.only.split(","):
        if time.time() - bench.begun > args.seconds:
            print(f"{section}: left out, {args.seconds:.0f} s have passed", flush=True)
            continue
        getattr(bench, section)()
        print(f"-- {section}: {time.time() - bench.begun:.0f} s", flush=True)
        if args.out:
            args.out.write_text(json.dumps(bench.results, indent=1) + "\n")


if __name__ == "__main__":
    main()
