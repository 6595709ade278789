"""How many windows make a group, and which windows are still to be run.

A group is what is in memory together: one read of the model serves all of its windows and arms. Results do
not depend on it, so a run that goes on may have groups of another size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import torch

from verify.machine.environment import available_memory

# Tokens of a group where the weights are cheap to decode again: results then come often.
CPU_GROUP_TOKENS, GPU_GROUP_TOKENS = 1 << 11, 1 << 17


class Grouping(NamedTuple):
    """windows: of one group; memory: bytes that their hidden states may take."""

    windows: int
    memory: int

    def halved(self) -> Grouping:
        return Grouping(max(self.windows // 2, 1), self.memory // 2)


def group_windows(
    *,
    windows: int,
    at_once: int,
    n_ctx: int,
    state_bytes: int,
    model_bytes: int,
    memory: int | None,
    device: torch.device,
) -> Grouping:
    """As many windows as memory holds, fewer where decoding weights again is cheap.

    at_once: windows that the device computes side by side; state_bytes: of a window's hidden states, all arms
    together; model_bytes: of the file; memory: as the user gave it, or None for a share of what is free.
    """
    # Processes of one machine share its memory; each has a GPU of its own.
    main = available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else main
    share = memory or free // 4
    fitting = share // state_bytes
    if memory is None and model_bytes < main // 2:
        tokens = CPU_GROUP_TOKENS if device.type == "cpu" else GPU_GROUP_TOKENS
        fitting = min(fitting, -(-tokens // n_ctx))
    if fitting > at_once:
        fitting -= fitting % at_once
    return Grouping(max(min(fitting, windows), 1), share)


def uncovered(finished: Mapping[int, int], windows: int) -> list[range]:
    """The windows that no finished group holds. finished: first window -> number of windows."""
    left = []
    at = 0
    for first, count in [*sorted(finished.items()), (windows, 0)]:
        if first > at:
            left.append(range(at, first))
        at = max(at, first + count)
    return left
