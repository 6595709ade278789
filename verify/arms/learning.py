"""Kernels of arms that state nothing, read before a model is run through them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from verify.arms.arm import Arm
from verify.arms.model_facts import few_rows, unlike_layers
from verify.identify.learning import MOST_ROWS, learn, lengths_to, states_nothing
from verify.kernels.cache_types import run_cache
from verify.kernels.call import AttentionPath
from verify.kernels.heads import Heads
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import FLOAT_TYPES
from verify.model.architectures.architecture import Architecture


def learn_arms(
    arms: Sequence[Arm],
    architecture: Architecture,
    cache_type: str,
    *,
    longest: int,
    rows: int,
    device: torch.device,
    prompt: int = 0,
) -> list[str]:
    """Read each such kernel at the heads of the model, at lengths up to the longest, in calls of one query
    token and of many.

    rows: of the longest call; prompt: query tokens of a prefill that runs beside it. Returns what a reader of
    the verdict must know. Layers with windows, sinks, a softcap or values in their keys are left out: nothing
    that is read speaks of them.
    """
    said: dict[str, None] = {}
    of_spec: dict[tuple[str, str], Kernel] = {}
    for arm in arms:
        if arm.kernel is None:
            continue
        heads = plain_heads(architecture, cache_type, device, arm)
        if not heads or not states_nothing(arm.kernel, arm.path, heads[0]):
            continue
        if (known := of_spec.get((arm.spec, arm.path))) is not None:
            if known.identified is not None:
                arm.kernel.budgets_follow(known.identified, known.seen)
            continue
        of_spec[arm.spec, arm.path] = arm.kernel
        said |= dict.fromkeys(
            learn(
                arm.kernel,
                heads,
                lengths_to(longest),
                path=arm.path,
                dtype=FLOAT_TYPES[run_cache(cache_type).attention].dtype,
                device=str(device),
                calls=_calls_of(arm, rows, prompt),
            )
        )
    return list(said)


def _calls_of(arm: Arm, rows: int, prompt: int) -> list[tuple[AttentionPath, int]]:
    """Path and query tokens of each call that is read."""
    tokens = (arm.form.n_q,) if arm.path == "several" else (1, min(rows, MOST_ROWS))
    calls = [(arm.path, n) for n in tokens]
    return [*calls, ("prefill", min(prompt, MOST_ROWS))] if prompt else calls


def plain_heads(architecture: Architecture, cache_type: str, device: torch.device, arm: Arm) -> list[Heads]:
    """Heads of the layers whose calls have no option."""
    found: dict[Heads, None] = {}
    for layer in unlike_layers(architecture):
        call = few_rows(architecture, layer, cache_type, device, arm.path)
        options = (call.sliding_window, call.softcap, call.sinks, call.alibi_slopes, call.v_in_k)
        if all(option is None for option in options):
            found[call.shape.heads] = None
    return list(found)
