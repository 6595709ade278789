"""What is run once more where a candidate's free-running divergence is not explained.

Arms with noise, and the calls of a window, again and again: a kernel that does not give one result for one
call is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from verify.arms.arm import STEADY_TIMES, Arm, ArmRunner, kernel_call
from verify.arms.attempt import attempt
from verify.data import Windows
from verify.kernels.exact import exact_attention
from verify.model.layer_call import LayerCall
from verify.model.runner import Runner
from verify.ppl.evidence.steadiness import level_of
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
