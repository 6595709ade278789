"""What is run once more where a candidate's free-running divergence is not explained.

Arms with noise, and the calls of a window, again and again: a kernel that does not give one result for one
call is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from verify.arms.arm import STEADY_TIMES, Arm, ArmRunner, kernel_call
from verify.arms.attempt import attempt
from verify.arms.sample import Sample
from verify.data import Windows
from verify.kernels.exact import exact_attention
from verify.model.layer_call import LayerCall
from verify.model.runner import Runner
from verify.ppl.evidence.scores import Scores
from verify.ppl.evidence.steadiness import NOISE_ARMS, Unexplained, level_of, unexplained
from verify.ppl.groups import GroupResult
from verify.ppl.listener import Listener
from verify.ppl.preparation import Preparation
from verify.ppl.record import FreeLevel
from verify.ppl.scoring import Scorer

# How often each layer's call is asked.
TIMES = 8
# That arms with noise run, at most: 8,192 tokens of 512.
NOISE_WINDOWS = 16


class Reasked(NamedTuple):
    """calls: that were asked; unsteady: where one gave another result, and how far off, if one did."""

    calls: int
    unsteady: str | None


class OnceMore:
    """What became of candidates whose free-running divergence nothing explains, and is asked once more.

    runner, sample: the run's; alone: whether it is one process, which alone can run something again.
    unsteady: by candidate, in words, where noise does not explain it either. free_noise: how far arms with
    noise come to lie from exact, where a candidate needed them.
    """

    def __init__(
        self, prepared: Preparation, runner: Runner, sample: Sample, listener: Listener, *, alone: bool
    ) -> None:
        self.prepared, self.runner, self.sample = prepared, runner, sample
        self.listener, self.alone = listener, alone
        self.unsteady: dict[str, str] = {}
        self.free_noise: list[FreeLevel] = []

    def ask(self, joined: GroupResult) -> None:
        """Find such candidates, and ask their calls again; a call that is unsteady is put into `joined`."""
        windows, arms = self.prepared.windows, self.prepared.arms
        scores = Scores(joined, windows.scored_per_window)
        floor = next((arm.name for arm in arms if arm.role == "floor"), None)
        for arm in arms:
            of_arm = joined.findings[arm.name]
            if arm.role != "candidate" or not arm.reference or of_arm.failed:
                continue
            found = unexplained(scores, arm.name, arm.reference, floor)
            if found is None:
                continue
            if self.alone:
                found = self._beyond_noise(scores, arm, found, floor)
                if found is None:
                    continue
            self.unsteady[arm.name] = str(found)
            if not self.alone or of_arm.unsteady is not None:
                continue
            self.listener.notice(f"{arm.spec} is {found}: window {found.window + 1} is asked again")
            asked = reask(self.runner, windows, found.window, arm, self.prepared.prompt)
            joined.findings[arm.name] = replace(of_arm, unsteady=asked.unsteady)
            self.unsteady[arm.name] += (
                f"; {asked.calls} calls of window {found.window + 1}, asked again, were steady"
            )

    def _beyond_noise(
        self, scores: Scores, arm: Arm, found: Unexplained, floor: str | None
    ) -> Unexplained | None:
        """What is left of it beside arms with noise, which run for the first candidate that needs them."""
        prepared = self.prepared
        if not self.free_noise:
            self.listener.notice(f"{arm.spec} is {found}: {NOISE_ARMS} arms with noise are run beside it")
            measured = [w for w in range(prepared.windows.n_windows) if w in self.sample]
            self.free_noise = noise_levels(
                self.runner,
                prepared.windows,
                measured[:: -(-len(measured) // NOISE_WINDOWS)],
                exact=next(one for one in prepared.arms if one.role == "exact"),
                prompt=prepared.prompt,
                arms=NOISE_ARMS,
                seed=prepared.settings.seed,
            )
        left = unexplained(scores, arm.name, arm.reference or "", floor, self.free_noise)
        if left is None:
            self.listener.notice(f"{arm.spec}: arms with noise explain what it is running freely")
        return left


def noise_levels(
    runner: Runner,
    windows: Windows,
    chosen: Sequence[int],
    *,
    exact: Arm,
    prompt: Arm | None,
    arms: int,
    seed: int,
) -> list[FreeLevel]:
    """How far so many arms, exact attention with a rounding of noise of its own each, come to lie from exact
    in the chosen windows, running freely."""
    found: dict[str, list[np.ndarray]] = {f"noise {i + 1}": [] for i in range(arms)}
    scored = windows.scored_positions
    for window in chosen:
        tokens = torch.from_numpy(windows.tokens[window : window + 1])
        if prompt is not None:
            tokens = tokens[:, : scored.stop]
        targets = torch.from_numpy(windows.targets[window].astype(np.int64)).to(runner.device)
        scorer = Scorer(exact=exact.name, baseline_of={}, targets=targets)
        runners = [ArmRunner(exact, {})]
        # The floor's own seed is the run's.
        runners += [
            ArmRunner(Arm(name, "floor", "exact", exact.path), {}, seed=seed + 1 + i)
            for i, name in enumerate(found)
        ]
        slices = runner.run_group(
            tokens,
            runners,
            scored=scored,
            first_window=window,
            prompt=ArmRunner(prompt, {}) if prompt is not None else None,
        )
        for piece in slices:
            scorer.add(piece)
        scores = scorer.scores()
        for name, klds in found.items():
            klds.append(scores[name].kld_to_exact)
    return [level_of(np.stack(klds)) for klds in found.values()]


def reask(runner: Runner, windows: Windows, window: int, arm: Arm, prompt: Arm | None) -> Reasked:
    """Ask every layer's call of one window, the exact arm's, TIMES times: is one of them unlike the others?

    Unlike is what lies more than STEADY_TIMES the least of their errors away from exact.
    """
    calls, unsteady = 0, None

    def on_exact(call: LayerCall, oracle: torch.Tensor) -> None:
        nonlocal calls, unsteady
        assert arm.kernel is not None
        whole = kernel_call(call, arm.path)
        own = arm.kernel.held(whole)
        exact = oracle if own is whole else exact_attention(own, with_lse=False).out
        tried = [attempt(arm.kernel, whole) for _ in range(TIMES)]
        errors = [float((one.output.out.double() - exact).norm()) for one in tried if one.output is not None]
        calls += len(tried)
        least = max(min(errors, default=0.0), 1e-300)
        bad = [error for error in errors if not error <= STEADY_TIMES * least]
        if bad and unsteady is None:
            unsteady = (
                f"window {call.window + 1}, layer {call.layer}, in {len(bad)} of {len(errors)} calls:"
                f" {max(bad) / least:.3g} times its error"
            )

    tokens = torch.from_numpy(windows.tokens[window : window + 1])
    if prompt is not None:
        tokens = tokens[:, : windows.scored_positions.stop]
    slices = runner.run_group(
        tokens,
        [ArmRunner(Arm("exact", "exact", "exact", arm.path), {}, on_exact=on_exact)],
        scored=windows.scored_positions,
        first_window=window,
        prompt=ArmRunner(prompt, {}) if prompt is not None else None,
    )
    for _ in slices:
        pass
    return Reasked(calls, unsteady)
