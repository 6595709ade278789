"""A device that is not there: tensors that say they lie on CUDA, and are refused where others meet them.

Kernels that create their own tensors can so be seen, without a GPU, to create them where the call's lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("cuda", 0)
# Indices may lie on the host, and copies go from one device to the other.
_CROSSING = {"__getitem__", "__setitem__", "copy_", "to", "cpu", "cuda"}
_HOST = {"cpu", "tolist", "item", "__bool__", "__int__", "__float__", "numpy"}


class Elsewhere(torch.Tensor):
    """A tensor of `ELSEWHERE`; its numbers are on the CPU."""

    device = property(lambda self: ELSEWHERE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]


class _Devices(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        # Most calls have no list of tensors, and trees of arguments would be most of the time.
        flat = [*args, *kwargs.values()]
        nested = any(isinstance(x, list | tuple | dict) for x in flat)
        leaves = tree_flatten(flat)[0] if nested else flat
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, Elsewhere) for x in tensors)
        if there and name not in _CROSSING:
            for x in tensors:
                # Numbers without a dimension may come from the host.
                if not isinstance(x, Elsewhere) and x.dim():
                    raise RuntimeError(f"{name}: {list(x.shape)} lies on the cpu, others on {ELSEWHERE}")
        asked = _asked_device(args if name == "to" else (), kwargs)
        if asked is not None:
            there = asked.type == ELSEWHERE.type
        if nested:
            args, kwargs = tree_map(_on_cpu, (tuple(args), kwargs))
        else:
            args, kwargs = [_on_cpu(x) for x in args], {key: _on_cpu(x) for key, x in kwargs.items()}
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if name in _HOST or not there:
            return found
        if isinstance(found, torch.Tensor):
            return found.as_subclass(Elsewhere)
        return tree_map(lambda x: x.as_subclass(Elsewhere) if isinstance(x, torch.Tensor) else x, found)


def _asked_device(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device | None:
    """The device that a call names."""
    for x in (*args[1:2], kwargs.get("device")):
        if isinstance(x, torch.device | str):
            return torch.device(x)
        if isinstance(x, torch.Tensor):
            return x.device
    return None


def _on_cpu(x: Any) -> Any:
    if isinstance(x, Elsewhere):
        return x.as_subclass(torch.Tensor)
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == ELSEWHERE.type else x


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Within it, tensors may be created on the device that it gives."""
    with _Devices():
        yield ELSEWHERE
