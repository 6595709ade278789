"""The servant of `ggml:` kernels: ggml_flash_attn_ext of a shared library. Imports nothing of ours.

One call is laid out as llama.cpp lays out its own: K and V as [D, S, Hkv] views of a cache whose rows hold
all KV heads, n_kv padded to 256 and the rest masked, the mask in float16, q and the result in float32.
Everything goes through ggml's backend interface, which is the same for every backend.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from worker import Refusal  # type: ignore[import-not-found]

Answer = Callable[[dict[str, Any], mmap.mmap], dict[str, Any]]
Pointer, Size, Int64, Int, Float = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int, ctypes.c_float,
)  # fmt: skip


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", Size), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool))


# What every version since flash attention came to ggml's backends has: name -> (result, arguments).
NEEDED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (Pointer, (InitParams,)),
    "ggml_free": (None, (Pointer,)),
    "ggml_tensor_overhead": (Size, ()),
    "ggml_graph_overhead_custom": (Size, (Size, ctypes.c_bool)),
    "ggml_type_name": (ctypes.c_char_p, (Int,)),
    "ggml_row_size": (Size, (Int, Int64)),
    "ggml_new_tensor_3d": (Pointer, (Pointer, Int, Int64, Int64, Int64)),
    "ggml_new_tensor_4d": (Pointer, (Pointer, Int, Int64, Int64, Int64, Int64)),
    "ggml_view_3d": (Pointer, (Pointer, Pointer, Int64, Int64, Int64, Size, Size, Size)),
    "ggml_permute": (Pointer, (Pointer, Pointer, Int, Int, Int, Int)),
    "ggml_flash_attn_ext": (Pointer, (Pointer,) * 5 + (Float,) * 3),
    "ggml_flash_attn_ext_set_prec": (None, (Pointer, Int)),
    "ggml_new_graph_custom": (Pointer, (Pointer, Size, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (Pointer, Pointer)),
    "ggml_backend_alloc_ctx_tensors": (Pointer, (Pointer, Pointer)),
    "ggml_backend_buffer_free": (None, (Pointer,)),
    "ggml_backend_tensor_set": (None, (Pointer, Pointer, Size, Size)),
    "ggml_backend_tensor_get": (None, (Pointer, Pointer, Size, Size)),
    "ggml_backend_graph_compute": (Int, (Pointer, Pointer)),
    "ggml_backend_supports_op": (ctypes.c_bool, (Pointer, Pointer)),
    "ggml_backend_name": (ctypes.c_char_p, (Pointer,)),
}
OPTIONAL: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_cpu_init": (None, ()),
    "ggml_version": (ctypes.c_char_p, ()),
    "ggml_commit": (ctypes.c_char_p, ()),
    "ggml_log_set": (None, (Pointer, Pointer)),
    "ggml_flash_attn_ext_add_sinks": (None, (Pointer, Pointer)),
    "ggml_backend_cpu_init": (Pointer, ()),
    "ggml_backend_cpu_set_n_threads": (None, (Pointer, Int)),
    # llama.cpp's takes the device alone, ik_llama.cpp's parameters and a model too: null is their default.
    "ggml_backend_cuda_init": (Pointer, (Int, Pointer, Pointer)),
    # Builds whose backends are libraries of their own, loaded at run time.
    "ggml_backend_load_all_from_path": (None, (ctypes.c_char_p,)),
    "ggml_backend_init_by_type": (Pointer, (Int, ctypes.c_char_p)),
    "ggml_backend_get_device": (Pointer, (Pointer,)),
    "ggml_backend_dev_backend_reg": (Pointer, (Pointer,)),
    "ggml_backend_reg_get_proc_address": (Pointer, (Pointer, ctypes.c_char_p)),
}
DEVICE_TYPES = {"cpu": 0, "cuda": 1}
PRECISIONS = {"default": 0, "f32": 10}
# GGML_PREC_F32 of builds from before backends had devices, and of ik_llama.cpp, which parted from them there.
EARLY_F32 = 1
F32, F16 = 0, 1
# Both engines pad n_kv to this many keys, and older versions want this many rows in a mask.
KV_PAD, MASK_ROWS = 256, 64
# Rows that one graph computes, one node each: what bounds the memory of their masks.
ROWS_AT_ONCE = 32
LOG_CALLBACK = ctypes.CFUNCTYPE(None, Int, ctypes.c_char_p, Pointer)
SILENT = LOG_CALLBACK(lambda level, text, user_data: None)


class Library:
    """The functions of one library, as attributes. Raises Refusal where it is not a ggml we can use."""

    def __init__(self, file: str) -> None:
        self.file = file
        before = mapped_files()
        theirs, ours = elf_machine(file), elf_machine(sys.executable)
        if theirs is not None and ours is not None and theirs != ours:
            raise Refusal(f"{file} is built for another machine (ELF machine {theirs}, this one is {ours})")
        try:
            self.handle = ctypes.CDLL(file)
        except OSError as error:
            said = str(error).removeprefix(f"{file}: ")
            raise Refusal(f"{file} does not load: {said}") from None
        missing = [name for name in NEEDED if not hasattr(self.handle, name)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise Refusal(
                f"{file} lacks {missing[0]}{more}: expected a shared library of llama.cpp or ik_llama.cpp"
                " (libggml.so, libllama.so), from when flash attention had backends on"
            )
        for name, (result, arguments) in (NEEDED | OPTIONAL).items():
            function = getattr(self.handle, name, None)
            if function is not None:
                function.restype, function.argtypes = result, list(arguments)
            setattr(self, name, function)
        self.before = before
        if self.ggml_log_set:
            self.ggml_log_set(SILENT, None)
        if self.ggml_cpu_init:
            self.ggml_cpu_init()
        names = {i: self.ggml_type_name(i) for i in range(40)}
        self.types = {name.decode(): i for i, name in names.items() if name}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def version(self) -> str:
        """As the library says it, in one word or two; empty for one too old to say."""
        said = [f() for f in (self.ggml_version, self.ggml_commit) if f]
        return " ".join(text.decode() for text in said if text and text != b"unknown")

    def binary(self) -> str:
        """Hash of this library and of all that it brought into the process."""
        files = {str(Path(self.file).resolve())} | (mapped_files() - self.before)
        digest = hashlib.sha256()
        for content in sorted(hashlib.sha256(Path(f).read_bytes()).digest() for f in files):
            digest.update(content)
        return digest.hexdigest()[:12]

    def backend(self, name: str, threads: int) -> int:
        """A backend's handle. Raises Refusal where this build has none of that name, or no device for it."""
        found = None
        if name == "cpu" and self.ggml_backend_cpu_init:
            found = self.ggml_backend_cpu_init()
        elif name == "cuda" and self.ggml_backend_cuda_init:
            found = self.ggml_backend_cuda_init(0, None, None)
        elif self.ggml_backend_init_by_type:
            if self.ggml_backend_load_all_from_path:
                self.ggml_backend_load_all_from_path(str(Path(self.file).resolve().parent).encode())
            found = self.ggml_backend_init_by_type(DEVICE_TYPES[name], None)
        if not found:
            raise Refusal(f"{self.file} has no backend {name}, or finds no device for it")
        if name == "cpu":
            self._set_threads(found, threads)
        return int(found)

    def _set_threads(self, backend: int, threads: int) -> None:
        set_threads = self.ggml_backend_cpu_set_n_threads
        if set_threads is None:
            device = self.ggml_backend_get_device(backend)
            registry = self.ggml_backend_dev_backend_reg(device)
            address = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
            if not address:
                raise Refusal(f"{self.file}: the number of threads cannot be set")
            set_threads = ctypes.CFUNCTYPE(None, Pointer, Int)(address)
        set_threads(backend, threads)


