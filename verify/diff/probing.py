"""Probes in the kernel diff: every kernel on inputs whose right answer is known, at each shape and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from verify.arms.attempt import Attempt, attempt
from verify.diff.examining import CellInputs, KernelEvidence, by_cache
from verify.kernels.budget.bound import Budget, error_budgets
from verify.kernels.call import AttentionOutput
from verify.kernels.judging.contract import empty_row_sentence, of_empty_rows
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes import Probe, ProbeFailure, judge, on_cache, probe_makers
from verify.kernels.kernel import Kernel
from verify.machine.stages import StageClock

PROBES = "probes"
# Failures of one probe that are kept: the first says what is wrong.
MOST_FAILURES = 1
# That are looked at, so that those of rows which see no key are told from others.
MOST_JUDGED = 256


class Probing(NamedTuple):
    """One shape and length to probe, in the place of inputs; candidates: as `CellInputs` has them; brief:
    each key is asked for once (`probe_makers`)."""

    shape: str
    n_kv: int
    sizes: InputSizes
    candidates: tuple[int, ...] | None = None
    brief: bool = False

    @property
    def inputs(self) -> CellInputs:
        """Stands for the probes in the report; its call is the smallest that there is."""
        one = self.sizes.__class__(n_kv=(1,), spare=0, edges=())
        return CellInputs(self.shape, self.n_kv, PROBES, 0, draw("gaussian", one, 0))


def probe_kernels(
    kernels: Sequence[Kernel],
    probing: Probing,
    device: torch.device,
    clock: StageClock,
    *,
    strict: bool = False,
) -> list[KernelEvidence]:
    """What each kernel's failed probes say; those that ask for an option a kernel lacks are left out.

    strict: a user's kernel must be right for a row that sees no key too.
    """
    found = [KernelEvidence(kernel.spec, refused=True) for kernel in kernels]
    for make in probe_makers(probing.sizes, device=device, brief=probing.brief):
        with clock.stage("probes made", probing.n_kv):
            probe = make()
        tried = []
        for kernel in kernels:
            with clock.stage(f"probes of {kernel.spec}", probing.n_kv):
                tried.append(attempt(kernel, probe.call))
        for evidence, each in zip(found, tried, strict=True):
            evidence.refused &= each.unsupported
        with clock.stage("probes judged", probing.n_kv):
            for which in by_cache(kernels):
                seen = on_cache(probe, kernels[which[0]].held(probe.call))
                failures = _failures([kernels[i] for i in which], seen, [tried[i] for i in which])
                for i, failed in zip(which, failures, strict=True):
                    promised = strict or kernels[i].capabilities().zero_for_empty_rows
                    excused = [] if promised else failed.empty_rows
                    if excused and not found[i].contract:
                        found[i].contract = empty_row_sentence(kernels[i].spec, f"{excused[0].got:.3g}")
                    wrong = failed.others if excused else [*failed.others, *failed.empty_rows]
                    found[i].probes_failed += [*failed.words, *map(str, wrong[:MOST_FAILURES])]
    return found


class _Failures(NamedTuple):
    """words: of a kernel that failed altogether; wrong results of rows that see no key, and of the others."""

    words: list[str]
    empty_rows: list[ProbeFailure]
    others: list[ProbeFailure]


def _failures(kernels: Sequence[Kernel], probe: Probe, tried: Sequence[Attempt]) -> list[_Failures]:
    """What is wrong with each kernel's result. Kernels that round alike share a budget."""
    call = probe.call
    arithmetics = [kernel.arithmetic_of(call) for kernel in kernels]
    budgets: Sequence[Budget | None] = [None] * len(kernels)
    if probe.demand == "budget":
        budgets = error_budgets(call, arithmetics)
    failures = []
    for kernel, each, arithmetic, budget in zip(kernels, tried, arithmetics, budgets, strict=True):
        if each.output is None:
            words = [] if each.unsupported else [f"probe {probe.name}: {each.failure}"]
            failures.append(_Failures(words, [], []))
            continue
        result: AttentionOutput = each.output
        if not kernel.capabilities().lse:
            # A kernel that returns no lse is not judged by it.
            due = budget.lse if budget is not None else probe.lse
            result = AttentionOutput(result.out, result.lse if due is None else due)
        wrong = judge(probe, result, arithmetic, most=MOST_JUDGED, budget=budget)
        failures.append(_Failures([], *of_empty_rows(wrong)))
    return failures
