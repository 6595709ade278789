"""Tiny random models twice: as transformers' own class, and as the GGUF file of the same weights.

The file is written here by the published conventions of each architecture, with nothing of the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

WIDTH, HEADS, KV_HEADS, SIZE, INNER, VOCABULARY = 64, 4, 2, 16, 96, 100
EXPERTS, USED, EXPERT_INNER, SHARED = 8, 3, 32, 2
ROPE, NOPE, VALUE, LATENT, QUERY_RANK = 16, 24, 20, 32, 24
WINDOW = 8
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}

_COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": SIZE,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
_MIXTURE: dict[str, Any] = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": USED,
    "moe_intermediate_size": EXPERT_INNER,
    "n_shared_experts": SHARED,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
_MIXTURE_KEYS: dict[str, Any] = {
    "expert_count": EXPERTS,
    "expert_used_count": USED,
    "expert_feed_forward_length": EXPERT_INNER,
    "expert_shared_count": SHARED,
    "leading_dense_block_count": 1,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": LATENT,
    "q_lora_rank": QUERY_RANK,
    "qk_rope_head_dim": ROPE,
    "qk_nope_head_dim": NOPE,
    "v_head_dim": VALUE,
    "num_key_value_heads": HEADS,
    # transformers' norms inside MLA always take this one, whatever the model's is.
    "rms_norm_eps": 1e-6,
}
_LATENT_KEYS: dict[str, Any] = {
    "attention.kv_lora_rank": LATENT,
    "attention.q_lora_rank": QUERY_RANK,
    "attention.head_count_kv": 1,
    "attention.key_length": LATENT + ROPE,
    "attention.value_length": LATENT,
    "attention.key_length_mla": NOPE + ROPE,
    "attention.value_length_mla": VALUE,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.dimension_count": ROPE,
}
_YARN_KEYS: dict[str, Any] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_SANDWICH = {
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "glm4": {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
    "glm4moe": {"post_attention_layernorm": "post_attention_norm"},
}


@dataclass(frozen=True)
class Twin:
    """A case: transformers' classes by the first part of their name, and what differs from the common sizes.

    keys: metadata of the file, without the architecture. older: MLA in the layout of older files. fused: q, k
    and v as one tensor; fused_experts: the experts' gate and up as one.
    """

    architecture: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    older: bool = False
    fused: bool = False
    fused_experts: bool = False

    def build(self, path: Path, seed: int = 0) -> torch.nn.Module:
        """Write the file and return transformers' model, in evaluation mode."""
        import transformers

        config_name = f"{self.family}TextConfig" if self.family == "Gemma3" else f"{self.family}Config"
        config = getattr(transformers, config_name)(**(_COMMON | self.config))
        model = getattr(transformers, f"{self.family}ForCausalLM")(config).eval()
        _randomise(model, seed)
        self._write(model, path)
        return model

    def _write(self, model: Any, path: Path) -> None:
        arch = self.architecture
        writer = gguf.GGUFWriter(path, arch)
        keys: dict[str, Any] = {
            "block_count": model.config.num_hidden_layers,
            "context_length": 128,
            "embedding_length": WIDTH,
            "feed_forward_length": INNER,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.key_length": SIZE,
            "attention.value_length": SIZE,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 10000.0,
        } | self.keys
        for key, value in keys.items():
            add_key(writer, f"{arch}.{key}", value)
        for name, value in self._tensors(model):
            writer.add_tensor(name, np.ascontiguousarray(value.detach().numpy(), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _tensors(self, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        state = model.state_dict()
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight")
        names = _NAMES | _SANDWICH.get(self.architecture, {})
        for key, value in state.items():
            # Gemma's norms multiply by one more than the weight that is stored.
            if self.architecture == "gemma3" and "norm" in key:
                value = value + 1
            outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            stem, suffix = key.rsplit(".", 1)
            if stem in outside:
                yield f"{outside[stem]}.{suffix}", value
                continue
            _, _, layer, rest = key.split(".", 3)
            prefix = f"blk.{layer}."
            if rest.endswith("e_score_correction_bias"):
                yield f"{prefix}exp_probs_b.bias", value
            elif rest.endswith("experts.gate_up_proj"):
                gate, up = value.chunk(2, 1)
                if self.fused_experts:
                    yield f"{prefix}ffn_gate_up_exps.weight", value
                else:
                    yield f"{prefix}ffn_gate_exps.weight", gate
                    yield f"{prefix}ffn_up_exps.weight", up
            elif rest.endswith("experts.down_proj"):
                yield f"{prefix}ffn_down_exps.weight", value
            elif self.fused and rest.startswith("self_attn.q_proj"):
                parts = [state[key.replace("q_proj", f"{which}_proj")] for which in "qkv"]
                yield f"{prefix}attn_qkv.{suffix}", torch.cat(parts)
            elif self.fused and rest.startswith(("self_attn.k_proj", "self_attn.v_proj")):
                continue
            elif rest.startswith("self_attn.kv_b_proj") and not self.older:
                both = value.view(HEADS, NOPE + VALUE, LATENT)
                yield f"{prefix}attn_k_b.weight", both[:, :NOPE].transpose(1, 2)
                yield f"{prefix}attn_v_b.weight", both[:, NOPE:]
            else:
                stem, suffix = rest.rsplit(".", 1)
                if self.architecture == "llama" and names[stem] in ("attn_q", "attn_k"):
                    value = _neighbours(value)
                yield f"{prefix}{names[stem]}.{suffix}", value


def _neighbours(value: torch.Tensor) -> torch.Tensor:
    """Rows of heads from halves (i, i + n/2) to neighbours (2i, 2i + 1)."""
    heads = value.view(-1, 2, SIZE // 2, value.shape[-1])
    return heads.transpose(1, 2).reshape(value.shape)


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every part of a layer changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name:
            # Gemma's weights are around zero, all others' around one.
            value.copy_(0.3 * noise + (0.0 if "Gemma" in type(model).__name__ else 1.0))
        elif value.ndim == 1:
            value.copy_(0.3 * noise)
        elif "embed" in name:
            value.copy_(noise)
        else:
            value.copy_((1.5 if "self_attn" in name else 1.0) * noise / value.shape[-1] ** 0.5)


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A metadata value by its Python type."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


TWINS: dict[str, Twin] = {
    "llama": Twin("llama", "Llama"),
    "llama-moe": Twin(
        "llama",
        "Mixtral",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": USED, "rope_theta": 10000.0},
        {"expert_count": EXPERTS, "expert_used_count": USED},
    ),
    "qwen2": Twin("qwen2", "Qwen2"),
    # 4 heads of 24 in a width of 64.
    "qwen3": Twin(
        "qwen3", "Qwen3", {"head_dim": 24}, {"attention.key_length": 24, "attention.value_length": 24}
    ),
    "qwen3-yarn": Twin("qwen3", "Qwen3", {"rope_parameters": YARN}, _YARN_KEYS),
    "gemma3": Twin(
        "gemma3",
        "Gemma3",
        {
            "num_hidden_layers": 7,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": SIZE,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        },
        {
            "attention.sliding_window": WINDOW,
            "rope.freq_base": 1000000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "glm4": Twin("glm4", "Glm4", {"attention_bias": True}, {"rope.dimension_count": SIZE // 2}),
    "glm4-fused": Twin(
        "glm4", "Glm4", {"attention_bias": True}, {"rope.dimension_count": SIZE // 2}, fused=True
    ),
    "glm4moe": Twin(
        "glm4moe",
        "Glm4Moe",
        {"attention_bias": True, "use_qk_norm": True, **_MIXTURE},
        {"rope.dimension_count": SIZE // 2, **_MIXTURE_KEYS},
    ),
    "glm4moe-air": Twin(
        "glm4moe",
        "Glm4Moe",
        {"attention_bias": True, "use_qk_norm": False, **_MIXTURE},
        {"rope.dimension_count": SIZE // 2, **_MIXTURE_KEYS},
    ),
    "deepseek2-fused": Twin(
        "deepseek2", "DeepseekV3", _LATENT | _MIXTURE, _LATENT_KEYS | _MIXTURE_KEYS, fused_experts=True
    ),
    "deepseek2": Twin("deepseek2", "DeepseekV3", _LATENT | _MIXTURE, _LATENT_KEYS | _MIXTURE_KEYS),
    "deepseek2-older": Twin(
        "deepseek2",
        "DeepseekV3",
        _LATENT | _MIXTURE | {"q_lora_rank": None},
        {
            "attention.kv_lora_rank": LATENT,
            "attention.head_count_kv": HEADS,
            "attention.key_length": NOPE + ROPE,
            "attention.value_length": VALUE,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.dimension_count": ROPE,
            **_MIXTURE_KEYS,
        },
        older=True,
    ),
    "deepseek2-yarn": Twin(
        "deepseek2",
        "DeepseekV3",
        _LATENT | _MIXTURE | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        _LATENT_KEYS | _MIXTURE_KEYS | _YARN_KEYS | {"rope.scaling.yarn_log_multiplier": 0.1},
    ),
}
