"""`reader.cu` compiled at run time and launched: NVRTC and NVIDIA's driver by ctypes.

Optional: where one of the two is missing, or the device or the call is not one that the reader is for,
`why_not` says so and Triton's readers run. No compiler of the host and no header is needed; NVRTC comes with
torch's CUDA builds.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from verify.kernels.call import Call

SOURCES = tuple(Path(__file__).with_name(name) for name in ("ptx.cuh", "reader.cu"))
KEYS_A_TILE = 16
# Of a block, of which a multiprocessor runs one. With 12 warps its registers leave no room for the combining
# launch beside it; of 12 warps in three blocks the third of a KV range would be a part of its own, and that
# launch would have three times as much to read. Both are no faster at any length but 131,072 (q4_0, 3 %).
WARPS, BLOCKS_A_SM = 8, 1
HEAD_SIZE, LARGEST_GROUP = 128, 16
# The families that have this much: H100 and H200, B100 to B300.
CAPABILITIES = ((9, 0), (10, 0), (10, 3))
# Versions of NVRTC that know them.
NVRTC_VERSIONS = (13, 12)


class CodeType(NamedTuple):
    """How numbers are kept: bits of a code, and whether codes are e4m3."""

    bits: int
    fp8: bool = False


class ReaderKind(NamedTuple):
    """What is compiled for: types of K and V, keys a tile of the plan, and whether the launch may begin
    before the one in front has ended."""

    k: CodeType
    v: CodeType
    block: int
    overlap: bool

    @property
    def tile_bytes(self) -> int:
        """Of a warp's tile of K and V, with scales."""
        return KEYS_A_TILE * sum(HEAD_SIZE * x.bits // 8 + (0 if x.fp8 else 8) for x in (self.k, self.v))

    @property
    def stages(self) -> int:
        """Tiles that a warp has under way, and the one it computes.

        Of 4 bits one under way is enough; of 8 it is 3 % slower from 16,384 keys on, 6 % faster at 4,096.
        """
        return 3 if 8 in (self.k.bits, self.v.bits) else 2

    @property
    def shared_bytes(self) -> int:
        """Of a block: its warps' tiles, in whose place their results are merged."""
        merged = 4 * WARPS * LARGEST_GROUP * (HEAD_SIZE // 32 * 36 + 2)
        return max(WARPS * self.stages * self.tile_bytes, merged)

    @property
    def macros(self) -> dict[str, int]:
        return {
            "K_BITS": self.k.bits,
            "K_FP8": int(self.k.fp8),
            "V_BITS": self.v.bits,
            "V_FP8": int(self.v.fp8),
            "BLOCK": self.block,
            "STAGES": self.stages,
            "WARPS": WARPS,
            "OVERLAP": int(self.overlap),
        }


_FIELDS: tuple[tuple[str, Any], ...] = (
    *((name, ctypes.c_void_p) for name in ("q", "k_codes", "k_scales", "v_codes", "v_scales")),
    *((name, ctypes.c_void_p) for name in ("kv_len", "groups", "out", "lse")),
    *((name, ctypes.c_int64) for name in ("q_b", "q_t", "q_h")),
    *((name, ctypes.c_int) for name in ("tokens", "keys", "q_heads", "kv_heads", "ratio", "q_ratio")),
    *((name, ctypes.c_int) for name in ("q_shift", "first_group", "n_groups", "group_size")),
    *((name, ctypes.c_int) for name in ("same_length", "parts", "tiles_a_part", "slots")),
    ("logit_scale", ctypes.c_float),
)
# What the reader takes, of what a launch over planes has.
TAKEN = tuple(name for name, _ in _FIELDS)


class Asked(ctypes.Structure):
    """`Asked` of `reader.cu`; what the numbers mean is said at `device.attend_tiles`."""

    _fields_ = _FIELDS


def asked_of(**values: Any) -> Asked:
    """The argument of a launch, by the names of its fields; tensors stand for where they lie."""
    return Asked(**{name: x.data_ptr() if isinstance(x, torch.Tensor) else x for name, x in values.items()})


def why_not(call: Call) -> str | None:
    """Why this reader cannot read a quantised cache for such a decode call, or None if it can."""
    shape, q = call.shape, call.q
    if (shape.k_size, shape.v_size) != (HEAD_SIZE, HEAD_SIZE):
        return f"it has a head size of {HEAD_SIZE}, not {shape.k_size} and {shape.v_size}"
    if shape.ratio > LARGEST_GROUP:
        return f"it has at most {LARGEST_GROUP} query heads a KV head, not {shape.ratio}"
    if not on_device(q):
        return f"tensors on {q.device}"
    if q.data_ptr() % 16 or q.stride(3) != 1 or any(stride % 8 for stride in q.stride()[:3]):
        return "query heads do not begin at multiples of 16 bytes"
    return why_not_on(q.device.index)


def on_device(q: torch.Tensor) -> bool:
    return q.is_cuda


@functools.cache
def why_not_on(device: int) -> str | None:
    """The same, of a device and of what is installed."""
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        return f"it is not for compute capability {capability[0]}.{capability[1]}"
    if nvrtc() is None:
        return "NVRTC is not installed"
    return None if _driver() is not None else "NVIDIA's driver cannot be loaded"


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    """NVRTC, the newest that is found: loaded already, on the system's path, or among Python's packages."""
    of_torch = torch.version.cuda
    versions = dict.fromkeys([*([int(of_torch.split(".")[0])] if of_torch else []), *NVRTC_VERSIONS])
    for version in versions:
        name = f"libnvrtc.so.{version}"
        places = [Path(folder) / "nvidia" for folder in sys.path if folder]
        inside = (f"cu{version}/lib", "cuda_nvrtc/lib")
        found = [place / part / name for place in places for part in inside]
        for path in (Path(name), *filter(Path.is_file, found)):
            try:
                if path.is_absolute():
                    # What it loads by name later is found where it is loaded already.
                    for more in path.parent.glob(f"libnvrtc-builtins.so.{version}*"):
                        ctypes.CDLL(str(more))
                return ctypes.CDLL(str(path))
            except OSError:
                continue
    return None


@functools.cache
def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@functools.cache
def cubin(kind: ReaderKind, capability: tuple[int, int]) -> bytes:
    """Machine code. Raises RuntimeError with the compiler's words."""
    library = nvrtc()
    assert library is not None
    source = "\n".join(path.read_text() for path in SOURCES).encode()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source, b"reader.cu", 0, None, None), "NVRTC")
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in kind.macros.items()]
    words = [option.encode() for option in options]
    size = ctypes.c_size_t()
    try:
        code = library.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
        if code:
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC: reader.cu does not compile: {log.value.decode().strip()}")
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)), "NVRTC")
        code_of = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, code_of), "NVRTC")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return code_of.raw


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: id, and 64 bytes for its value."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_int * 15),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES and
# CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent
_EARLY, _MOST_SHARED, _SHARED_SHARE = 6, 8, 9


