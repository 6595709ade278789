"""Tiny random models twice, of the architectures of 2026: as transformers' own class, and as a GGUF file.

The file is written by the published conventions of each architecture, with nothing of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from support.tiny_files import TinyFile, base_keys

WIDTH, HEADS, KV_HEADS, SIZE, INNER, VOCABULARY = 64, 4, 2, 16, 48, 64
EXPERTS, USED, EXPERT_INNER, SHARED, WINDOW = 8, 3, 24, 20, 6
K_HEADS, V_HEADS, NET_SIZE, KERNEL = 2, 4, 16, 4
GLOBAL_SIZE, OWN = 32, 8
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0,
    "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
}  # fmt: skip
YARN_KEYS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
}  # fmt: skip

_COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": SIZE,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": PLAIN,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
_MOE: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": USED,
    "moe_intermediate_size": EXPERT_INNER,
    "norm_topk_prob": True,
}
_MOE_KEYS: dict[str, Any] = {
    "expert_count": EXPERTS,
    "expert_used_count": USED,
    "expert_feed_forward_length": EXPERT_INNER,
}
_NET: dict[str, Any] = {
    "linear_num_key_heads": K_HEADS,
    "linear_num_value_heads": V_HEADS,
    "linear_key_head_dim": NET_SIZE,
    "linear_value_head_dim": NET_SIZE,
    "linear_conv_kernel_dim": KERNEL,
    "shared_expert_intermediate_size": SHARED,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5},
    "partial_rotary_factor": 0.5,
}
_NET_KEYS: dict[str, Any] = {
    "ssm.conv_kernel": KERNEL,
    "ssm.state_size": NET_SIZE,
    "ssm.group_count": K_HEADS,
    "ssm.time_step_rank": V_HEADS,
    "ssm.inner_size": V_HEADS * NET_SIZE,
    "full_attention_interval": 2,
    "rope.dimension_count": SIZE // 2,
}
_WINDOWED = ["sliding_attention", "full_attention"] * 2

Tensors = Iterator[tuple[str, torch.Tensor]]
State = dict[str, torch.Tensor]

# Modules whose tensors have the same form in a file.
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.in_proj_ba": "ssm_ba",
}
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
}


@dataclass(frozen=True)
class NewerTwin:
    """A case. config: of transformers' class `family`, beyond the common sizes; keys: of the file.

    names: what the file calls modules otherwise; added: what the file's norms hold beyond transformers';
    other: tensors that are not there in the same form; text: the configuration is of a model's text part.
    """

    architecture: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    added: float = 0.0
    other: Callable[[str, str, torch.Tensor], Tensors] | None = None
    text: bool = False
    agrees: float = 1e-4

    def build(self, path: Path, seed: int = 0) -> torch.nn.Module:
        """Write the file and return transformers' model, in evaluation mode."""
        import transformers

        kind = f"{self.family}{'Text' if self.text else ''}Config"
        config = getattr(transformers, kind)(**(_COMMON | self.config))
        model: torch.nn.Module = getattr(transformers, f"{self.family}ForCausalLM")(config).eval()
        self._randomise(model, seed)
        found = {name: value.detach().numpy() for name, value in self._tensors(model)}
        keys = base_keys(4, HEADS, KV_HEADS, SIZE) | {"feed_forward_length": INNER} | self.keys
        TinyFile(self.architecture, keys, {}, found).write(path)
        return model

    def _randomise(self, model: torch.nn.Module, seed: int) -> None:
        """Weights large enough that every part of a layer changes the logits."""
        generator = torch.Generator().manual_seed(seed)
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name and value.ndim == 1:
                plain = self.added == 0 or "linear_attn.norm" in name
                value.copy_(0.3 * noise + (1.0 if plain else 0.0))
            elif "layer_scalar" in name:
                value.copy_(1 + 0.2 * noise)
            elif value.ndim == 1 or name.endswith("_bias"):
                value.copy_(0.3 * noise)
            elif "embed" in name:
                value.copy_(noise)
            else:
                fan_in = value.shape[-2] if self.family == "GptOss" and "experts" in name else value.shape[-1]
                value.copy_((1.5 if "attn" in name else 1.0) * noise / max(fan_in, 4) ** 0.5)

    def _tensors(self, model: torch.nn.Module) -> Tensors:
        state = model.state_dict()
        if model.config.tie_word_embeddings:  # type: ignore[union-attr]
            state.pop("lm_head.weight")
        names = _NAMES | self.names
        for key, value in state.items():
            stem, _, suffix = key.rpartition(".")
            if "norm" in stem and "linear_attn" not in stem:
                value = value + self.added
            if stem in _OUTSIDE:
                yield f"{_OUTSIDE[stem]}.{suffix}", value
                continue
            _, _, layer, rest = key.split(".", 3)
            prefix, module = f"blk.{layer}.", rest.rpartition(".")[0]
            if names.get(module) and suffix in ("weight", "bias"):
                yield f"{prefix}{names[module]}.{suffix}", value
            elif rest.endswith("e_score_correction_bias"):
                yield f"{prefix}exp_probs_b.bias", value
            elif self.other is not None and (found := list(self.other(prefix, rest, value))):
                yield from found
            elif rest.endswith("experts.gate_up_proj"):
                gate, up = value.chunk(2, 1)
                yield f"{prefix}ffn_gate_exps.weight", gate
                yield f"{prefix}ffn_up_exps.weight", up
            elif rest.endswith("experts.down_proj"):
                yield f"{prefix}ffn_down_exps.weight", value
            else:
                raise AssertionError(f"{self.family}: {key} has no place in a file")