def elf_machine(file: str) -> int | None:
    """The processor that an ELF file is for, as its header numbers it; None for another kind of file."""
    with Path(file).open("rb") as f:
        head = f.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")


def mapped_files() -> set[str]:
    """Files that are mapped into this process; nothing where the system does not list them."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return set()
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines()}
    return {path for path in paths if path.startswith("/") and ".so" in path and Path(path).is_file()}


class Inputs(NamedTuple):
    """One sequence, as it lies in ggml's memory."""

    q: np.ndarray  # [T, Hq, Dk] float32
    k: np.ndarray  # [S, Hkv, bytes] of the first of `kinds`
    v: np.ndarray  # [S, Hkv, bytes] of the second
    kinds: tuple[str, str]  # ggml's names of the types of k and of v
    sizes: tuple[int, int]  # head sizes of k and of v
    kv_len: np.ndarray  # visible keys, [T]
    sinks: np.ndarray | None  # [Hq]
    scale: float  # of logits
    softcap: float  # of logits; 0: none
    window: int | None  # newest keys that a row sees; None: all
    groups: tuple[int, ...]  # query heads of each call


class Launch(NamedTuple):
    """One node of a graph: rows of q, which heads of all, keys that it reads (padded), its tensors."""

    rows: slice
    heads: np.ndarray
    keys: int
    values: list[tuple[int, np.ndarray]]
    out: int


