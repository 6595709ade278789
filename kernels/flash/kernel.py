"""`flash`: our flash-attention kernel on CUDA; `eager` where it cannot run, and then it says so.

The device code is Triton (`device`). With TRITON_INTERPRET=1 set before Triton is imported, a
`FlashKernel` that is built directly interprets it on CPU tensors; `flash` itself never does.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.cache_types import AS_GIVEN, CacheSpec
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import ALL_FORMS, Capabilities
from verify.kernels.eager import (
    EagerKernel,
    over_cache,
    over_rotation,
    rounded_queries,
    with_fp8,
)
from verify.kernels.flash import compiled
from verify.kernels.flash.launch import Prepared, interpreted, shares_memory, tokens_wanted
from verify.kernels.flash.merge import combine
from verify.kernels.flash.prepare import FUSED_TYPES, check_supported, planes_of, prepare
from verify.kernels.flash.tiles import Tiles, choose_tiles, window_tiles
from verify.kernels.here import why_not_flash
from verify.kernels.kernel import Kernel, ReadyCall
from verify.kernels.merge import Merge
from verify.kernels.numbers import FP8_TYPES, MMA_KEYS, MMA_ROUNDINGS, U_F32_TENSOR_CORE, type_of
from verify.kernels.plans.asked import RowAsked
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.tile_options import AS_GIVEN_Q, TileOptions
from verify.kernels.stored import store
from verify.kernels.trace import NOTHING, Launched

FALLBACK_NOTE = "the CUDA kernel did not run: `flash` ran as `eager`, the same arithmetic in plain torch"
# Relative error of `device.tanh`: largest just above 0.25, where 1 - 2 / (exp(2 x) + 1) cancels.
U_TANH = 2.0**-19
# Compute capability from which Triton multiplies on tensor cores.
_TENSOR_CORES_FROM = (8, 0)
# Compute capability from which a dependent launch may begin while the one before it drains, and an engine
# copies tiles of tensors to shared memory.
_HOPPER = (9, 0)


class Filling(NamedTuple):
    """Programs of a kernel over quantised caches that one multiprocessor runs at once, by its registers and
    shared memory; and its `KVCuts.tiles_to_fill`: the faster it is, the more."""

    programs_a_sm: int
    tiles_to_fill: int


# Of Triton's by head size, on an H200: at 8,192 keys and 8 KV heads of 128 32 parts are best, from 32,768 on
# 49, of 8 to 64; of 64 and of 256 by the sweep in h200-sweep.json, where e4m3 at 64 wants twice the tiles.
FILLING = {64: Filling(4, 4), 128: Filling(3, 4), 256: Filling(2, 4)}
# A block alone takes 0.67 us for 64 keys of float16, 0.4 of q8_0 and q4_0, 0.27 of e4m3.
FILLING_COMPILED, FILLING_COMPILED_FP8 = Filling(compiled.BLOCKS_A_SM, 10), Filling(compiled.BLOCKS_A_SM, 20)


def filling(plan: Plan, shape: Shape, reader: str, cache: CacheSpec) -> Plan:
    """The plan with `kv=auto` by the programs of the kernel over quantised caches that run at once."""
    if plan.kv.mode != "auto":
        return plan
    size, fp8 = shape.k_size, {cache.k, cache.v} <= set(FP8_TYPES)
    if reader == "cuda":
        of = FILLING_COMPILED_FP8 if fp8 else FILLING_COMPILED
    else:
        of = FILLING.get(size, FILLING[128])
        of = of._replace(tiles_to_fill=8) if fp8 and size == 64 else of
    return replace(plan, kv=KVCuts("auto", of.tiles_to_fill), sms=plan.sms * of.programs_a_sm)


def reads_planes(call: Call, options: TileOptions) -> bool:
    """Whether the kernel that reads quantised caches itself has what this call asks for."""
    plain = call.softcap is None and call.sliding_window is None and call.alibi_slopes is None
    plain = plain and not call.has_forms
    shape = call.shape
    sizes = shape.k_size == shape.v_size and shape.k_size in (64, 128, 256)
    return plain and sizes and call.path == "decode" and (options.p, options.acc) == ("f16", "f32")


class Limits(NamedTuple):
    """Shared memory that a program may ask for, in bytes, and compute capability."""

    shared_bytes: int
    capability: tuple[int, int]


# Those of an H100: what the interpreter pretends to have.
NOMINAL_LIMITS = Limits(232_448, (9, 0))


@functools.cache
def _limits(index: int | None) -> Limits:
    """The limits of a CUDA device (None: the current one)."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    shared_bytes: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Limits(shared_bytes, (properties.major, properties.minor))