class Compiled:
    """One kind of the reader on one device."""

    def __init__(self, kind: ReaderKind, device: int) -> None:
        self.kind, self.device = kind, device
        # As a kernel of Triton has it.
        self.asm = {"cubin": cubin(kind, torch.cuda.get_device_capability(device))}
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        driver = _driver()
        assert driver is not None
        self._driver = driver
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # a context
            _check(driver.cuModuleLoadData(ctypes.byref(module), self.asm["cubin"]), "CUDA")
            _check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, b"attend"), "CUDA")
            _check(driver.cuFuncSetAttribute(self._function, _MOST_SHARED, kind.shared_bytes), "CUDA")
            _check(driver.cuFuncSetAttribute(self._function, _SHARED_SHARE, 100), "CUDA")

    def launch(self, grid: Sequence[int], asked: Asked) -> None:
        """On the current stream; does not wait."""
        with torch.cuda.device(self.device):
            early = _Attribute(id=_EARLY, value=1)
            config = _Config(
                grid=(ctypes.c_uint * 3)(*grid),
                block=(ctypes.c_uint * 3)(32 * WARPS, 1, 1),
                shared=self.kind.shared_bytes,
                stream=torch.cuda.current_stream().cuda_stream,
                attributes=ctypes.pointer(early),
                count=int(self.kind.overlap),
            )
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(asked))
            _check(
                self._driver.cuLaunchKernelEx(ctypes.byref(config), self._function, arguments, None), "CUDA"
            )


@functools.cache
def compiled(kind: ReaderKind, device: int) -> Compiled:
    """Loaded once a device."""
    return Compiled(kind, device)


def _check(code: int, whose: str) -> None:
    if code:
        raise RuntimeError(f"{whose}: error {code}")