class Attention:
    """The operator on one backend of one library."""

    def __init__(self, lib: Library, backend: int, precision: str) -> None:
        self.lib, self.backend, self.precision = lib, backend, PRECISIONS[precision]
        if precision == "f32" and not lib.ggml_backend_get_device:
            self.precision = EARLY_F32

    def __call__(self, x: Inputs, decode: bool) -> np.ndarray:
        """out [T, Hq, Dv]. On the decode path every row is a call of its own, else all rows are one."""
        lib, rows = self.lib, len(x.q)
        out = np.zeros((rows, x.q.shape[1], x.sizes[1]), np.float32)
        if not rows:
            return out
        cache = self._context(4, 0)
        k, v = (self._cache(cache, x, i) for i in range(2))
        cache_buffer = self._allocate(cache)
        for tensor, content in ((k, x.k), (v, x.v)):
            padded = content
            if len(content) % KV_PAD or not len(content):
                padded = np.zeros((self._padded(len(content)), *content.shape[1:]), content.dtype)
                padded[: len(content)] = content
            self._set(tensor, padded)
        step = ROWS_AT_ONCE if decode else rows
        try:
            for first in range(0, rows, step):
                chunk = range(first, min(first + step, rows))
                launches = [slice(t, t + 1) for t in chunk] if decode else [slice(0, rows)]
                self._compute(x, k, v, launches, out)
        finally:
            lib.ggml_backend_buffer_free(cache_buffer)
            lib.ggml_free(cache)
        return out

    def _compute(self, x: Inputs, k: int, v: int, launches: list[slice], out: np.ndarray) -> None:
        lib, nodes = self.lib, len(launches) * len(x.groups)
        context = self._context(12 * nodes, 8 * nodes)
        graph = lib.ggml_new_graph_custom(context, 8 * nodes, False)
        planned = [launch for rows in launches for launch in self._nodes(context, x, k, v, rows)]
        for launch in planned:
            if not lib.ggml_backend_supports_op(self.backend, launch.out):
                lib.ggml_free(context)
                raise Refusal("its backend says that it does not support this call", "unsupported")
            lib.ggml_build_forward_expand(graph, launch.out)
        buffer = self._allocate(context)
        try:
            for launch in planned:
                for tensor, content in launch.values:
                    self._set(tensor, content)
            status = lib.ggml_backend_graph_compute(self.backend, graph)
            if status != 0:
                raise Refusal(f"ggml_backend_graph_compute returned {status}", "raised")
            for launch in planned:
                rows = launch.rows.stop - launch.rows.start
                found = np.empty((rows, len(launch.heads), x.sizes[1]), np.float32)
                lib.ggml_backend_tensor_get(launch.out, found.ctypes.data, 0, found.nbytes)
                out[launch.rows, launch.heads] = found
        finally:
            lib.ggml_backend_buffer_free(buffer)
            lib.ggml_free(context)

    def _nodes(self, context: int, x: Inputs, k: int, v: int, rows: slice) -> Iterator[Launch]:
        """A node a head group, each on a contiguous copy of its heads of q."""
        lib = self.lib
        n_q, kv_heads = rows.stop - rows.start, x.k.shape[1]
        keys = self._padded(int(x.kv_len[rows].max()))
        mask_rows = -(-n_q // MASK_ROWS) * MASK_ROWS
        mask = lib.ggml_new_tensor_4d(context, F16, keys, mask_rows, 1, 1)
        shown = np.full((mask_rows, keys), -np.inf, np.float16)
        for i, n in enumerate(x.kv_len[rows]):
            shown[i, 0 if x.window is None else max(n - x.window, 0) : n] = 0
        values = [(mask, shown)]
        views = [self._prefix(context, cache, x, i, keys) for i, cache in enumerate((k, v))]
        first, ratio = 0, sum(x.groups)
        for group in x.groups:
            heads = (np.arange(kv_heads)[:, None] * ratio + first + np.arange(group)).ravel()
            first += group
            q = lib.ggml_new_tensor_3d(context, F32, x.sizes[0], len(heads), n_q)
            values.append((q, np.ascontiguousarray(x.q[rows][:, heads])))
            by_head = lib.ggml_permute(context, q, 0, 2, 1, 3)
            out = lib.ggml_flash_attn_ext(context, by_head, *views, mask, x.scale, 0.0, x.softcap)
            lib.ggml_flash_attn_ext_set_prec(out, self.precision)
            if x.sinks is not None:
                sinks = lib.ggml_new_tensor_3d(context, F32, len(heads), 1, 1)
                values.append((sinks, np.ascontiguousarray(x.sinks[heads])))
                lib.ggml_flash_attn_ext_add_sinks(out, sinks)
            yield Launch(rows, heads, keys, values, out)
            values = []

    def _cache(self, context: int, x: Inputs, which: int) -> int:
        """A tensor [D, Hkv, S] of k (0) or v (1)."""
        content, kind = (x.k, x.v)[which], self.lib.types.get(x.kinds[which])
        if kind is None or self.lib.ggml_row_size(kind, x.sizes[which]) != content[0, 0].nbytes:
            raise Refusal(f"this build has no cache type {x.kinds[which]} of the known layout", "unsupported")
        return int(
            self.lib.ggml_new_tensor_3d(
                context, kind, x.sizes[which], content.shape[1], self._padded(len(content))
            )
        )

    def _prefix(self, context: int, cache: int, x: Inputs, which: int, keys: int) -> int:
        """The first keys of a cache, [D, keys, Hkv]."""
        content = (x.k, x.v)[which]
        of_head, of_key = content[0, 0].nbytes, content[0].nbytes
        return int(
            self.lib.ggml_view_3d(context, cache, x.sizes[which], keys, content.shape[1], of_key, of_head, 0)
        )

    @staticmethod
    def _padded(keys: int) -> int:
        return max(-(-keys // KV_PAD), 1) * KV_PAD

    def _context(self, tensors: int, nodes: int) -> int:
        size = tensors * self.lib.ggml_tensor_overhead() + 1024
        if nodes:
            size += self.lib.ggml_graph_overhead_custom(nodes, False)
        return int(self.lib.ggml_init(InitParams(size, None, True)))

    def _allocate(self, context: int) -> int:
        buffer = self.lib.ggml_backend_alloc_ctx_tensors(context, self.backend)
        if not buffer:
            raise Refusal("ggml could not allocate its tensors", "raised")
        return int(buffer)

    def _set(self, tensor: int, content: np.ndarray) -> None:
        self.lib.ggml_backend_tensor_set(tensor, content.ctypes.data, 0, content.nbytes)


def load(arguments: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """The greeting says version, binary, whether there are sinks, and the backend's own name."""
    lib = Library(arguments["lib"])
    backend = lib.backend(arguments["backend"], arguments["threads"])
    attention = Attention(lib, backend, arguments["prec"])
    check_it_attends(attention)
    greeting = {
        "version": lib.version(),
        "binary": lib.binary(),
        "sinks": lib.ggml_flash_attn_ext_add_sinks is not None,
        "backend": lib.ggml_backend_name(backend).decode(),
    }
    return greeting, lambda question, memory: answer_call(attention, question, memory)


def check_it_attends(attention: Attention) -> None:
    """A call of known result: a library of the same names and other meanings is refused, not measured."""
    numbers = np.random.default_rng(0)
    q = numbers.standard_normal((1, 4, 64)).astype(np.float16).astype(np.float32)
    k, v = (numbers.standard_normal((KV_PAD, 2, 64)).astype(np.float16) for _ in range(2))
    n = 200
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        kinds=("f16", "f16"),
        sizes=(64, 64),
        kv_len=np.array([n]),
        sinks=None,
        scale=0.125,
        softcap=0.0,
        window=None,
        groups=(2,),
    )
    found = attention(inputs, decode=True)[0]
    for head in range(4):
        p = np.exp(k[:n, head // 2].astype(np.float64) @ q[0, head] * 0.125)
        due = p @ v[:n, head // 2].astype(np.float64) / p.sum()
        if not np.linalg.norm(found[head] - due) < 0.05 * np.linalg.norm(due):
            raise Refusal(
                f"{attention.lib.file}: its ggml_flash_attn_ext, called as llama.cpp calls it, returns"
                " something other than attention: another version"
            )


def answer_call(attention: Attention, question: dict[str, Any], memory: mmap.mmap) -> dict[str, Any]:
    """Run one call and write its result, as float32, behind the inputs."""
    x = {}
    for name, (dtype, shape, offset) in question["tensors"].items():
        flat = np.frombuffer(memory, dtype, count=int(np.prod(shape)), offset=offset)
        x[name] = flat.reshape(shape)
    shape, offset = question["results"]["out"]
    out = np.frombuffer(memory, np.float32, count=int(np.prod(shape)), offset=offset).reshape(shape)
    for b in range(shape[0]):
        inputs = Inputs(
            q=x["q"][b].astype(np.float32),
            k=x["k"][b],
            v=x["v"][b],
            kinds=tuple(question["caches"]),
            sizes=(x["q"].shape[-1], shape[-1]),
            kv_len=x["kv_len"][b],
            sinks=x.get("sinks"),
            scale=question["scale"],
            softcap=question["softcap"] or 0.0,
            window=question["sliding_window"],
            groups=tuple(question["groups"]),
        )
        out[b] = attention(inputs, question["path"] == "decode")
    return {}
