"""Which tiny files there are: of every architecture some, with settings that published models rarely have."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.tiny_files import (
    INNER,
    VOCABULARY,
    WIDTH,
    Shapes,
    TinyFile,
    attention,
    base_keys,
    biases,
    dense,
    experts,
    norms,
    outside,
)

YARN: dict[str, Any] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}


def _llama(architecture: str = "llama", *, layers: int = 2, fused: bool = False) -> TinyFile:
    shapes = outside()
    for i in range(layers):
        shapes |= attention(i, 4, 2, 16, fused=fused) | dense(i)
    return TinyFile(architecture, base_keys(layers, 4, 2, 16), shapes)


def _heads_normed(file: TinyFile, layers: int = 2, size: int = 16) -> TinyFile:
    more: Shapes = {}
    for i in range(layers):
        more |= norms(i, "attn_q_norm", "attn_k_norm", size=size)
    return file.with_(shapes=more)


def _qkv_biases(layers: int = 2) -> Shapes:
    found: Shapes = {}
    for i in range(layers):
        found |= biases(i, attn_q=64, attn_k=32, attn_v=32)
    return found


def _gemma3(layers: int = 7, **keys: Any) -> TinyFile:
    file = _heads_normed(_llama("gemma3", layers=layers), layers)
    more: Shapes = {}
    for i in range(layers):
        more |= norms(i, "post_attention_norm", "post_ffw_norm")
    window = {"attention.sliding_window": 8}
    return file.with_(window | {k.replace("__", "."): v for k, v in keys.items()}, more)


def _glm4(**keys: Any) -> TinyFile:
    more: Shapes = {}
    for i in range(2):
        more |= norms(i, "post_attention_norm", "post_ffw_norm")
        more[f"blk.{i}.ffn_up.weight"] = (2 * INNER, WIDTH)
    return _llama("glm4").with_(
        {"rope.dimension_count": 8} | keys, more, drop=("blk.0.ffn_gate.weight", "blk.1.ffn_gate.weight")
    )


_MOE_KEYS: dict[str, Any] = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 24,
}


def _glm4moe() -> TinyFile:
    shapes = outside()
    for i in range(2):
        shapes |= attention(i, 4, 2, 16)
    shapes |= dense(0, norm="post_attention_norm")
    shapes |= experts(1, 8, 24, shared=24, chooses=True, norm="post_attention_norm")
    keys = base_keys(2, 4, 2, 16) | _MOE_KEYS
    keys |= {"rope.dimension_count": 8, "leading_dense_block_count": 1, "expert_shared_count": 1}
    keys |= {"expert_weights_norm": True, "expert_weights_scale": 1.5}
    return TinyFile("glm4moe", keys, shapes)


LATENT, QUERY_RANK, NOPE, ROPE, VALUE = 32, 24, 16, 8, 12


def latent_attention(layer: int, heads: int = 4, *, query_rank: int = QUERY_RANK) -> Shapes:
    p = f"blk.{layer}."
    found: Shapes = {
        p + "attn_kv_a_mqa.weight": (LATENT + ROPE, WIDTH),
        p + "attn_k_b.weight": (heads, LATENT, NOPE),
        p + "attn_v_b.weight": (heads, VALUE, LATENT),
        p + "attn_output.weight": (WIDTH, heads * VALUE),
    }
    if query_rank:
        found[p + "attn_q_a.weight"] = (query_rank, WIDTH)
        found[p + "attn_q_b.weight"] = (heads * (NOPE + ROPE), query_rank)
        found |= norms(layer, "attn_q_a_norm", size=query_rank)
    else:
        found[p + "attn_q.weight"] = (heads * (NOPE + ROPE), WIDTH)
    return found | norms(layer, "attn_norm") | norms(layer, "attn_kv_a_norm", size=LATENT)


def latent_keys(layers: int = 2, heads: int = 4, *, query_rank: int = QUERY_RANK) -> dict[str, Any]:
    keys = base_keys(layers, heads, 1, LATENT + ROPE)
    keys |= {"attention.value_length": LATENT, "attention.kv_lora_rank": LATENT}
    keys |= {"attention.key_length_mla": NOPE + ROPE, "attention.value_length_mla": VALUE}
    keys |= {"rope.dimension_count": ROPE, "leading_dense_block_count": 1, **_MOE_KEYS}
    keys |= {"expert_shared_count": 1, "expert_gating_func": 2, "expert_weights_norm": True}
    return keys | ({"attention.q_lora_rank": query_rank} if query_rank else {})


def _deepseek2(architecture: str = "deepseek2", *, query_rank: int = QUERY_RANK, **keys: Any) -> TinyFile:
    shapes = outside()
    for i in range(2):
        shapes |= latent_attention(i, query_rank=query_rank)
    shapes |= dense(0) | experts(1, 8, 24, shared=24, chooses=True)
    more = {k.replace("__", "."): v for k, v in keys.items()}
    return TinyFile(architecture, latent_keys(query_rank=query_rank) | more, shapes)


def three_tensors() -> TinyFile:
    """ik_llama.cpp's converter: kv_b as one matrix, and its halves as matrices too."""
    file = _deepseek2()
    values: dict[str, np.ndarray] = {}
    for i in range(2):
        k_b, v_b = (file.tensors()[f"blk.{i}.attn_{which}_b.weight"] for which in "kv")
        both = np.concatenate([k_b.transpose(0, 2, 1), v_b], 1)
        values[f"blk.{i}.attn_kv_b.weight"] = both.reshape(-1, LATENT)
        values[f"blk.{i}.attn_k_b.weight"] = k_b.reshape(-1, NOPE)
        values[f"blk.{i}.attn_v_b.weight"] = v_b.reshape(-1, LATENT)
    keys = {
        "attention.head_count_kv": 4,
        "attention.key_length": NOPE + ROPE,
        "attention.value_length": VALUE,
    }
    return file.with_(keys, values=values, drop=("attention.key_length_mla", "attention.value_length_mla"))


