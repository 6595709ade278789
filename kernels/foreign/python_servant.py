"""The servant of `py:` kernels: a user's callable, loaded and called. Imports nothing of ours but `forms`."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from typing import Any

import torch
from worker import Refusal, module_beside  # type: ignore[import-not-found]

Answer = Callable[[dict[str, Any], mmap.mmap], dict[str, Any]]


forms = module_beside("forms")


def load(arguments: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """The greeting says which options the callable takes, where it had to be asked why not others, and what
    else its form lacks. Raises Refusal."""
    try:
        function = forms.load_callable(
            arguments["where"],
            arguments["names"],
            arguments=arguments["arguments"],
            method=arguments["method"],
        )
        form = forms.form_of(function, arguments["name"], forms.Wanted(**arguments["wanted"]))
    except forms.FormError as error:
        raise Refusal(str(error)) from error
    greeting = {
        "takes": form.takes,
        "left_out": dict(form.left_out),
        "way": form.way,
        "layout": form.layout,
        "dtypes": form.dtypes,
        "one_head_each": form.one_head_each,
        "forms": form.forms,
        "never_right": form.never_right,
        "said": form.said,
    }
    return greeting, lambda question, memory: answer_call(form, question, memory)


def answer_call(form: Any, question: dict[str, Any], memory: mmap.mmap) -> dict[str, Any]:
    """Run one call and write its result, as float32, behind the inputs."""
    tensors = tensors_of(question, memory)
    options = {name: question[name] for name in ("path", "sliding_window", "softcap")}
    options |= {name: tensors.get(name) for name in ("sinks", "alibi_slopes", *forms.CALL_FORMS)}
    try:
        out, lse = form.run(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            kv_len=tensors["kv_len"],
            scale=question["scale"],
            **options,
        )
    except forms.FormFailure as failure:
        return {"failure": failure.kind, "message": str(failure)}
    (expected, out_offset), (_, lse_offset) = (question["results"][name] for name in ("out", "lse"))
    put(memory, out, out_offset)
    put(memory, torch.full(expected[:3], math.nan) if lse is None else lse, lse_offset)
    return {"lse": lse is not None, "dtype": str(out.dtype).removeprefix("torch.")}


def tensors_of(question: dict[str, Any], memory: mmap.mmap) -> dict[str, torch.Tensor]:
    """The tensors of a question, on its device."""
    tensors = {}
    for name, (dtype, shape, offset) in question["tensors"].items():
        count = 1
        for n in shape:
            count *= n
        flat = torch.frombuffer(memory, dtype=getattr(torch, dtype), count=count, offset=offset)
        tensors[name] = flat.view(shape).to(question["device"])
    return tensors


def put(memory: mmap.mmap, x: torch.Tensor, offset: int) -> None:
    """Write x as float32."""
    if x.numel():
        target = torch.frombuffer(memory, dtype=torch.float32, count=x.numel(), offset=offset)
        target.copy_(x.detach().reshape(-1))
