"""llama.cpp itself as a model engine, from the wheel `xllamacpp`, by its C API: the oracle of models.

It runs in a process of its own, because it ends its process where it does not like a file. Attention is in
float32: an f32 cache, no flash attention. The layouts below are those of the build that the wheel holds; the
defaults that its own functions give are checked against them before anything is run.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# The build whose structs are laid out below.
WHEEL, VERSION = "xllamacpp", "2026.10.11549"
# ggml's numbers of the types that caches may have here.
CACHE_TYPE_IDS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
# Turns the rotation of quantised caches off.
NO_ROTATION = "LLAMA_ATTN_ROT_DISABLE"


class ModelParams(ctypes.Structure):
    """`llama_model_params`."""

    _fields_ = [
        ("devices", c_void_p),
        ("buffer_overrides", c_void_p),
        ("gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress", c_void_p),
        ("progress_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class ContextParams(ctypes.Structure):
    """`llama_context_params`."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("context_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attention", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_threshold", c_float),
        ("eval_callback", c_void_p),
        ("eval_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("other", c_void_p),
    ]


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


class EngineRefusal(Exception):
    """The engine loads no such file, or ended over it; the last lines of its log."""


class ModelEngine:
    """The engine in a process of its own, started anew where it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def logits(
        self, path: Path, tokens: np.ndarray, *, cache: tuple[str, str] = ("f32", "f32"), rotated: bool = True
    ) -> np.ndarray:
        """Float32 [T, vocabulary] for token ids [T]; cache: types of K and V, with flash attention if they
        are not f32; rotated: whether its rule of rotation is left on. Raises EngineRefusal."""
        ids = np.asarray(tokens, np.int32)
        found: np.ndarray = self._ask("logits", str(path), ids, cache, rotated)
        return found

    def token_ids(self, path: Path, texts: list[str]) -> list[list[int]]:
        """Ids of each text, no special token parsed or added. Raises EngineRefusal."""
        found: list[list[int]] = self._ask("token_ids", str(path), texts)
        return found

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ask(self, *question: object) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Else it starts a debugger on itself before it ends.
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(question, self._process.stdin)
        self._process.stdin.flush()
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            self._process = None
            raise EngineRefusal(f"the engine's process ended with {code} over {question[1]}") from None
        if isinstance(answer, str):
            raise EngineRefusal(answer)
        return answer


def model_engine() -> ModelEngine:
    """The engine; skips the test where its wheel is not installed, or is another build."""
    try:
        found = metadata.version(WHEEL)
    except metadata.PackageNotFoundError:
        pytest.skip(f"the wheel {WHEEL} is not installed (`make test` installs it)")
    if found != VERSION:
        pytest.skip(f"the wheel {WHEEL} is {found}, and structs are known of {VERSION}")
    return ModelEngine()


_Log = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class _Library:
    """In the process of the engine: the library, and the file that it holds."""

    def __init__(self) -> None:
        path = metadata.distribution(WHEEL).locate_file("xllamacpp/xllamacpp.abi3.so")
        self.lib = lib = ctypes.CDLL(str(path))
        for name, result, arguments in (
            ("llama_model_default_params", ModelParams, []),
            ("llama_context_default_params", ContextParams, []),
            ("llama_model_load_from_file", c_void_p, [c_char_p, ModelParams]),
            ("llama_init_from_model", c_void_p, [c_void_p, ContextParams]),
            ("llama_model_get_vocab", c_void_p, [c_void_p]),
            ("llama_vocab_n_tokens", c_int32, [c_void_p]),
            ("llama_decode", c_int32, [c_void_p, Batch]),
            ("llama_batch_init", Batch, [c_int32, c_int32, c_int32]),
            ("llama_batch_free", None, [Batch]),
            ("llama_get_logits", POINTER(c_float), [c_void_p]),
            (
                "llama_tokenize",
                c_int32,
                [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
            ),
            ("llama_free", None, [c_void_p]),
            ("llama_model_free", None, [c_void_p]),
            ("llama_log_set", None, [_Log, c_void_p]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        self.log: list[str] = []
        self._keep = _Log(lambda level, line, data: self.log.append(line.decode("utf-8", "replace")))
        lib.llama_log_set(self._keep, None)
        lib.llama_backend_init()
        context = lib.llama_context_default_params()
        model = lib.llama_model_default_params()
        seen = (context.n_ctx, context.n_batch, context.type_k, context.yarn_ext_factor, context.swa_full)
        if seen != (512, 2048, 1, -1.0, True) or (model.gpu_layers, model.use_extra_bufts) != (-1, True):
            raise SystemExit(f"the structs of {WHEEL} are laid out in another way: {seen}")

    def load(self, path: str, *, vocab_only: bool) -> int:
        params = self.lib.llama_model_default_params()
        params.vocab_only, params.use_extra_bufts, params.gpu_layers = vocab_only, False, 0
        self.log.clear()
        model: int | None = self.lib.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise EngineRefusal("".join(self.log[-8:]))
        return model

    def logits(self, path: str, tokens: np.ndarray, cache: tuple[str, str], rotated: bool) -> np.ndarray:
        lib, n = self.lib, len(tokens)
        os.environ[NO_ROTATION] = "0" if rotated else "1"
        model = self.load(path, vocab_only=False)
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(-(-n // 256) * 256, 256)
        params.n_threads = params.n_threads_batch = 1
        params.flash_attention = int(cache != ("f32", "f32"))
        params.type_k, params.type_v = (CACHE_TYPE_IDS[kind] for kind in cache)
        context = lib.llama_init_from_model(model, params)
        if not context:
            raise EngineRefusal("".join(self.log[-8:]))
        batch = lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if failed := lib.llama_decode(context, batch):
            raise EngineRefusal(f"llama_decode gave {failed}: {''.join(self.log[-8:])}")
        width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        found = np.ctypeslib.as_array(lib.llama_get_logits(context), (n, width)).copy()
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        lib.llama_model_free(model)
        return found

    def token_ids(self, path: str, texts: list[str]) -> list[list[int]]:
        model = self.load(path, vocab_only=True)
        vocabulary = self.lib.llama_model_get_vocab(model)
        found = []
        for text in texts:
            raw = text.encode()
            room = (c_int32 * (2 * len(raw) + 16))()
            n = self.lib.llama_tokenize(vocabulary, raw, len(raw), room, len(room), False, False)
            found.append(list(room[:n]))
        self.lib.llama_model_free(model)
        return found


def _serve() -> None:
    # What the engine prints goes nowhere near the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    library = _Library()
    while True:
        try:
            kind, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(library, kind)(*arguments)
        except EngineRefusal as refusal:
            answer = str(refusal)
        pickle.dump(answer, out)
        out.flush()


if __name__ == "__main__":
    _serve()
