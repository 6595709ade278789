"""The servant of `merge:` kernels: a user's merge, loaded and called. Imports what lies beside it alone."""

from __future__ import annotations

import inspect
import mmap
from collections.abc import Callable
from typing import Any

import torch
from worker import Refusal, module_beside  # type: ignore[import-not-found]

python = module_beside("python_servant")
forms = python.forms


def load(arguments: dict[str, Any]) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """The greeting says whether the merge writes its result into what it is given. Raises Refusal."""
    try:
        function = forms.load_callable(
            arguments["where"],
            arguments["names"],
            arguments=arguments["arguments"],
            method=arguments["method"],
        )
    except forms.FormError as error:
        raise Refusal(str(error)) from error
    return {"writes": writes(function)}, lambda question, memory: answer(function, question, memory)


def writes(function: Any) -> bool:
    """Whether a merge writes its result into what it is given, as vLLM's merge_attn_states does."""
    try:
        return {"output", "prefix_output", "suffix_output"} <= set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False


def answer(function: Any, question: dict[str, Any], memory: mmap.mmap) -> dict[str, Any]:
    """Merge two parts and write the result, as float32, behind them."""
    given = python.tensors_of(question, memory)
    o_a, lse_a, o_b, lse_b = (given[name] for name in ("o_a", "lse_a", "o_b", "lse_b"))
    with torch.no_grad():
        if writes(function):
            out, lse = torch.empty_like(o_a), torch.empty_like(lse_a.T.contiguous())
            function(
                output=out, prefix_output=o_a, prefix_lse=lse_a.T.contiguous(), suffix_output=o_b,
                suffix_lse=lse_b.T.contiguous(), output_lse=lse,
            )  # fmt: skip
            found: Any = (out, lse.T)
        else:
            found = function(o_a, lse_a, o_b, lse_b)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        return {"failure": "shape", "message": f"returned a {type(found).__name__}, expected (o, lse)"}
    for name, x, shape in (("o", found[0], o_a.shape), ("lse", found[1], lse_a.shape)):
        if not isinstance(x, torch.Tensor) or x.shape != shape:
            what = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            return {"failure": "shape", "message": f"{name} is {what}, expected {list(shape)}"}
        if not x.dtype.is_floating_point:
            return {"failure": "dtype", "message": f"{name} is {x.dtype}, expected a float dtype"}
    for name, x in zip(("out", "lse"), found, strict=True):
        python.put(memory, x, question["results"][name][1])
    return {"lse": True, "dtype": str(found[0].dtype).removeprefix("torch.")}
