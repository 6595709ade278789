"""A gated delta net: the layer without keys and values that stands for attention in Qwen 3.5 and Qwen3-Next.

Of each head, with a state S [v, k] that begins as zero, k and q of unit length, a decay a = exp(g) and a
step b:

    S <- a S;   S <- S + b (v - S k) k^T;   out = S q / sqrt(size of k)

q, k and v come from the layer's input by a product, a convolution over the last few tokens (channel by
channel) and silu. The output is normed a head and multiplied by silu(z), z another product of the input.
Everything is computed token by token in the type of the run (float32): how many windows lie side by side
changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from verify.model.blocks import rms_norm


class RecurrentState(NamedTuple):
    """What a layer without attention keeps of B sequences: the inputs of the convolution's last tokens
    [B, channels, kernel - 1], and S of every head [B, H, v, k]."""

    inputs: torch.Tensor
    memory: torch.Tensor


@dataclass(frozen=True)
class DeltaNet:
    """Sizes of a gated delta net's heads; each head of k serves several of v."""

    k_heads: int  # heads of q and k
    v_heads: int  # heads of v
    size: int  # of every head
    kernel: int  # tokens that the convolution sees
    eps: float  # of the norms of q and k
    interleaved: bool  # neighbouring heads of v share one of k; else they take them in turns

    @property
    def channels(self) -> int:
        """Of the convolution: q, k, v of all heads."""
        return (2 * self.k_heads + self.v_heads) * self.size

    @property
    def value_width(self) -> int:
        return self.v_heads * self.size

    def first_state(self, like: torch.Tensor, batch: int) -> RecurrentState:
        return RecurrentState(
            like.new_zeros((batch, self.channels, self.kernel - 1)),
            like.new_zeros((batch, self.v_heads, self.size, self.size)),
        )

    def __call__(
        self,
        mixed: torch.Tensor,
        decay: torch.Tensor,
        step: torch.Tensor,
        kernel: torch.Tensor,
        state: RecurrentState,
    ) -> tuple[torch.Tensor, RecurrentState]:
        """mixed [B, T, channels], decay (as its logarithm) and step [B, T, v heads], kernel [channels, taps]
        to the heads' outputs [B, T, v heads, size], and the state after them."""
        tokens = mixed.shape[1]
        line = torch.cat((state.inputs, mixed.transpose(1, 2)), -1)
        # A product and a sum a tap, in their order, rather than a library's convolution.
        out = line[..., :tokens] * kernel[:, 0, None]
        for tap in range(1, self.kernel):
            out = out + line[..., tap : tap + tokens] * kernel[:, tap, None]
        mixed = torch.nn.functional.silu(out).transpose(1, 2)
        widths = [self.k_heads * self.size, self.k_heads * self.size, self.value_width]
        q, k, v = (part.unflatten(-1, (-1, self.size)) for part in mixed.split(widths, -1))
        q, k = (self._for_v_heads(self._unit(part)) for part in (q, k))
        q = q * self.size**-0.5
        memory, outputs = state.memory, []
        grown = decay.exp()[..., None, None]
        for t in range(tokens):
            memory = memory * grown[:, t]
            missing = (v[:, t] - (memory * k[:, t, :, None, :]).sum(-1)) * step[:, t, :, None]
            memory = memory + missing[..., None] * k[:, t, :, None, :]
            outputs.append((memory * q[:, t, :, None, :]).sum(-1))
        return torch.stack(outputs, 1), RecurrentState(line[..., tokens:], memory)

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors of length one; eps is the least length, as the engine has it."""
        return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(self.eps)

    def _for_v_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, k heads, size] to [B, T, v heads, size]."""
        times = self.v_heads // self.k_heads
        if self.interleaved:
            return x.repeat_interleave(times, 2)
        return x.repeat(1, 1, times, 1)


def gated_norm(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Heads [..., size] normed, times silu(z)."""
    return rms_norm(x, weight, eps) * torch.nn.functional.silu(z)
