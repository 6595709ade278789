"""Every kernel by its name: building one from a specification, and listing what is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from verify.kernels.cache import CACHE_TYPES
from verify.kernels.capabilities import Capabilities
from verify.kernels.eager import EagerKernel, EagerOptions
from verify.kernels.errors import SpecError, nearest
from verify.kernels.exact import ExactKernel
from verify.kernels.flash.kernel import flash_kernel, why_not_cuda
from verify.kernels.foreign.ggml_kernel import GGML_CAPABILITIES, GGML_OPTIONS, GgmlKernel
from verify.kernels.foreign.python_kernel import PYTHON_OPTIONS, PythonKernel
from verify.kernels.kernel import Kernel
from verify.kernels.peers.flex import FLEX_CAPABILITIES, FlexKernel
from verify.kernels.peers.libraries import LIBRARY_CAPABILITIES, LibraryKernel, why_not_library
from verify.kernels.peers.sdpa import SDPA_CAPABILITIES, SdpaKernel
from verify.kernels.plans.spec import PLAN_OPTIONS, Spec, check_options, choice, parse_plan, parse_spec

TILE_OPTIONS: dict[str, str] = {
    **PLAN_OPTIONS,
    "p": "type of P as it enters the second product: f16, bf16, f32; default f16",
    "acc": "type of the output accumulators: f32, f16; default f32",
    "out": "type of the result: f32, f16, bf16; default f32",
}


FLASH_OPTIONS: dict[str, str] = {
    **TILE_OPTIONS,
    "cache": f"type of the KV cache: f16 (as given), {', '.join(CACHE_TYPES)}; default f16",
    "expand": "a quantised cache: fused (in the kernel, where it can) or f16 (before it); default fused",
}


class Entry(NamedTuple):
    """A kernel: its name, its options, how to build it, and why it cannot run here (None: it can).

    variants: names after a colon, one of which must be given; limits: what is known before it is built, by
    the kernel's name or its variants' names.
    """

    name: str
    summary: str
    options: Mapping[str, str]
    build: Callable[[Spec], Kernel]
    why_not: Callable[[], str | None]
    variants: tuple[str, ...] = ()
    limits: Mapping[str, Capabilities] = MappingProxyType({})


def _eager_options(spec: Spec) -> EagerOptions:
    return EagerOptions(
        plan=parse_plan(spec),
        p=choice(spec, "p", "f16", ("f16", "bf16", "f32")),
        acc=choice(spec, "acc", "f32", ("f32", "f16")),
        out=choice(spec, "out", "f32", ("f32", "f16", "bf16")),
    )


def _here() -> None:
    return None


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "exact",
            "float64 softmax(QK)V: the oracle",
            {"acc": "float64, or double-float32 for GPUs with slow float64; default float64"},
            lambda s: ExactKernel(s.text, choice(s, "acc", "float64", ("float64", "double-float32"))),
            _here,
        ),
        Entry(
            "eager",
            "tiled online softmax in plain torch, any plan, CPU or GPU",
            TILE_OPTIONS,
            lambda s: EagerKernel(s.text, _eager_options(s)),
            _here,
        ),
        Entry(
            "flash",
            "our CUDA kernel; where it cannot run, `eager` runs in its place and the verdict says so",
            FLASH_OPTIONS,
            lambda s: flash_kernel(
                s.text,
                _eager_options(s),
                cache=choice(s, "cache", "f16", ("f16", *CACHE_TYPES)),
                expand=choice(s, "expand", "fused", ("fused", "f16")),
            ),
            why_not_cuda,
        ),
        Entry(
            "py",
            "your own: py:FILE.py::FUNCTION, run in a process of its own",
            PYTHON_OPTIONS,
            PythonKernel.from_spec,
            _here,
        ),
        Entry(
            "ggml",
            "ggml_flash_attn_ext of a built llama.cpp or ik_llama.cpp, run in a process of its own",
            GGML_OPTIONS,
            GgmlKernel.from_spec,
            _here,
            limits={"ggml": GGML_CAPABILITIES},
        ),
        Entry(
            "sdpa",
            "torch's scaled_dot_product_attention, one backend of it",
            {},
            SdpaKernel.from_spec,
            _here,
            variants=tuple(SDPA_CAPABILITIES),
            limits={f"sdpa:{name}": has for name, has in SDPA_CAPABILITIES.items()},
        ),
        Entry(
            "flex",
            "torch's FlexAttention: compiled on CUDA, in plain torch elsewhere",
            {},
            lambda s: FlexKernel(s.text),
            _here,
            limits={"flex": FLEX_CAPABILITIES},
        ),
        *(
            Entry(
                name,
                f"decode kernel of the library {name}",
                {},
                LibraryKernel.from_spec,
                partial(why_not_library, name),
                limits={name: has},
            )
            for name, has in LIBRARY_CAPABILITIES.items()
        ),
    )
}


# Kernels that run in a process of their own: starting one costs seconds, and how it cuts a call is not known.
IN_OWN_PROCESS = frozenset({"py", "ggml"})


def build_kernel(text: str) -> Kernel:
    """The kernel of a specification.

    Raises SpecError, one line that names the specification and the nearest thing that is known.
    """
    spec = parse_spec(text)
    entry = ENTRIES.get(spec.name)
    if entry is None:
        raise SpecError(
            f"kernel {text!r}: unknown kernel {spec.name!r}{nearest(spec.name, ENTRIES)}"
            f" (known: {', '.join(ENTRIES)})"
        )
    if spec.target and not entry.variants and spec.name != "py":
        raise SpecError(f"kernel {text!r}: {spec.target!r} is not of the form option=value")
    if entry.variants and spec.target not in entry.variants:
        wanted = ", ".join(f"{entry.name}:{variant}" for variant in entry.variants)
        raise SpecError(f"kernel {text!r}: expected one of {wanted}")
    check_options(spec, entry.options)
    return entry.build(spec)