# Files of the architectures that were there first, as they are found in the wild.
FOUND: dict[str, TinyFile] = {
    "llama": _llama(),
    "llama-fused-qkv": _llama(fused=True),
    "llama-all-biases": _llama().with_(
        shapes=_qkv_biases()
        | biases(0, attn_output=WIDTH, ffn_gate=INNER, ffn_up=INNER)
        | biases(1, ffn_down=WIDTH)
    ),
    "llama-fused-qkv-bias": _llama(fused=True).with_(shapes=biases(1, attn_qkv=128)),
    "llama-norms-as-matrices": _llama().with_(
        shapes={"output_norm.weight": (1, WIDTH), "blk.1.attn_norm.weight": (1, WIDTH)}
    ),
    "llama-scales-of-matrices": _llama().with_(
        shapes={
            "blk.0.attn_q.scale": (1,),
            "blk.1.ffn_down.scale": (1,),
            "blk.0.attn_q.input_scale": (1,),
        }
    ),
    "llama-factor-without-type": _llama().with_({"rope.scaling.factor": 3.0}),
    "llama-scale_linear": _llama().with_({"rope.scale_linear": 3.0}),
    "llama-no-scaling-but-a-factor": _llama().with_(
        {"rope.scaling.factor": 3.0, "rope.scaling.type": "none"}
    ),
    "llama-linear-without-factor": _llama().with_({"rope.scaling.type": "linear"}),
    "llama-attn_factor": _llama().with_({"rope.scaling.attn_factor": 1.3}),
    "llama-yarn-without-original-context": _llama().with_(
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    ),
    "llama-yarn-attn_factor": _llama().with_(YARN | {"rope.scaling.attn_factor": 1.3}),
    "llama-yarn-factor-below-one": _llama().with_(YARN | {"rope.scaling.factor": 0.5}),
    "llama-sizes-as-arrays": _llama().with_(
        {"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2], "feed_forward_length": [48, 48]}
    ),
    "qwen2-no-biases": _llama("qwen2"),
    "qwen2-biases-everywhere": _llama("qwen2").with_(
        shapes=_qkv_biases() | {"output.bias": (VOCABULARY,)}
    ),
    "qwen2-fused-qkv": _llama("qwen2", fused=True),
    "qwen3-fused-qkv": _heads_normed(_llama("qwen3", fused=True)),
    "gemma3": _gemma3(),
    "gemma3-every-second-layer": _gemma3(attention__sliding_window_pattern=2),
    "gemma3-every-layer": _gemma3(attention__sliding_window_pattern=0),
    "gemma3-layers-by-name": _gemma3(
        attention__sliding_window_pattern=[True, False, False, True, True, False, True]
    ),
    "gemma3-no-window": _gemma3(attention__sliding_window=0),
    "gemma3-softcap": _gemma3(final_logit_softcapping=3.0),
    "gemma3-sizes-by-kind": _gemma3(rope__dimension_count_swa=8, rope__freq_base_swa=500.0),
    "gemma3-yarn-attn_factor": _gemma3(**{k.replace(".", "__"): v for k, v in YARN.items()}).with_(
        {"rope.scaling.attn_factor": 1.3}
    ),
    "glm4": _glm4(),
    "glm4-without-dimension_count": _glm4().with_(drop=("rope.dimension_count",)),
    "glm4-sections": _glm4(**{"rope.dimension_sections": [2, 1, 1, 0]}),
    "glm4moe-missing-gating": _glm4moe(),
    "glm4moe-sections": _glm4moe().with_({"rope.dimension_sections": [2, 1, 1, 0]}),
    "glm4moe-softmax-unnormalised": _glm4moe().with_(
        {"expert_gating_func": 1, "expert_weights_norm": False, "expert_weights_scale": 0.0}
    ),
    "deepseek2": _deepseek2(),
    "deepseek2-missing-gating": _deepseek2().with_(drop=("expert_gating_func",)),
    "deepseek2-groups": _deepseek2(expert_group_count=4, expert_group_used_count=2),
    "deepseek2-temperature": _deepseek2(
        attention__temperature_scale=0.3, attention__temperature_length=10
    ),
    "deepseek2-linear": _deepseek2(rope__scaling__factor=3.0),
    "deepseek2-yarn": _deepseek2().with_(YARN),
    "deepseek2-yarn-log-multiplier": _deepseek2().with_(YARN | {"rope.scaling.yarn_log_multiplier": 0.0707}),
    "deepseek2-yarn-attn_factor": _deepseek2().with_(YARN | {"rope.scaling.attn_factor": 1.3}),
    "deepseek2-yarn-both": _deepseek2().with_(
        YARN | {"rope.scaling.attn_factor": 1.3, "rope.scaling.yarn_log_multiplier": 0.1}
    ),
}  # fmt: skip

TINY: dict[str, TinyFile] = {**FOUND}
