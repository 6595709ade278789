"""`qwen35`, `qwen35moe`, `qwen3next`: every fourth layer has attention, the others a gated delta net.

Attention's query projection holds, of each head, first the query and then a gate of the same size:

    out of head h = sigmoid(gate_h) * attention of head h
"""

from __future__ import annotations

import torch

from verify.model.architectures.architecture import Weights
from verify.model.architectures.delta_net import DeltaNet, RecurrentState, gated_norm
from verify.model.architectures.experts import Experts
from verify.model.architectures.feed_forward import FeedForward, Shapes
from verify.model.architectures.grouped_query import GroupedQuery, check_sections
from verify.model.architectures.mixture import experts_of
from verify.model.blocks import rms_norm
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile
from verify.model.products import Products
from verify.model.rope import Rope

# Of so many layers the last has attention, where the file does not say.
INTERVAL = 4


class Qwen35(GroupedQuery):
    """Qwen 3.5, dense."""

    rope_kind = "neox"
    head_norms = "required"
    ffn_norm = "post_attention_norm"
    interleaved = False

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        read = self.metadata
        size, v_heads = read.whole("ssm.state_size"), read.whole("ssm.time_step_rank")
        k_heads = read.whole("ssm.group_count")
        if v_heads % k_heads or read.whole("ssm.inner_size") != v_heads * size:
            raise ModelError(
                f"{file.path}: metadata keys {read.name('ssm.*')}: expected an inner size of"
                f" {v_heads} heads of {size}, and {v_heads} a multiple of {k_heads}"
            )
        self.net = DeltaNet(
            k_heads=k_heads,
            v_heads=v_heads,
            size=size,
            kernel=read.whole("ssm.conv_kernel", least=2),
            eps=self.eps,
            interleaved=self.interleaved,
        )

    def read_heads(self) -> tuple[list[int], list[int]]:
        read = self.metadata
        flags = read.flags_per_layer("attention.recurrent_layers", self.blocks)
        if flags is None:
            every = read.whole("full_attention_interval", INTERVAL)
            flags = [(layer + 1) % every != 0 for layer in range(self.blocks)]
        self.recurrent = flags
        if all(flags[: self.layers]):
            raise ModelError(f"{self.file.path}: no layer has attention, expected at least one")
        heads = read.per_layer("attention.head_count", self.blocks, least=0)
        kv_heads = heads
        if read.get("attention.head_count_kv") is not None:
            kv_heads = read.per_layer("attention.head_count_kv", self.blocks, least=0)
        return heads, kv_heads

    def read_head_sizes(self) -> tuple[list[int], list[int]]:
        k_size = self.metadata.whole("attention.key_length")
        return [k_size] * self.blocks, [self.metadata.whole("attention.value_length", k_size)] * self.blocks

    def read_rope(self, head_size: int) -> Rope:
        rope = super().read_rope(head_size)
        check_sections(self, rope.size // 2, interleaved=True)
        return rope

    def attends(self, layer: int) -> bool:
        return not self.recurrent[layer]

    def attention_shapes(self, layer: int) -> tuple[Shapes, Shapes]:
        if self.attends(layer):
            return super().attention_shapes(layer)
        net, width = self.net, self.width
        return {
            "attn_qkv": (net.channels, width),
            "attn_gate": (net.value_width, width),
            "ssm_conv1d": (net.channels, net.kernel),
            "ssm_dt.bias": (net.v_heads,),
            "ssm_a": (net.v_heads,),
            "ssm_norm": (net.size,),
            "ssm_out": (width, net.value_width),
            **self.step_shapes(),
        }, {}

    def step_shapes(self) -> Shapes:
        """Tensors that the decay and the step of a layer without attention come from."""
        return {"ssm_alpha": (self.net.v_heads, self.width), "ssm_beta": (self.net.v_heads, self.width)}

    def decay_and_step(
        self, h: torch.Tensor, weights: Weights, products: Products
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """h [T, width] to what `ssm_dt` is added to, and to the step before its sigmoid, [T, v heads]."""
        return products(h, weights["ssm_alpha"]), products(h, weights["ssm_beta"])

    @staticmethod
    def tensor_name(layer: int, short: str) -> str:
        return f"blk.{layer}.{short}" if short == "ssm_a" else GroupedQuery.tensor_name(layer, short)

    def projections(self, layer: int) -> dict[str, int]:
        rows = super().projections(layer)
        return rows | {"attn_q": 2 * rows["attn_q"]}

    def project(
        self, layer: int, h: torch.Tensor, weights: Weights, products: Products
    ) -> list[torch.Tensor]:
        q, k, v = super().project(layer, h, weights, products)
        return [q.unflatten(-1, (self.heads[layer], 2, -1))[:, :, 0].flatten(1), k, v]

    def attention_gate(
        self, layer: int, x: torch.Tensor, weights: Weights, products: Products
    ) -> torch.Tensor | None:
        h = rms_norm(x, weights["attn_norm"], self.eps)
        name, rows = "attn_q", self.projections(layer)["attn_q"]
        if "attn_qkv" in weights:
            name = "attn_qkv"
        # Of each head the second half of its rows.
        of_gate = weights[name][:rows].unflatten(0, (self.heads[layer], 2, -1))[:, 1].flatten(0, 1)
        gate = products(h, of_gate)
        if f"{name}.bias" in weights:
            bias = weights[f"{name}.bias"][:rows].unflatten(0, (self.heads[layer], 2, -1))
            gate = gate + bias[:, 1].flatten()
        return gate.sigmoid().unflatten(-1, (self.heads[layer], -1))

    def without_attention(
        self,
        layer: int,
        x: torch.Tensor,
        before: RecurrentState | None,
        weights: Weights,
        products: Products,
    ) -> tuple[torch.Tensor, RecurrentState]:
        batch, tokens, width = x.shape
        net, flat = self.net, x.reshape(batch * tokens, width)
        h = rms_norm(flat, weights["attn_norm"], self.eps)
        mixed, z = products(h, weights["attn_qkv"]), products(h, weights["attn_gate"])
        decay, step = self.decay_and_step(h, weights, products)
        decay = torch.nn.functional.softplus(decay + weights["ssm_dt.bias"]) * weights["ssm_a"]
        state = before if before is not None else net.first_state(x, batch)
        mixed, decay, step = (part.unflatten(0, (batch, tokens)) for part in (mixed, decay, step.sigmoid()))
        out, state = net(mixed, decay, step, weights["ssm_conv1d"], state)
        heads = z.unflatten(-1, (net.v_heads, net.size))
        gated = gated_norm(out.flatten(0, 1), heads, weights["ssm_norm"], self.eps)
        branch = products.summed(gated.flatten(1), weights["ssm_out"], unit=net.size)
        return flat + branch, state


class Qwen35Moe(Qwen35):
    """Qwen 3.5 with experts, softmax and renormalised, and a shared one behind a gate."""

    def feed_forward_of(self, layer: int) -> FeedForward:
        experts: Experts = experts_of(
            self,
            layer,
            gating="softmax",
            normalised=True,
            scaled=False,
            shared_is_gated=self.has(layer, "ffn_gate_inp_shexp"),
        )
        return experts


class Qwen3Next(Qwen35Moe):
    """Qwen3-Next: decay and step in one tensor, grouped by heads of k, whose v heads are neighbours."""

    interleaved = True

    def step_shapes(self) -> Shapes:
        return {"ssm_ba": (2 * self.net.v_heads, self.width)}

    def decay_and_step(
        self, h: torch.Tensor, weights: Weights, products: Products
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both = products(h, weights["ssm_ba"]).unflatten(-1, (self.net.k_heads, 2, -1))
        step, decay = (both[:, :, i].flatten(1) for i in (0, 1))
        return decay, step
