"""Calls of a window asked again and again: a kernel that does not give one result for one call is found."""

from __future__ import annotations

from typing import NamedTuple

import torch

from verify.arms.arm import STEADY_TIMES, Arm, ArmRunner, kernel_call
from verify.arms.attempt import attempt
from verify.data import Windows
from verify.kernels.exact import exact_attention
from verify.model.layer_call import LayerCall
from verify.model.runner import Runner

# How often each layer's call is asked.
TIMES = 8


class Reasked(NamedTuple):
    """calls: that were asked; unsteady: where one gave another result, and how far off, if one did."""

    calls: int
    unsteady: str | None


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
