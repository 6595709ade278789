"""From a specification to the kernel that it names. What can be named is in `catalogue`."""

from __future__ import annotations

from collections.abc import Callable

from verify.kernels.catalogue import CATALOGUE, LIBRARY_CAPABILITIES
from verify.kernels.eager import EagerKernel
from verify.kernels.errors import SpecError, nearest
from verify.kernels.exact import ExactKernel
from verify.kernels.flash.kernel import flash_kernel
from verify.kernels.flash.prepare import READERS
from verify.kernels.foreign.ggml_kernel import GgmlKernel
from verify.kernels.foreign.merge_kernel import MergeKernel
from verify.kernels.foreign.python_kernel import PythonKernel
from verify.kernels.kernel import Kernel
from verify.kernels.oracle_products import FLOAT64, PRODUCTS
from verify.kernels.peers.flex import FlexKernel
from verify.kernels.peers.hubs import hub_kernel, transformers_kernel
from verify.kernels.peers.libraries import LibraryKernel
from verify.kernels.peers.sdpa import SdpaKernel
from verify.kernels.plans.spec import NAMES_CODE, Spec, cache_option, check_options, choice, parse_spec
from verify.kernels.plans.tile_options import parse_tile_options


def _flash(spec: Spec) -> Kernel:
    return flash_kernel(
        spec.text,
        parse_tile_options(spec),
        cache=cache_option(spec),
        expand=choice(spec, "expand", "fused", ("fused", "f16")),
        reader=choice(spec, "reader", "auto", ("auto", *READERS)),
    )


def _exact(spec: Spec) -> Kernel:
    acc = choice(spec, "acc", FLOAT64, tuple(PRODUCTS)) if "acc" in spec.options else None
    return ExactKernel(spec.text, acc)


BUILDERS: dict[str, Callable[[Spec], Kernel]] = {
    "exact": _exact,
    "eager": lambda s: EagerKernel(s.text, parse_tile_options(s), cache_option(s)),
    "flash": _flash,
    "py": PythonKernel.from_spec,
    "merge": MergeKernel.from_spec,
    "ggml": GgmlKernel.from_spec,
    "hub": hub_kernel,
    "hf": transformers_kernel,
    "sdpa": SdpaKernel.from_spec,
    "flex": lambda s: FlexKernel(s.text),
    **dict.fromkeys(LIBRARY_CAPABILITIES, LibraryKernel.from_spec),
}
# Kernels of others that do not say how they cut a call nor what type they return: running them shows it.
UNTOLD = frozenset({"py", "ggml", "hub", "hf"})
# Options that are not ours are the callable's, which says whether it has them.
HANDS_ON = frozenset({"py", "hub"})


def build_kernel(text: str) -> Kernel:
    """The kernel of a specification.

    Raises SpecError, one line that names the specification and the nearest thing that is known.
    """
    spec = parse_spec(text)
    entry = CATALOGUE.get(spec.name)
    if entry is None:
        raise SpecError(
            f"kernel {text!r}: unknown kernel {spec.name!r}{nearest(spec.name, CATALOGUE)}"
            f" (known: {', '.join(CATALOGUE)})"
        )
    if spec.target and not entry.variants and spec.name not in NAMES_CODE:
        raise SpecError(f"kernel {text!r}: {spec.target!r} is not of the form option=value")
    if entry.variants and spec.target not in entry.variants:
        wanted = ", ".join(f"{entry.name}:{variant}" for variant in entry.variants)
        raise SpecError(f"kernel {text!r}: expected one of {wanted}")
    if spec.name not in HANDS_ON:
        check_options(spec, entry.options)
    return BUILDERS[spec.name](spec)