def _gpt_oss(prefix: str, rest: str, value: torch.Tensor) -> Tensors:
    """Experts lie transposed there, gate and up by turns."""
    if rest == "self_attn.sinks":
        yield f"{prefix}attn_sinks.weight", value
    elif rest == "mlp.experts.gate_up_proj":
        for at, name in enumerate(("gate", "up")):
            yield f"{prefix}ffn_{name}_exps.weight", value[..., at::2].transpose(1, 2)
    elif rest == "mlp.experts.gate_up_proj_bias":
        for at, name in enumerate(("gate", "up")):
            yield f"{prefix}ffn_{name}_exps.bias", value[..., at::2]
    elif rest == "mlp.experts.down_proj":
        yield f"{prefix}ffn_down_exps.weight", value.transpose(1, 2)
    elif rest == "mlp.experts.down_proj_bias":
        yield f"{prefix}ffn_down_exps.bias", value


def _net(prefix: str, rest: str, value: torch.Tensor) -> Tensors:
    if rest == "linear_attn.dt_bias":
        yield f"{prefix}ssm_dt.bias", value
    elif rest == "linear_attn.A_log":
        yield f"{prefix}ssm_a", -value.exp()
    elif rest == "linear_attn.conv1d.weight":
        yield f"{prefix}ssm_conv1d.weight", value[:, 0]


