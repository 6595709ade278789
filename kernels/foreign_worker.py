"""The process in which a user's kernel runs. A script: it imports nothing of ours.

Arguments: file descriptor to read questions from, one to write answers to, one of the shared memory, the
user's file, its function. Questions and answers are lines of JSON; the first answer says whether the function
could be loaded, and which optional arguments it takes.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import mmap
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

ALWAYS = ("q", "k", "v", "kv_len", "scale")
OPTIONAL = ("path", "sliding_window", "softcap", "sinks", "alibi_slopes")


class Unusable(Exception):
    """The file or its function cannot be used: the message is the whole story."""


def load(file: str, name: str) -> tuple[Any, list[str]]:
    """The function, and which of OPTIONAL it takes."""
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location("user_kernel", file)
    if spec is None or spec.loader is None:
        raise Unusable(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_kernel"] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Unusable(f"{file} does not import: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise Unusable(f"{file} has no function {name}")
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function, list(OPTIONAL)
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    unknown = [n for n in needed[3:] if n not in (*ALWAYS, *OPTIONAL)]
    missing = [n for n in ("kv_len", "scale") if n not in parameters]
    if len(needed) < 3 or unknown or missing:
        raise Unusable(
            f"{name}{inspect.signature(function)}: expected (q, k, v, *, kv_len, scale) and any of"
            f" {', '.join(OPTIONAL)}"
        )
    return function, [n for n in OPTIONAL if n in parameters]


def answer_call(
    function: Any, takes: list[str], question: dict[str, Any], memory: mmap.mmap
) -> dict[str, Any]:
    """Run one call and write its result, as float32, behind the inputs."""
    device = question["device"]
    tensors = {}
    for name, (dtype, shape, offset) in question["tensors"].items():
        count = 1
        for n in shape:
            count *= n
        flat = torch.frombuffer(memory, dtype=getattr(torch, dtype), count=count, offset=offset)
        tensors[name] = flat.view(shape).to(device)
    options = {"path": question["path"], "sliding_window": question["sliding_window"]}
    options |= {"softcap": question["softcap"]}
    options |= {name: tensors.get(name) for name in ("sinks", "alibi_slopes")}
    with torch.no_grad():
        result = function(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            kv_len=tensors["kv_len"],
            scale=question["scale"],
            **{name: options[name] for name in takes},
        )
    out, lse = result if isinstance(result, (tuple, list)) and len(result) == 2 else (result, None)
    expected = question["out_shape"]
    for name, x, shape in (("out", out, expected), ("lse", lse, expected[:3])):
        if x is None and name == "lse":
            continue
        if not isinstance(x, torch.Tensor):
            return {"failure": "shape", "message": f"{name} is a {type(x).__name__}, expected a tensor"}
        if list(x.shape) != shape:
            return {"failure": "shape", "message": f"{name} has shape {list(x.shape)}, expected {shape}"}
        if not x.dtype.is_floating_point:
            return {"failure": "dtype", "message": f"{name} is {x.dtype}, expected a float dtype"}
        if x.device != tensors["q"].device:
            return {"failure": "device", "message": f"{name} is on {x.device}, expected {device}"}
    count = out.numel()
    both = count + count // max(expected[3], 1)
    target = torch.frombuffer(memory, dtype=torch.float32, count=both, offset=question["out_offset"])
    target[:count] = out.detach().reshape(-1).float().cpu()
    if lse is None:
        target[count:] = float("nan")
    else:
        target[count:] = lse.detach().reshape(-1).float().cpu()
    return {"dtype": str(out.dtype).removeprefix("torch."), "lse": lse is not None}


def main() -> None:
    questions = os.fdopen(int(sys.argv[1]), "rb")
    answers = os.fdopen(int(sys.argv[2]), "wb", buffering=0)
    shared, file, name = int(sys.argv[3]), sys.argv[4], sys.argv[5]
    # The tool decides what a Ctrl-C means; it ends this process by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")

    try:
        function, takes = load(file, name)
    except Unusable as error:
        say({"failure": "import", "message": str(error)})
        return
    say({"takes": takes})
    for line in questions:
        question = json.loads(line)
        memory = mmap.mmap(shared, question["bytes"])
        try:
            answer = answer_call(function, takes, question, memory)
        except Exception as error:
            traceback.print_exc()
            answer = {"failure": "raised", "message": f"{type(error).__name__}: {error}"}
        say(answer)


if __name__ == "__main__":
    main()
