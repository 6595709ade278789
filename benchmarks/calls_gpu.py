"""Decode over pages, with several query tokens, and of many sequences, on the CUDA device at hand.

    python benchmarks/calls_gpu.py --out FILE.json [--only SECTION,...] [--seconds 220]

Shape 96/8 heads of 128, float16. Times as in `decode.py`: graph replays over inputs that together exceed the
level-2 cache; shares are of the read bandwidth measured in the same run, with that of a copy beside it. Pages
are those of a pool in a drawn order. What matters most comes first, and nothing new is begun after
`--seconds`. What does not run is a line with its error.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from commit import gpu_run
from decode import GLM, cache_bytes

from verify.kernels.call import AttentionPath, Call, checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.flash.tiles import Tiles
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.timing import input_sets, read_bandwidth, time_calls

LENGTHS = (32_768, 131_072, 8192, 65_536, 16_384)
PAGES = (0, 16, 64, 1, 256)
SCALE = GLM.k_size**-0.5
# Tiles of 48 rows that are tried for four query tokens: rows, keys, warps, stages.
TILES = ((64, 64, 4, 3), (64, 64, 8, 3), (64, 32, 4, 4), (64, 64, 4, 4), (64, 128, 8, 2), (64, 64, 8, 4))
BATCH, SHORTEST, LONGEST = 32, 512, 32_768


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float16, device="cuda")


def pool(sequences: list[int], page: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k and v [P, page, Hkv, D], and the table of sequences of these lengths, pages in a drawn order."""
    counts = [-(-n // page) for n in sequences]
    k = numbers(sum(counts) + 5, page, GLM.kv, GLM.k_size)
    ids = torch.randperm(len(k), dtype=torch.int32, device="cuda")
    table = torch.full((len(counts), max(counts)), -1, dtype=torch.int32, device="cuda")
    first = 0
    for row, count in zip(table, counts, strict=True):
        row[:count] = ids[first : first + count]
        first += count
    return k, torch.randn_like(k), table


def one_sequence(n_kv: int, page: int = 0, n_q: int = 1, path: AttentionPath = "decode") -> Call:
    """The newest n_q tokens of a sequence of n_kv keys; page 0: no pages."""
    q = numbers(1, n_q, GLM.q, GLM.k_size)
    kv_len = torch.arange(n_kv - n_q + 1, n_kv + 1, dtype=torch.int32, device="cuda")[None]
    if not page:
        k, v = numbers(1, n_kv, GLM.kv, GLM.k_size), numbers(1, n_kv, GLM.kv, GLM.k_size)
        return checked_call(q, k, v, kv_len=kv_len, scale=SCALE, path=path)
    k, v, table = pool([n_kv], page)
    return checked_call(q, k, v, kv_len=kv_len, scale=SCALE, path=path, block_table=table)


def batch_lengths() -> list[int]:
    """Lengths of 32 sequences, evenly from the shortest to the longest, in a drawn order."""
    step = (LONGEST - SHORTEST) / (BATCH - 1)
    lengths = [round(SHORTEST + i * step) for i in range(BATCH)]
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0)).tolist()
    return [lengths[i] for i in order]


def many_sequences(page: int, *, packed: bool, n_q: int = 1) -> Call:
    """One token, or the n_q newest, of each of 32 sequences."""
    lengths = batch_lengths()
    rows = torch.tensor(lengths, dtype=torch.int32, device="cuda")[:, None]
    kv_len = rows - torch.arange(n_q - 1, -1, -1, dtype=torch.int32, device="cuda")
    q = numbers(BATCH, n_q, GLM.q, GLM.k_size)
    more: dict[str, Any] = {"scale": SCALE, "path": "several" if n_q > 1 else "decode"}
    if packed:
        starts = torch.arange(0, BATCH * n_q + 1, n_q, dtype=torch.int32, device="cuda")
        q, kv_len = q.flatten(0, 1), kv_len.flatten()
        more["cu_seqlens"] = starts
    if page:
        k, v, more["block_table"] = pool(lengths, page)
    else:
        k = numbers(BATCH, LONGEST, GLM.kv, GLM.k_size)
        v = torch.randn_like(k)
    return checked_call(q, k, v, kv_len=kv_len, **more)


