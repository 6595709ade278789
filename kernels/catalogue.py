"""Every kernel that can be named: its options, what it has, and whether it can run here. Loads no torch.

`registry` builds what is named; `capabilities` says what a limit means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from verify.kernels.cache_types import GRAMMAR, KEPT_TYPES
from verify.kernels.capabilities import Capabilities
from verify.kernels.here import LIBRARIES, why_not_flash, why_not_installed, why_not_library
from verify.kernels.plans.spec import PLAN_OPTIONS

TILE_OPTIONS: dict[str, str] = {
    **PLAN_OPTIONS,
    "p": "type of P as it enters the second product: f16, bf16, f32, e4m3, e5m2; default f16",
    "q": "q is rounded: e4m3 or e5m2 with a scale a row and head, or q8_0 in blocks; default as-given",
    "acc": "type of the output accumulators: f32, f16; default f32",
    "out": "type of the result: f32, f16, bf16; default f32",
    "cache": f"the KV cache, {GRAMMAR}: f16 (as given), {', '.join(KEPT_TYPES[1:])}; default f16",
}
FLASH_OPTIONS: dict[str, str] = {
    **TILE_OPTIONS,
    "reader": "of the fused kernel: chunks, wide, swapped, or cuda (in C++); default the fastest",
    "expand": "a quantised cache: fused (in the kernel, where it can) or f16 (before it); default fused",
}
# Of a kernel in a process of its own.
CALL_LIMIT_S = 60
PYTHON_OPTIONS: dict[str, str] = {
    "timeout": f"seconds that one call may take; default {CALL_LIMIT_S}",
    "acc": "f32: the kernel is known to accumulate in float32, so that a tighter error budget applies",
    "p": "type of P where it is not that of q, k and v or a finer one: f32, f16, bf16",
    "deterministic": "yes: it promises the same bits for the same call; no: it does not; default: it is seen",
    "row_alone": "bits: it promises that a row's bits depend on nothing else in its call",
    "layout": "order of its dimensions: bshd, bhsd, thd; default bshd, or as it is found",
    "mask": "what a function without kv_len sees: none (all keys that it is given), causal; default: asked",
    "dtype": "the one type that it takes: f16, bf16, f32",
    "cache": f"how it says that it keeps K and V, {GRAMMAR}: it is judged on that, and read back",
}
MERGE_OPTIONS: dict[str, str] = {
    **TILE_OPTIONS,
    "kv": "KV parts, which are merged: a number, size:KEYS, auto; default 2",
    "base": "of the lse that it takes and gives: e or 2; default e",
    "dtype": "type of the outputs that it takes and gives: f32, f16, bf16; default f32",
    "timeout": f"seconds that one call may take; default {CALL_LIMIT_S}",
}
HUB_OPTIONS = {name: PYTHON_OPTIONS[name] for name in ("acc", "layout", "mask", "dtype")}
# With a quantised cache ggml quantises q too. Types with a minimum (q4_1, q5_1) are left out: there it also
# keeps sums of q in float16, and no budget has been derived for that.
GGML_CACHES = ("q8_0", "q6_0", "q4_0", "q5_0", "iq4_nl")
GGML_OPTIONS: dict[str, str] = {
    "lib": "the shared library: libggml.so, libllama.so",
    "backend": "cpu or cuda; default cpu",
    "heads": "head groups, each a call of its own: 12, 8+4, 4+4+4, split; default one call",
    "cache": f"the KV cache, K[/V][+rotate=...]: f16 (as given), {', '.join(GGML_CACHES)}; default f16",
    "prec": "the operator's precision flag: f32 (as llama.cpp sets it) or default; default f32",
    "threads": "threads of the cpu backend, which cuts the KV range by them; default 1",
    "timeout": f"seconds that one call may take; default {CALL_LIMIT_S}",
}
GGML_CAPABILITIES = Capabilities(
    lse=False,
    alibi=False,
    plans=False,
    strided=False,
    zero_for_empty_rows=False,
    dtypes=("float16",),
    caches=GGML_CACHES,
)
_HALF = ("float16", "bfloat16")
_PLAIN = Capabilities(
    lse=False, sliding_window=False, softcap=False, sinks=False, alibi=False, plans=False, head_groups=False,
    empty_rows=False,
)  # fmt: skip
_DECODE_ON_CUDA = Capabilities(
    sinks=False, alibi=False, plans=False, head_groups=False, empty_rows=False, v_size=False,
    paths=("decode",), devices=("cuda",), dtypes=_HALF,
)  # fmt: skip


def _with(base: Capabilities, **has: object) -> Capabilities:
    return Capabilities(**{**vars(base), **has})


# Rows of a prefill call see keys by a mask, and not every backend takes one. Of cuDNN torch says that it is
# not deterministic, and does not choose it where deterministic algorithms are demanded.
SDPA_CAPABILITIES: dict[str, Capabilities] = {
    "flash": _with(_PLAIN, paths=("decode",), dtypes=_HALF, v_size=False),
    "cudnn": _with(
        _PLAIN,
        paths=("decode",),
        dtypes=_HALF,
        v_size=False,
        devices=("cuda",),
        size_multiple=8,
        deterministic=False,
        row_alone=False,
    ),
    "math": _PLAIN,
    "efficient": _with(_PLAIN, devices=("cuda",)),
}
FLEX_CAPABILITIES = Capabilities(
    sinks=False, plans=False, head_groups=False, empty_rows=False, row_alone=False,
)  # fmt: skip
LIBRARY_CAPABILITIES: dict[str, Capabilities] = {
    "flashinfer": _with(_DECODE_ON_CUDA, k_sizes=(64, 128, 256)),
    "flash_attn": _with(_DECODE_ON_CUDA, alibi=True, deterministic=False, row_alone=False),
    "xformers": _with(_DECODE_ON_CUDA, lse=False, sliding_window=False, softcap=False),
}
assert LIBRARY_CAPABILITIES.keys() == LIBRARIES.keys()


def _here() -> None:
    return None


class KernelEntry(NamedTuple):
    """A kernel: its name, its options, and why it cannot run here."""

    name: str  # as a specification has it
    summary: str  # one line
    options: Mapping[str, str]  # of its specification, and what each does
    why_not: Callable[[], str | None] = _here  # why it cannot run here; None: it can
    variants: tuple[str, ...] = ()  # names after a colon, one of which must be given
    # What is known before it is built, by its name or its variants'.
    limits: Mapping[str, Capabilities] = MappingProxyType({})


CATALOGUE: dict[str, KernelEntry] = {
    entry.name: entry
    for entry in (
        KernelEntry(
            "exact",
            "float64 softmax(QK)V: the oracle",
            {"acc": "float64; int8 or double-float32 slices for GPUs with slow float64; default: the run's"},
        ),
        KernelEntry("eager", "tiled online softmax in plain torch, any plan, CPU or GPU", TILE_OPTIONS),
        KernelEntry(
            "flash",
            "our CUDA kernel; where it cannot run, `eager` runs in its place and the verdict says so",
            FLASH_OPTIONS,
            why_not_flash,
        ),
        KernelEntry(
            "py",
            "your own: py:FILE.py::FUNCTION or py:package.module::Class(size=64), in a process of its own;"
            " options that are not listed are handed to it",
            PYTHON_OPTIONS,
        ),
        KernelEntry(
            "merge",
            "a merge of yours alone, merge:FILE.py::FUNCTION, given (o_a, lse_a, o_b, lse_b), over parts of"
            " `eager`, in a process of its own",
            MERGE_OPTIONS,
        ),
        KernelEntry(
            "hub",
            "a kernel of Hugging Face's hub, through its library `kernels`: hub:ORG/NAME::FUNCTION",
            HUB_OPTIONS,
            partial(why_not_installed, "kernels"),
        ),
        KernelEntry(
            "hf",
            "an attention function of transformers: hf:sdpa, hf:eager and what else is registered there",
            {},
            partial(why_not_installed, "transformers"),
        ),
        KernelEntry(
            "ggml",
            "ggml_flash_attn_ext of a built llama.cpp or ik_llama.cpp, run in a process of its own",
            GGML_OPTIONS,
            limits={"ggml": GGML_CAPABILITIES},
        ),
        KernelEntry(
            "sdpa",
            "torch's scaled_dot_product_attention, one backend of it",
            {},
            variants=tuple(SDPA_CAPABILITIES),
            limits={f"sdpa:{name}": has for name, has in SDPA_CAPABILITIES.items()},
        ),
        KernelEntry(
            "flex",
            "torch's FlexAttention: compiled on CUDA, in plain torch elsewhere",
            {},
            limits={"flex": FLEX_CAPABILITIES},
        ),
        *(
            KernelEntry(
                name,
                f"decode kernel of the library {name}",
                {},
                partial(why_not_library, name),
                limits={name: has},
            )
            for name, has in LIBRARY_CAPABILITIES.items()
        ),
    )
}
