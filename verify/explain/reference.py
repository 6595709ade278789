"""The model as a reference: tokens that somebody else wrote, given to it again under several kernels.

Each pass is teacher-forced, one call over all tokens, every row on the decode path as if it were alone. A
pass runs freely: its own q, k and v are rounded as an engine's cache rounds them, so that what it differs by
is what two engines differ by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from verify.arms.arm import Arm, ArmRunner
from verify.arms.likelihood import divergence, log_probabilities
from verify.kernels.errors import KernelFailure
from verify.kernels.faults.altered import AlteredKernel, newest_key_unseen, next_heads_keys
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel
from verify.machine.devices import chosen_device, default_device, free_memory
from verify.machine.errors import UsageError
from verify.model.architectures import architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.locate import locate_model
from verify.model.steps import Stepper, weight_bytes
from verify.model.tokenizer import Tokenizer

# Rows of float64 numbers of the vocabulary's width that are held at once.
_ROWS = 32


class Pass(NamedTuple):
    """One way to compute attention."""

    name: str  # unique
    role: Literal["exact", "floor", "kernel"] = "kernel"  # floor: exact attention and one rounding of noise
    spec: str = "exact"  # of its kernel
    seed: int = 0  # of the noise
    # What q, k and v are rounded to.
    attention_type: str = "f16"
    # Made where `spec` has no kernel of the registry.
    build: Callable[[], Kernel] | None = None


EXACT = Pass("exact", "exact")
BASELINE = "flash"


def unseen_key() -> Kernel:
    return AlteredKernel(f"{BASELINE} without the newest key", build_kernel(BASELINE), newest_key_unseen)


def wrong_head() -> Kernel:
    return AlteredKernel(f"{BASELINE} on the next KV head", build_kernel(BASELINE), next_heads_keys)


class ReferencePasses:
    """One model on one device, its weights kept where memory allows. Raises ModelError or UsageError."""

    def __init__(self, model: str | None, device: str | None = None) -> None:
        self.device = chosen_device(device or default_device())
        self.architecture = architecture_of(GGUFFile.open(locate_model(model)))
        self.tokenizer = Tokenizer.from_gguf(self.architecture.file)
        keep = weight_bytes(self.architecture) < free_memory(self.device) // 2
        self._root = Stepper(self.architecture, [], device=self.device, keep_weights=keep)
        self._kernels: dict[str, Kernel] = {}

    def close(self) -> None:
        for kernel in self._kernels.values():
            kernel.close()
        self._root.close()

    def check(self, tokens: Sequence[int], where: str) -> None:
        """Raises UsageError for tokens that are not of this model's vocabulary."""
        most = self.architecture.sizes.vocabulary
        for i, token in enumerate(tokens):
            if not 0 <= token < most:
                raise UsageError(f"{where}: token {i} is {token}, expected 0 to {most - 1} of {self.name}")

    @property
    def name(self) -> str:
        return self.architecture.file.path.name

    def logits(self, tokens: Sequence[int], way: Pass, scored: int) -> torch.Tensor:
        """[scored, vocabulary] float32, after each of the last `scored` tokens.

        Raises KernelFailure where the kernel does not take such a call, or fails.
        """
        if way.role == "kernel" and way.name not in self._kernels:
            self._kernels[way.name] = way.build() if way.build is not None else build_kernel(way.spec)
        kernel = self._kernels.get(way.name)
        arm = Arm(way.name, "candidate" if kernel else way.role, way.spec, "decode", kernel)  # type: ignore[arg-type]
        runner = ArmRunner(arm, {}, seed=way.seed)
        stepper = self._root.beside([runner])
        stepper.attention_type = way.attention_type
        found = stepper.step(torch.tensor(list(tokens)), scored=scored).get(way.name)
        if found is None:
            raise KernelFailure(way.spec, runner.findings.failure or "gave no result")
        return found


def divergences(of: torch.Tensor, to: torch.Tensor) -> np.ndarray:
    """KL(to, of) of every row of logits [n, vocabulary], in float64."""
    pieces = zip(to.split(_ROWS), of.split(_ROWS), strict=True)
    found = [divergence(log_probabilities(p), log_probabilities(q)) for p, q in pieces]
    return torch.cat(found).cpu().numpy()
