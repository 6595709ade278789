"""The smallest inputs on which a kernel still fails: fewer heads and keys of the same kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from verify.diff.cells import faults_of
from verify.diff.examining import CellInputs, KernelEvidence, examine
from verify.diff.inputs import DiffSettings, sizes_of_cell
from verify.diff.probing import PROBES
from verify.kernels.budget.bound import error_budget
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.errors import KernelFailure
from verify.kernels.judging.contract import of_empty_rows
from verify.kernels.judging.families import draw
from verify.kernels.judging.probes import Probe, judge, on_cache, probe_makers
from verify.kernels.kernel import Kernel
from verify.kernels.plans.shapes import shape_named
from verify.machine.stages import StageClock

# Head sizes that are tried, and rows: the fewest that a draw has.
_SIZES, _ROWS = (16, 32, 64), 2
# Lengths that are tried before the smallest is sought between two of them.
_LENGTHS = (1, 2, 3, 4, 8, 16, 17, 32, 33, 64, 65, 96, 128, 129, 200, 256, 300, 512, 1024)


class Failing(NamedTuple):
    """Inputs on which a kernel fails."""

    shape: str  # of the layer
    n_kv: int  # visible keys
    family: str  # or the name of a probe
    call: Call  # that it fails on
    said: str  # what is wrong
    evidence: KernelEvidence  # its errors; of a probe nothing but its name


class Shrinker:
    """Tries one kernel on inputs of one kind. settings: as the failure was met with; family: or a probe's
    name."""

    def __init__(self, kernel: Kernel, settings: DiffSettings, family: str, seed: int) -> None:
        self.kernel, self.family, self.seed = kernel, family, seed
        self.settings = replace(settings, rows=_ROWS)
        self.device = torch.device(settings.device)

    def smallest(self, shape: str, n_kv: int) -> Failing | None:
        """The smallest that still fails; None where none of two rows does."""
        found = self.tried(shape, n_kv)
        if found is None:
            return None
        for smaller in _smaller_shapes(shape):
            if (one := self.tried(smaller, n_kv)) is not None:
                found = one
                break
        passed = 0
        for n in (n for n in _LENGTHS if n < n_kv):
            if (one := self.tried(found.shape, n)) is not None:
                found = one
                break
            passed = n
        while found.n_kv - passed > 1:
            middle = (found.n_kv + passed) // 2
            one = self.tried(found.shape, middle)
            if one is None:
                passed = middle
            else:
                found = one
        return found

    def tried(self, shape: str, n_kv: int) -> Failing | None:
        """The failure at these sizes, or None where there is none."""
        settings = replace(self.settings, shapes=(shape,), n_kvs=(n_kv,))
        try:
            if self.family in settings.families and self.family != PROBES:
                sizes = sizes_of_cell(settings, shape, n_kv, self.family)
                call = draw(self.family, sizes, self.seed, device=self.device)
                inputs = CellInputs(shape, n_kv, self.family, self.seed, call)
                (evidence,) = examine([self.kernel], inputs, StageClock(self.device))
                faults = faults_of(evidence, "") if evidence is not None else []
                if evidence is None or not faults:
                    return None
                return Failing(
                    shape=shape,
                    n_kv=n_kv,
                    family=self.family,
                    call=call,
                    said=faults[0].strip(": "),
                    evidence=evidence,
                )
            sizes = sizes_of_cell(settings, shape, n_kv, PROBES)
            for make in probe_makers(sizes, device=self.device):
                probe = make()
                if probe.name == self.family and (said := self._probed(probe)):
                    return Failing(
                        shape=shape,
                        n_kv=n_kv,
                        family=probe.name,
                        call=probe.call,
                        said=said,
                        evidence=KernelEvidence(self.kernel.spec),
                    )
        except (ValueError, IndexError):
            # Sizes that this kind of input, or a law of its making, does not have.
            return None
        return None

    def _probed(self, probe: Probe) -> str:
        try:
            result: AttentionOutput = self.kernel.run(probe.call)
        except KernelFailure as failure:
            return "" if failure.kind == "unsupported" else f"probe {probe.name}: {failure}"
        seen = on_cache(probe, self.kernel.held(probe.call))
        arithmetic = self.kernel.arithmetic_of(seen.call)
        if not self.kernel.capabilities().lse:
            due = error_budget(seen.call, arithmetic).lse if probe.lse is None else probe.lse
            result = AttentionOutput(result.out, due)
        empty, others = of_empty_rows(judge(seen, result, arithmetic))
        wrong = others if not self.kernel.capabilities().zero_for_empty_rows else [*others, *empty]
        return str(wrong[0]) if wrong else ""


def _smaller_shapes(text: str) -> Iterator[str]:
    """Shapes with fewer and smaller heads, the smallest first."""
    shape = shape_named(text)
    ratios = sorted({1, min(2, shape.ratio), shape.ratio})
    if shape.v_in_k or shape.k_size != shape.v_size:
        return
    for size in [n for n in _SIZES if n < shape.k_size] + [shape.k_size]:
        for kv in sorted({1, min(2, shape.kv_heads)}):
            for ratio in ratios:
                if (kv * ratio, kv, size) != (shape.q_heads, shape.kv_heads, shape.k_size):
                    yield f"{kv * ratio}/{kv}x{size}"
