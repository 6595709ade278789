"""`ggml:lib=FILE`: the real ggml_flash_attn_ext of a built llama.cpp or ik_llama.cpp.

It runs in a process of its own. FILE is an unmodified shared library: libggml.so or libllama.so of a build
with shared libraries, or any file that exports ggml's functions. Two builds can stand against each other, and
one against itself with its query heads cut up: each head group is a call of its own on a contiguous copy of
its queries, which is what ik_llama.cpp #1183 made of one call at r = 12.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from verify.kernels.budget.arithmetic import Arithmetic, loosest
from verify.kernels.cache import ggml_blocks
from verify.kernels.cache_types import AS_GIVEN, CacheSpec
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import Capabilities
from verify.kernels.catalogue import CALL_LIMIT_S, GGML_CACHES, GGML_CAPABILITIES
from verify.kernels.errors import KernelFailure, SpecError
from verify.kernels.foreign.process import WorkerProcess
from verify.kernels.kernel import Kernel
from verify.kernels.plans.plan import Plan, parse_heads
from verify.kernels.plans.spec import Spec, cache_option, choice, number
from verify.kernels.rotation import rotate
from verify.kernels.stored import store
from verify.kernels.trace import Launched, Signature

# Its CUDA kernels are compiled with a softcap at these head sizes alone. At others the library says that it
# supports the call, and aborts (seen with mainline's 0.12.0 at 64).
CUDA_SOFTCAP_SIZES = (128, 256)


class GgmlKernel(Kernel):
    """The operator of one library on one of its backends."""

    def __init__(
        self,
        spec: str,
        lib: Path,
        *,
        backend: str = "cpu",
        plan: Plan | None = None,
        cache: CacheSpec = AS_GIVEN,
        prec: str = "f32",
        threads: int = 1,
        limit_s: int = CALL_LIMIT_S,
    ) -> None:
        super().__init__(spec)
        self.backend, self.cache, self.prec, self.threads = backend, cache, prec, threads
        self.plan, self.limit_s = plan or Plan(), limit_s
        arguments = {"lib": str(lib.resolve()), "backend": backend, "threads": threads, "prec": prec}
        self._worker = WorkerProcess(spec, lib.name, "ggml_servant.py", arguments)
        said = self._worker.greeting
        version = f"ggml {said['version']}".strip()
        threads_word = f",threads={threads}" if backend == "cpu" else ""
        self.label = f"{version}[{said['backend']},cache={cache},prec={prec}{threads_word}]"
        self.binary: str = said["binary"]
        blocks = cache.size_multiple
        # What any call may ask for, whatever head groups it brings.
        self._takes = replace(
            GGML_CAPABILITIES,
            sinks=bool(said["sinks"]),
            size_multiple=blocks,
            softcap_sizes=CUDA_SOFTCAP_SIZES if backend == "cuda" else None,
        )

    @classmethod
    def from_spec(cls, spec: Spec) -> GgmlKernel:
        """Raises SpecError, one line, if the library cannot be used."""
        if "lib" not in spec.options:
            raise SpecError(f"kernel {spec.text!r}: expected ggml:lib=FILE, a shared library of llama.cpp")
        lib = Path(spec.options["lib"])
        if not lib.is_file():
            raise SpecError(f"kernel {spec.text!r}: {lib}: no such file")
        try:
            plan = Plan(heads=parse_heads(spec.options["heads"]) if "heads" in spec.options else None)
        except SpecError as error:
            raise SpecError(f"kernel {spec.text!r}: {error}") from None
        return cls(
            spec.text,
            lib,
            backend=choice(spec, "backend", "cpu", ("cpu", "cuda")),
            plan=plan,
            cache=cache_option(spec, ("f16", *GGML_CACHES)),
            prec=choice(spec, "prec", "f32", ("f32", "default")),
            threads=number(spec, "threads", 1),
            limit_s=number(spec, "timeout", CALL_LIMIT_S),
        )

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        self.plan.groups(shape.ratio)  # refuses groups that do not sum to r
        return self._arithmetic(shape, self.cache.at(None))

    def arithmetic_of(self, call: Call) -> Arithmetic:
        self.plan.groups(call.shape.ratio)
        if (seen := self.identified_of(call)) is not None:
            return seen
        return self._arithmetic(call.shape, self.cache.at(call.layer))

    def _arithmetic(self, shape: Shape, cache: CacheSpec) -> Arithmetic:
        quantised_k, quantised_v = cache.k != "f16", cache.v != "f16"
        # The CPU adds up float16 values in float16, a key at a time, and quantised ones in float32.
        acc = "f32" if quantised_v and self.backend == "cpu" else "f16"
        blocks = cache.blocks(shape.k_size, shape.v_size)
        return replace(
            loosest("f16", acc=acc),
            out="f32",
            q_blocks=quantised_k,
            # It may or may not round what it expands.
            u_k=2.0**-11 if quantised_k else 0.0,
            u_v=2.0**-11 if quantised_v else 0.0,
            k_rotation=blocks.k,
            v_rotation=blocks.v,
        )

    def capabilities(self) -> Capabilities:
        return replace(self._takes, ratios=self.plan.ratios)

    def run(self, call: Call) -> Result:
        reason = self._takes.refuses(call)
        if reason is not None:
            raise KernelFailure("unsupported", f"{self.spec}: {reason}")
        groups = (call.plan or self.plan).groups(call.shape.ratio)
        q, k, v, cache = call.q, call.k, call.v, self.cache.at(call.layer)
        stored = None
        if not cache.as_given:
            # As its caller, llama.cpp's graph, does it: the rotation is outside the operator, in float32.
            stored = store(call, cache)
            q = rotate(q.float(), stored.rotation.k) if stored.rotation.k else q
            k, v = (
                x.codes if kind == "f16" else ggml_blocks(x)
                for x, kind in ((stored.k, cache.k), (stored.v, cache.v))
            )
        inputs = {"q": q, "k": k, "v": v, "kv_len": call.kv_len.to(torch.int32)}
        if call.sinks is not None:
            inputs["sinks"] = call.sinks.float()
        found = self._worker.ask(
            {
                "scale": call.scale,
                "path": call.path,
                "sliding_window": call.sliding_window,
                "softcap": call.softcap,
                "caches": [cache.k, cache.v],
                "groups": groups,
            },
            {name: x.detach().cpu().contiguous() for name, x in inputs.items()},
            {"out": (*call.q.shape[:3], call.shape.v_size)},
            self.limit_s,
        )
        launch = "each" if len(groups) > 1 else "one"
        # Where the KV range is cut is the library's secret.
        label = (
            self.label if self.cache == cache else self.label.replace(f"cache={self.cache}", f"cache={cache}")
        )
        tokens = 1 if call.path == "decode" else call.shape.rows
        signature = Signature(
            kernel=label, binary=self.binary, head_groups=groups, cuts=(), launch=launch, tokens=tokens
        )
        launched = Launched.every_row(call.path, call.kv_len, signature)
        lse = call.q.new_full(call.q.shape[:3], torch.nan, dtype=torch.float32)
        out = found["out"].to(call.q.device)
        return Result(out if stored is None else stored.undone(out), lse, launched)

    def forgive(self) -> None:
        self._worker.forgive()

    def close(self) -> None:
        self._worker.close()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self.close()
