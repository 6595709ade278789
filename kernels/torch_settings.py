"""What torch is set to for the whole process, kept and put back: our own sums change nothing for others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class TorchSettings(NamedTuple):
    """The settings on which a kernel's numbers depend."""

    # None where a caller sets it in another way, a backend at a time: then it is left alone.
    precision: str | None
    cudnn_tf32: bool
    grad: bool
    threads: int | None = None  # of an operator on the CPU; None: left alone

    @classmethod
    def now(cls) -> TorchSettings:
        try:
            precision = torch.get_float32_matmul_precision()
        except RuntimeError:
            precision = None
        tf32, grad = torch.backends.cudnn.allow_tf32, torch.is_grad_enabled()
        return cls(precision, tf32, grad, torch.get_num_threads())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it these hold; what held before holds again afterwards."""
        before = TorchSettings.now()
        self._replace_those_of(before)
        try:
            yield
        finally:
            before._replace_those_of(self)

    def _replace_those_of(self, others: TorchSettings) -> None:
        if None not in (self.precision, others.precision) and self.precision != others.precision:
            torch.set_float32_matmul_precision(str(self.precision))
        if self.cudnn_tf32 != others.cudnn_tf32:
            torch.backends.cudnn.allow_tf32 = self.cudnn_tf32
        torch.set_grad_enabled(self.grad)
        if self.threads is not None and others.threads not in (None, self.threads):
            torch.set_num_threads(self.threads)


# What exact results and budgets are computed with.
MEASURING = TorchSettings(precision="highest", cudnn_tf32=False, grad=False)