def _qwen3next(prefix: str, rest: str, value: torch.Tensor) -> Tensors:
    """q, k, v and z are grouped by heads of k there; a file has all q first, then all k, then all v."""
    if rest == "linear_attn.in_proj_qkvz.weight":
        each = [NET_SIZE, NET_SIZE, *[V_HEADS // K_HEADS * NET_SIZE] * 2]
        parts = value.unflatten(0, (K_HEADS, -1)).split(each, 1)
        q, k, v, z = (part.flatten(0, 1) for part in parts)
        yield f"{prefix}attn_qkv.weight", torch.cat((q, k, v))
        yield f"{prefix}attn_gate.weight", z
    else:
        yield from _net(prefix, rest, value)


def _by_turns(value: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Heads of v from neighbours for each head of k to turns: what Qwen 3.5's converter does."""
    heads = value.unflatten(dim, (K_HEADS, V_HEADS // K_HEADS, -1))
    return heads.transpose(dim, dim + 1).flatten(dim, dim + 2)


def _qwen35(prefix: str, rest: str, value: torch.Tensor) -> Tensors:
    of_k = 2 * K_HEADS * NET_SIZE
    simple = {"in_proj_z": "attn_gate", "in_proj_b": "ssm_beta", "in_proj_a": "ssm_alpha"}
    for module, name in simple.items():
        if rest == f"linear_attn.{module}.weight":
            yield f"{prefix}{name}.weight", _by_turns(value)
    if rest == "linear_attn.in_proj_qkv.weight":
        yield f"{prefix}attn_qkv.weight", torch.cat((value[:of_k], _by_turns(value[of_k:])))
    elif rest == "linear_attn.conv1d.weight":
        yield f"{prefix}ssm_conv1d.weight", torch.cat((value[:of_k, 0], _by_turns(value[of_k:, 0])))
    elif rest == "linear_attn.out_proj.weight":
        yield f"{prefix}ssm_out.weight", _by_turns(value, 1)
    else:
        for name, found in _net(prefix, rest, value):
            yield name, _by_turns(found)


def _gemma4(prefix: str, rest: str, value: torch.Tensor) -> Tensors:
    if rest == "layer_scalar":
        yield f"{prefix}layer_output_scale.weight", value


_SANDWICH = {"post_attention_layernorm": "post_attention_norm"}
_QWEN35: dict[str, Any] = {
    "names": _SANDWICH | {"linear_attn.out_proj": "", "linear_attn.norm": "ssm_norm"},
    "added": 1.0,
    "other": _qwen35,
    "text": True,
}

NEWER_TWINS: dict[str, NewerTwin] = {
    "qwen3moe": NewerTwin("qwen3moe", "Qwen3Moe", _MOE, _MOE_KEYS),
    "gpt-oss": NewerTwin(
        "gpt-oss",
        "GptOss",
        _MOE | {"intermediate_size": EXPERT_INNER, "sliding_window": WINDOW, "layer_types": _WINDOWED},
        _MOE_KEYS | {"attention.sliding_window": WINDOW},
        _SANDWICH,
        other=_gpt_oss,
    ),
    "gpt-oss-yarn": NewerTwin(
        "gpt-oss",
        "GptOss",
        _MOE
        | {"intermediate_size": EXPERT_INNER, "sliding_window": WINDOW, "layer_types": _WINDOWED}
        | {"rope_parameters": YARN},
        _MOE_KEYS | {"attention.sliding_window": WINDOW} | YARN_KEYS,
        _SANDWICH,
        other=_gpt_oss,
    ),
    "gemma2": NewerTwin(
        "gemma2",
        "Gemma2",
        {
            "sliding_window": WINDOW, "query_pre_attn_scalar": SIZE, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0, "layer_types": _WINDOWED,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        {
            "attention.sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0,
        },
        _SANDWICH,
        added=1.0,
        agrees=1e-5,
    ),
    "minimax-m2": NewerTwin(
        "minimax-m2",
        "MiniMaxM2",
        _MOE
        | {"intermediate_size": EXPERT_INNER, "rotary_dim": 8}
        | {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
        _MOE_KEYS | {"rope.dimension_count": 8, "expert_gating_func": 2, "feed_forward_length": EXPERT_INNER},
    ),
    "qwen3next": NewerTwin(
        "qwen3next",
        "Qwen3Next",
        _MOE | _NET,
        _MOE_KEYS | _NET_KEYS | {"expert_shared_feed_forward_length": SHARED},
        _SANDWICH,
        added=1.0,
        other=_qwen3next,
    ),
    "qwen35": NewerTwin("qwen35", "Qwen3_5", _NET, _NET_KEYS, **_QWEN35),
    "qwen35moe": NewerTwin(
        "qwen35moe",
        "Qwen3_5Moe",
        _MOE | _NET,
        _MOE_KEYS | _NET_KEYS | {"expert_shared_feed_forward_length": SHARED},
        **_QWEN35,
    ),
    "gemma4": NewerTwin(
        "gemma4",
        "Gemma4",
        {
            "sliding_window": WINDOW, "global_head_dim": GLOBAL_SIZE, "num_global_key_value_heads": 1,
            "layer_types": _WINDOWED, "hidden_size_per_layer_input": OWN, "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY, "attention_k_eq_v": False,
            "final_logit_softcapping": 5.0, "tie_word_embeddings": True, "use_double_wide_mlp": False,
            "rope_parameters": {
                "sliding_attention": PLAIN,
                "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
            },
        },
        {
            "attention.sliding_window": WINDOW, "attention.sliding_window_pattern": [True, False] * 2,
            "attention.key_length": GLOBAL_SIZE, "attention.value_length": GLOBAL_SIZE,
            "attention.key_length_swa": SIZE, "attention.value_length_swa": SIZE,
            "attention.head_count_kv": [KV_HEADS, KV_HEADS] * 2, "rope.dimension_count": GLOBAL_SIZE,
            "rope.dimension_count_swa": SIZE, "rope.freq_base": 50000.0, "rope.freq_base_swa": 10000.0,
            "attention.shared_kv_layers": 2, "embedding_length_per_layer_input": OWN,
            "final_logit_softcapping": 5.0,
        },
        _SANDWICH,
        other=_gemma4,
        text=True,
        agrees=1e-5,
    ),
}  # fmt: skip
