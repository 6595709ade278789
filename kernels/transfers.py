"""A few numbers between the host and a device, while the device still works off what it was given before.

`torch.tensor(values, device=cuda)` and `x.tolist()` both wait until the device has done everything so far,
which then idles while the host makes up the next launches. From pinned memory a copy takes its place in the
queue, and an event says when that one copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def uploaded(
    values: Sequence[int] | Sequence[float] | Sequence[bool], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """A tensor [len(values)] of host numbers on a device; nothing waits for the copy.

    >>> uploaded([3, 1], torch.device("cpu"), torch.int64).tolist()
    [3, 1]
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Download:
    """Numbers of a tensor on their way to the host since this was made; nobody may write to a CPU tensor
    before they are asked for.

    >>> Download(torch.tensor([3, 1])).numbers()
    [3, 1]
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._host, self._ready = x, None
        if x.is_cuda:
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(x.device))

    def numbers(self) -> list[Any]:
        """The numbers, as `tolist` gives them; waits for their copy alone."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._host.tolist()
