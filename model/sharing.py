"""What arms whose hidden state is one tensor have in common at a layer: computed once.

All arms begin with one hidden state; it stays one tensor until their attention gives other bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch

from verify.kernels.bits import same_bits
from verify.model.architectures.architecture import AttentionInputs


class Shared:
    """What arms of one slab and layer have in common whose hidden state is one tensor: computed once.

    states: those of all arms, once each. What is kept for a state is dropped with the last arm that has it.
    """

    def __init__(self, states: Iterable[torch.Tensor]) -> None:
        self._left = Counter(map(id, states))
        self._inputs: dict[int, tuple[AttentionInputs, AttentionInputs]] = {}
        self._outputs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def inputs(
        self, x: torch.Tensor, compute: Callable[[], tuple[AttentionInputs, AttentionInputs]]
    ) -> tuple[AttentionInputs, AttentionInputs]:
        """Of the next arm that has the state x."""
        found = self._inputs.pop(id(x), None) or compute()
        self._left[id(x)] -= 1
        if self._left[id(x)]:
            self._inputs[id(x)] = found
        return found

    def after(self, x: torch.Tensor, o: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The state after x and the attention output o: that of an earlier arm whose output had its bits.

        Waits for the device, unless o is that arm's own tensor.
        """
        earlier = self._outputs.get(id(x), [])
        for other, state in sorted(earlier, key=lambda of: of[0] is not o):
            if other is o or same_bits(o, other):
                return state
        state = compute()
        if self._left[id(x)]:
            self._outputs.setdefault(id(x), []).append((o, state))
        else:
            self._outputs.pop(id(x), None)
        return state