def kernel_of(kv: str = "auto", tiles: Tiles | None = None) -> FlashKernel:
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return FlashKernel("flash", TileOptions(plan=Plan(kv=KVCuts.parse(kv), sms=sms)), tiles=tiles)


def flashinfer_launch(call: Call) -> Callable[[], object]:
    """FlashInfer's decode over the same pages."""
    import flashinfer

    assert call.block_table is not None
    page = call.k.shape[1]
    lengths = call.kv_len.flatten().tolist()
    counts = [-(-n // page) for n in lengths]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    indices = torch.cat([row[:count] for row, count in zip(call.block_table, counts, strict=True)])
    last = torch.tensor([n - (count - 1) * page for n, count in zip(lengths, counts, strict=True)])
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        torch.tensor(starts, dtype=torch.int32, device="cuda"), indices, last.int().cuda(), GLM.q, GLM.kv,
        GLM.k_size, page, q_data_type=call.q.dtype, kv_data_type=call.k.dtype, sm_scale=SCALE,
    )  # fmt: skip
    q = call.q.flatten(0, 1)
    return lambda: wrapper.run(q, (call.k, call.v))


class Bench:
    def __init__(self, out: Path | None, seconds: float) -> None:
        self.out, self.seconds, self.begun = out, seconds, time.time()
        self.bandwidth = {name: round(value, 1) for name, value in read_bandwidth().items()}
        self.result: dict[str, Any] = {
            **gpu_run(GLM),
            "bandwidth_gb_s": self.bandwidth,
            "lines": [],
        }
        self.us: dict[tuple[Any, ...], float] = {}
        print(self.bandwidth, flush=True)

    def late(self) -> bool:
        if time.time() - self.begun > self.seconds:
            self.result["stopped"] = f"after {self.seconds:g} s"
            return True
        return False

    def line(
        self,
        section: str,
        build: Callable[[], Callable[[], object]],
        size: int,
        *,
        beside: tuple[Any, ...] | None = None,
        sets: int | None = None,
        **what: Any,
    ) -> None:
        """One time. size: bytes of K and V that a call reads; beside: the line that it is held against."""
        if self.late():
            return
        entry: dict[str, Any] = {"section": section, **what}
        try:
            calls = [build() for _ in range(sets or input_sets(size))]
            timing = time_calls(calls, replays=11)
            rate = size / timing.median_us / 1e3
            entry |= {
                "us": round(timing.median_us, 2),
                "low_us": round(timing.low_us, 2),
                "high_us": round(timing.high_us, 2),
                "gb_s": round(rate, 1),
                "share_of_read": round(rate / self.bandwidth["read"], 4),
                "share_of_copy": round(rate / self.bandwidth["copy"], 4),
            }
            self.us[section, *what.values()] = timing.median_us
            if beside in self.us:
                entry["times_its_base"] = round(timing.median_us / self.us[beside], 4)
        except Exception as error:  # what does not run is a line of the table
            said = str(error).splitlines()[0][:160] if str(error) else ""
            entry["failed"] = f"{type(error).__name__}: {said}"
        self.keep(entry)

    def keep(self, entry: dict[str, Any]) -> None:
        self.result["lines"].append(entry)
        print(json.dumps(entry), flush=True)
        if self.out:
            # What was measured is kept, whatever the next one does.
            seconds = round(time.time() - self.begun, 1)
            self.out.write_text(json.dumps({**self.result, "seconds": seconds}, indent=1) + "\n")

    def flash(
        self, section: str, make: Callable[[], Call], size: int, kernel: FlashKernel, **more: Any
    ) -> None:
        def build() -> Callable[[], object]:
            prepared = kernel.prepare(make())
            assert prepared is not None
            return prepared.launch

        self.line(section, build, size, **more)

    def paged(self) -> None:
        """Pages against one tensor, one query token; FlashInfer over the same pages."""
        kernel = kernel_of()
        for pages, lengths in ((PAGES[:3], LENGTHS), (PAGES[3:], LENGTHS[:1])):
            for n_kv in lengths:
                size = cache_bytes(GLM, n_kv)
                for page in pages:
                    base = ("paged", "flash", n_kv, 0)
                    self.flash(
                        "paged", lambda n=n_kv, page=page: one_sequence(n, page), size, kernel, beside=base,
                        runs="flash", n_kv=n_kv, page=page,
                    )  # fmt: skip
                    if page in (16, 64):
                        self.line(
                            "paged", lambda n=n_kv, page=page: flashinfer_launch(one_sequence(n, page)), size,
                            beside=base, runs="flashinfer", n_kv=n_kv, page=page,
                        )  # fmt: skip

    def several(self) -> None:
        """n_q tokens in a call against one, and against n_q rows each by itself."""
        kernel = kernel_of()
        for n_kv in LENGTHS:
            size, base = cache_bytes(GLM, n_kv), ("several", n_kv, 1, 0)
            for n_q, page in ((1, 0), (4, 0), (4, 16), (2, 0), (8, 0), (16, 0)):
                if n_kv not in LENGTHS[:2] and n_q in (2, 8, 16):
                    continue
                path: AttentionPath = "decode" if n_q == 1 else "several"
                self.flash(
                    "several",
                    lambda n=n_kv, page=page, n_q=n_q, path=path: one_sequence(n, page, n_q, path),
                    size, kernel, beside=base, n_kv=n_kv, n_q=n_q, page=page,
                )  # fmt: skip
            if n_kv in LENGTHS[:2]:
                for tiles in TILES:
                    self.flash(
                        "tiles", lambda n=n_kv: one_sequence(n, 0, 4, "several"), size,
                        kernel_of(tiles=Tiles(*tiles)), beside=base, n_kv=n_kv, n_q=4, tiles=str(tiles),
                    )  # fmt: skip
                self.flash(
                    "alone", lambda n=n_kv: one_sequence(n, 0, 4, "decode"), size, kernel, beside=base,
                    n_kv=n_kv, n_q=4,
                )  # fmt: skip

    def batch(self) -> None:
        """32 sequences of unlike length: in rows of the batch, packed, in pages."""
        size = sum(cache_bytes(GLM, n) for n in batch_lengths())
        for kv in ("auto", "4", "size:2048", "size:4096", "8"):
            for page, packed in ((0, False), (16, False), (64, False), (16, True), (64, True), (0, True)):
                if kv != "auto" and (page, packed) not in ((16, False), (16, True)):
                    continue
                self.flash(
                    "batch", lambda page=page, packed=packed: many_sequences(page, packed=packed), size,
                    kernel_of(kv), sets=1, kv=kv, page=page, packed=packed, n_q=1,
                )  # fmt: skip
            if kv == "auto":
                self.line(
                    "batch", lambda: flashinfer_launch(many_sequences(16, packed=False)), size, sets=1,
                    runs="flashinfer", page=16,
                )  # fmt: skip
                self.flash(
                    "batch", lambda: many_sequences(16, packed=True, n_q=4), size, kernel_of(kv), sets=1,
                    kv=kv, page=16, packed=True, n_q=4,
                )  # fmt: skip

    def errors(self) -> None:
        """Errors relative to exact attention; whether a form has the bits of the plain call."""
        kernel = kernel_of()
        for n_kv in (8192, 32_768):
            if self.late():
                return
            call = one_sequence(n_kv, 16, 4, "several")
            due = exact_attention(call).out
            found = kernel.run(call)
            order = call.block_table[0].long()  # type: ignore[index]
            k, v = (x[order].flatten(0, 1)[None, :n_kv].contiguous() for x in (call.k, call.v))
            more = {"kv_len": call.kv_len, "scale": SCALE}
            plain = kernel.run(checked_call(call.q, k, v, path="several", **more))
            alone = kernel.run(checked_call(call.q, k, v, path="decode", **more))
            differ = (found.out - alone.out).abs()
            self.keep({
                "section": "errors", "n_kv": n_kv, "n_q": 4, "page": 16,
                "error": float((found.out.double() - due).norm() / due.norm()),
                "error_of_rows_alone": float((alone.out.double() - due).norm() / due.norm()),
                "bits_of_one_tensor": bool((found.out == plain.out).all()),
                "share_of_equal_bits_of_rows_alone": float((differ == 0).float().mean()),
                "notes": kernel.notes,
            })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="paged,several,batch,errors")
    parser.add_argument("--seconds", type=float, default=220)
    arguments = parser.parse_args()
    bench = Bench(arguments.out, arguments.seconds)
    for section in arguments.only.split(","):
        getattr(bench, section)()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
