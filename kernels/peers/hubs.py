"""Kernels of Hugging Face: of the hub, through its library `kernels`, and functions of transformers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from verify.kernels.errors import SpecError, nearest
from verify.kernels.foreign.forms import Wanted
from verify.kernels.foreign.function_kernel import FunctionKernel
from verify.kernels.foreign.python_kernel import FORM_OPTIONS, literal
from verify.kernels.here import why_not_installed
from verify.kernels.peers.peer import refuse
from verify.kernels.plans.spec import Spec, choice


def hub_kernel(spec: Spec) -> FunctionKernel:
    """`hub:ORG/NAME::FUNCTION`, loaded as the library loads it: code of others, run in this process.

    Raises SpecError where the library is not installed, or has no such kernel.
    """
    refuse(spec.text, why_not_installed("kernels"))
    repository, separator, names = spec.target.rpartition("::")
    if not separator or repository.count("/") != 1 or not names:
        raise SpecError(f"kernel {spec.text!r}: expected hub:ORG/NAME::FUNCTION")
    try:
        found: Any = import_module("kernels").get_kernel(repository)
    except Exception as error:
        raise SpecError(f"kernel {spec.text!r}: {repository} cannot be had: {error}") from None
    for name in names.split("."):
        near = nearest(name, [x for x in dir(found) if not x.startswith("_")])
        found = getattr(found, name, None)
        if found is None:
            raise SpecError(f"kernel {spec.text!r}: {repository} has no {names}{near}")
    options = {name: literal(x) for name, x in spec.options.items() if name not in (*FORM_OPTIONS, "acc")}
    wanted = Wanted(**{name: spec.options.get(name, "") for name in FORM_OPTIONS}, options=options)
    acc = choice(spec, "acc", "f32", ("f32", "f16")) if "acc" in spec.options else None
    return FunctionKernel(found, spec=spec.text, wanted=wanted, acc=acc)


def transformers_kernel(spec: Spec) -> FunctionKernel:
    """`hf:NAME`: what transformers has registered as attention under this name, and `hf:eager`.

    Raises SpecError where it is not installed, or has no such function.
    """
    refuse(spec.text, why_not_installed("transformers"))
    registered = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    if spec.target == "eager":
        # Every model has its own; they are copies of this one.
        function = import_module("transformers.models.llama.modeling_llama").eager_attention_forward
    elif spec.target in registered:
        function = registered[spec.target]
    else:
        known = ["eager", *(name for name in registered if not name.startswith("paged"))]
        hint = nearest(spec.target, known)
        raise SpecError(
            f"kernel {spec.text!r}: transformers has no attention {spec.target!r}{hint} (known:"
            f" {', '.join(known)})"
        )
    return FunctionKernel(_in_the_contract(function), spec=spec.text)


def _in_the_contract(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """A function of transformers, (module, query, key, value, mask, ...), heads before rows, as ours."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kv_len: torch.Tensor, scale: float
    ) -> torch.Tensor:
        # What it reads of the module that calls it.
        layer = SimpleNamespace(
            num_key_value_groups=q.shape[2] // k.shape[2], training=False, is_causal=False, config=None
        )
        # Engines hand it no memory beyond the longest row: what lies there may be anything.
        k, v = (x[:, : int(kv_len.max())] for x in (k, v))
        hidden = torch.arange(k.shape[1], device=q.device) >= kv_len[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
        mask = mask.masked_fill(hidden, torch.finfo(q.dtype).min)
        out, _ = function(
            layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scaling=scale, dropout=0.0
        )
        return out

    return attend
