"""Probes in the kernel diff: every kernel on inputs whose right answer is known, at each shape and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels.contract import AttentionOutput, Kernel
from kernels.errors import KernelFailure
from kernels.exact import exact_attention
from kernels.families import Sizes, draw
from kernels.probes import Probe, judge, standard_probes
from kernels.trace import LaunchTrace
from verify.cells import Inputs, KernelEvidence

PROBES = "probes"
# Failures of one probe that are kept: the first says what is wrong.
MOST_FAILURES = 1


class Probing(NamedTuple):
    """One shape and length to probe, in the place of inputs."""

    shape: str
    n_kv: int
    sizes: Sizes

    @property
    def inputs(self) -> Inputs:
        """Stands for the probes in the report; its call is the smallest that there is."""
        one = self.sizes.__class__(n_kv=(1,), spare=0, edges=())
        return Inputs(self.shape, self.n_kv, PROBES, 0, draw("gaussian", one, 0))


def probe_kernels(kernels: Sequence[Kernel], probing: Probing, device: torch.device) -> list[KernelEvidence]:
    """What each kernel's failed probes say; those that ask for an option a kernel lacks are left out."""
    found = [KernelEvidence(kernel.spec) for kernel in kernels]
    for probe in standard_probes(probing.sizes, device=device):
        for kernel, evidence in zip(kernels, found, strict=True):
            evidence.probes_failed += _failures(kernel, probe)
    return found


def _failures(kernel: Kernel, probe: Probe) -> list[str]:
    kept, kernel.trace = kernel.trace, LaunchTrace()
    try:
        result = kernel.run(probe.call)
    except KernelFailure as failure:
        if failure.kind == "unsupported":
            return []
        return [f"probe {probe.name}: {failure.kind}: {failure}"]
    except Exception as error:
        return [f"probe {probe.name}: raised {type(error).__name__}: {error}"]
    finally:
        kernel.trace = kept
    if bool(result.lse.isnan().all()):
        # A kernel that returns no lse is not judged by it.
        result = AttentionOutput(result.out, exact_attention(probe.call).lse)
    arithmetic = kernel.arithmetic(probe.call.shape, probe.call.path)
    return [str(failure) for failure in judge(probe, result, arithmetic, most=MOST_FAILURES)]