# Bfloat16 numbers that `weighted_values` writes an operand as, where the types of P and V differ.
_PIECES = {"bf16": 1, "f16": 2, "f32": 3}


# Of like calls the first is counted by what the device wrote, and each one after so many.
COUNTED_EVERY = 64
# Caches that are read a whole row at a time: 1.18 times float16's speed for q8_0 and 1.48 for e4m3 at 131,072
# keys on an H200, where chunks reach 0.98; for 4 bits chunks are faster (h200-quantised-readers.json).
WIDE_TYPES = ("q8_0", "e4m3")
# Those that the reader in CUDA C++ reads faster still, where it has what a call asks for.
COMPILED_TYPES = ("q8_0", "q4_0", "e4m3")
# Kinds of calls that are told apart; beyond, all are counted anew.
_MOST_TALLIES = 256
NOT_THE_PLAN = "the device did not run the plan of a call: what it wrote was counted, and is in the coverage"


@dataclass
class _Tally:
    """Like calls: how many there were, and what the last one that was counted launched."""

    calls: int = 0
    launched: Launched = NOTHING


class FlashKernel(Kernel):
    """The Triton kernel, on CUDA tensors (or interpreted, on CPU tensors).

    tiles: fixed tile sizes instead of those chosen by the device, for measurements; overlap: whether the
    combining launch may start early on devices that can do it.
    """

    as_if_alone = True

    def __init__(
        self,
        spec: str,
        options: TileOptions,
        *,
        cache: CacheSpec = AS_GIVEN,
        expand: str = "fused",
        reader: str = "auto",
        tiles: Tiles | None = None,
        overlap: bool = True,
    ) -> None:
        super().__init__(spec)
        self.options = options
        self.cache = cache
        self.expand = expand
        self.reader = reader
        self.tiles = tiles
        self.overlap = overlap
        self._shared_limit: int | None = None
        self._tallies: dict[Hashable, _Tally] = {}

    def prepare(self, call: Call) -> Prepared | None:
        """The call ready to be launched, many times if need be; None where no tile fits the device.

        Raises ValueError on a dtype, a head size or head groups that the kernel does not have.
        """
        options = self.options.with_plan(call.plan)
        new = not call.q.is_cuda or _limits(call.q.device.index).capability >= _HOPPER
        overlap = self.overlap and call.q.is_cuda and new
        planes, rotation = None, 0
        cache = self.cache.at(call.layer)
        if not cache.as_given:
            stored = store(call, cache)
            if self._has_planes(call, cache):
                planes = planes_of(stored.k, stored.v, self._reader(call, cache))
            call, rotation = stored.call, stored.rotation.v
        if options.q != AS_GIVEN_Q:
            call = replace(call, q=rounded_queries(call.q, options.q))
        fused = planes is not None and self.expand == "fused" and reads_planes(call, options)
        if fused:
            assert planes is not None
            options = replace(options, plan=filling(options.plan, call.shape, planes.reader, cache))
        tiles = self.tiles or self._tiles(call.q.device, call, options)
        if tiles is None:
            return None
        if fused:
            tiles = self.tiles or tiles._replace(warps=4, stages=4)
        prepared = prepare(
            call,
            options,
            tiles,
            self._window_tiles(call, tiles),
            overlap=overlap,
            copy_engine=new,
            cache_type=cache.k,
        )
        prepared.planes, prepared.expand, prepared.rotation = planes, not fused, rotation
        return prepared

    def _has_planes(self, call: Call, cache: CacheSpec) -> bool:
        """Whether there is a kernel that reads this cache itself."""
        shape = call.shape
        if call.has_forms or call.q.dtype != torch.float16 or shape.k_size % 64 or shape.v_size % 64:
            return False
        reader = self._reader(call, cache)
        kept = {cache.k, cache.v}
        if len(kept) > 1 and not (reader == "cuda" and kept <= set(COMPILED_TYPES)):
            return False
        if "e4m3" in kept:
            return reader != "chunks" and cache.scale != "token" and reads_planes(call, self.options)
        # Expanding reads scales as the chunks' kernel does.
        return cache.k in FUSED_TYPES and (reader == "chunks" or reads_planes(call, self.options))

    def _reader(self, call: Call, cache: CacheSpec) -> str:
        """Which kernel reads the cache: the fastest that has what the call asks for, unless one is named."""
        if self.expand != "fused":
            return "chunks"
        if self.reader == "cuda" and (reason := compiled.why_not(call)) is not None:
            self._note(f"reader=cuda did not run, but a reader of Triton: {reason}")
        elif self.reader != "auto":
            return self.reader
        elif not reads_planes(call, self.options):
            return "chunks"
        elif {cache.k, cache.v} <= set(COMPILED_TYPES) and compiled.why_not(call) is None:
            return "cuda"
        return "wide" if cache.k in WIDE_TYPES and reads_planes(call, self.options) else "chunks"

    def _fuses(self, call: Call, cache: CacheSpec, options: TileOptions) -> bool:
        """Whether the launch reads the cache itself."""
        has_it = self.expand == "fused" and not cache.as_given and self._has_planes(call, cache)
        return has_it and reads_planes(call, options)

    def run(self, call: Call) -> Result:
        check_supported(call)
        self.refuse_forms(call)
        if self.options.p in FP8_TYPES:
            return self._fall_back(call, f"{FALLBACK_NOTE} (it has no P of type {self.options.p})")
        if not call.q.is_cuda and not interpreted():
            return self._fall_back(call, f"{FALLBACK_NOTE} (tensors on {call.q.device})")
        from triton.runtime.errors import OutOfResources

        while True:
            prepared = self.prepare(call)
            if prepared is None:
                return self._fall_back(call, f"{FALLBACK_NOTE} ({self._too_small(call)})")
            tally = self._tally(prepared)
            written: list[torch.Tensor] | None = [] if tally.calls % COUNTED_EVERY == 0 else None
            try:
                output = prepared.launch(written)
                break
            except OutOfResources as error:
                if self.tiles is not None or error.name != "shared memory":
                    raise
                # The estimate of shared memory was too low for this device's code: ask for less.
                self._shared_limit = error.limit * error.limit // error.required - 1
        if written is not None:
            tally.launched, planned = prepared.launched(self.label(prepared), written)
            if not planned:
                self._note(NOT_THE_PLAN)
        tally.calls += 1
        for note in prepared.notes:
            self._note(note)
        return Result(output.out, output.lse, tally.launched)

    def _tally(self, prepared: Prepared) -> _Tally:
        """Of the calls that run the same code on rows of the same plans."""
        call = prepared.call
        key = (
            prepared.rows,
            self.label(prepared),
            call.q.dtype,
            call.q.device,
            call.sliding_window,
            call.softcap is None,
            call.sinks is None,
            call.alibi_slopes is None,
            shares_memory(call),
            prepared.forms.kind,
        )
        if key not in self._tallies and len(self._tallies) >= _MOST_TALLIES:
            self._tallies.clear()
        return self._tallies.setdefault(key, _Tally())

    def ready(self, call: Call) -> ReadyCall:
        launched = self.run(call).launched  # compiles, and finds what fits the device
        prepared = self.prepare(call)
        return super().ready(call) if prepared is None else ReadyCall(prepared.launch, launched)

    def label(self, prepared: Prepared) -> str:
        """The kernel's name in the launch trace, with everything that its arithmetic depends on."""
        options, tiles = prepared.options, prepared.tiles
        tile = "" if tiles.keys == options.plan.block else f",tile={tiles.keys}"
        if prepared.call.path == "several":
            # Products of more rows are another instruction, whose sums may be other bits.
            tile += f",rows={tiles.rows}"
        cache = ""
        kept = self.cache.at(prepared.call.layer)
        if not kept.as_given:
            fused = prepared.planes is not None and not prepared.expand
            cache = f",cache={kept},expand={'fused' if fused else 'f16'}"
            reader = prepared.planes.reader if fused and prepared.planes is not None else "chunks"
            cache += f",reader={reader}" if reader != "chunks" else ""
        return f"flash[{options.label}{tile}{cache}]"

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        """Of float16 inputs."""
        cache = self.cache.at(None)
        asked = shape.asked(path, cache.k)
        tiles = self.tiles or self._tiles_of(
            self._limit(None),
            shape,
            None if asked.prefill else asked.n_q,
            self.options.plan.block,
            item_size=2,
            v_is_k=False,
        )
        return self._arithmetic(self.options, shape, asked, tiles, torch.float16, cache)

    def arithmetic_of(self, call: Call) -> Arithmetic:
        options = self.options.with_plan(call.plan)
        tiles = self.tiles or self._tiles(call.q.device, call, options)
        cache = self.cache.at(call.layer)
        if self._fuses(call, cache, options):
            options = replace(
                options, plan=filling(options.plan, call.shape, self._reader(call, cache), cache)
            )
        return self._arithmetic(options, call.shape, call.asked(cache.k), tiles, call.q.dtype, cache)

    def _arithmetic(
        self,
        options: TileOptions,
        shape: Shape,
        row: RowAsked,
        tiles: Tiles | None,
        dtype: torch.dtype,
        cache: CacheSpec,
    ) -> Arithmetic:
        # `weighted_values` has one product of a tile where P is narrow, six where both operands are split;
        # float32 values go through float32 units, a key at a time.
        chained = MMA_ROUNDINGS * (1 if options.p != "f32" else 6)
        kind = type_of(dtype)
        values = options.p if kind is None or kind.name == "f32" else kind.name
        plain = Arithmetic(
            p=options.p,
            out=options.out,
            acc=options.acc,
            # Tensor cores truncate where float32 units round.
            u=U_F32_TENSOR_CORE,
            block=options.plan.block if tiles is None else tiles.keys,
            chained=MMA_KEYS if dtype == torch.float32 else chained,
            passes=1 if values == options.p else _PIECES[options.p] * _PIECES[values],
            cuts_at=options.plan.cuts_of(row),
            # A prefill tile is cut for its longest row, which may be any row of the call.
            shared_up_to=shape.keys if row.prefill else 0,
            u_tanh=U_TANH,
            # Numbers of a quantised cache are rounded to float16 where they are expanded.
            u_k=0.0 if cache.as_given else 2.0**-11,
            u_v=0.0 if cache.as_given else 2.0**-11,
        )
        return with_fp8(over_rotation(plain, cache, shape, dtype), options)

    def capabilities(self) -> Capabilities:
        return replace(over_cache(self.options, self.cache), **ALL_FORMS)

    def merger(self) -> Merge:
        return combine

    def _tiles(self, device: torch.device, call: Call, options: TileOptions) -> Tiles | None:
        return self._tiles_of(
            self._limit(device),
            call.shape,
            tokens_wanted(call),
            options.plan.block,
            window=call.shape.rows,
            item_size=call.q.element_size(),
            v_is_k=shares_memory(call),
        )

    @staticmethod
    def _tiles_of(
        limit: Limits,
        shape: Shape,
        tokens: int | None,
        block: int,
        *,
        window: int = 0,
        item_size: int,
        v_is_k: bool,
    ) -> Tiles | None:
        return choose_tiles(
            shape.ratio,
            shape.k_size,
            shape.v_size,
            tokens=tokens,
            window=window,
            block=block,
            item_size=item_size,
            v_is_k=v_is_k,
            shared_limit=limit.shared_bytes,
            tensor_cores=limit.capability >= _TENSOR_CORES_FROM,
        )

    def _window_tiles(self, call: Call, alone: Tiles) -> Tiles:
        """Those of rows of a window, where one alone has these."""
        limits = self._limit(call.q.device)
        if self.tiles is not None:
            return alone
        return window_tiles(
            alone,
            call.shape.k_size,
            call.shape.v_size,
            item_size=call.q.element_size(),
            v_is_k=shares_memory(call),
            shared_limit=limits.shared_bytes,
            capability=limits.capability,
        )

    def _limit(self, device: torch.device | None) -> Limits:
        """Of this tensor's device, or (None) of the device that calls will run on."""
        on_cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
        limits = _limits(None if device is None else device.index) if on_cuda else NOMINAL_LIMITS
        if self._shared_limit is not None:
            limits = limits._replace(shared_bytes=self._shared_limit)
        return limits

    def _too_small(self, call: Call) -> str:
        sizes = f"head sizes {call.shape.k_size} and {call.shape.v_size}"
        return f"no tile of {sizes} fits in {self._limit(call.q.device).shared_bytes} bytes of shared memory"

    def _fall_back(self, call: Call, note: str) -> Result:
        self._note(note)
        return EagerKernel(self.spec, self.options, self.cache).run(call)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def flash_kernel(
    spec: str,
    options: TileOptions,
    *,
    cache: CacheSpec = AS_GIVEN,
    expand: str = "fused",
    reader: str = "auto",
) -> Kernel:
    """The kernel that runs for `flash` here, with a note where it is not the CUDA one."""
    reason = why_not_flash()
    if reason is None:
        sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        on_device = replace(options, plan=options.plan.with_sms(sms))
        return FlashKernel(spec, on_device, cache=cache, expand=expand, reader=reader)
    kernel = EagerKernel(spec, options, cache)
    kernel.notes.append(f"{FALLBACK_NOTE} ({reason})")
    return kernel
