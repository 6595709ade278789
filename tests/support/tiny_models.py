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


def _qwen3moe(**more: Any) -> TinyFile:
    shapes = outside(tied=more.pop("tied", False))
    heads, kv_heads, size = more.pop("heads", (8, 1, 16))
    fused = more.pop("fused", False)
    for i in range(2):
        shapes |= attention(i, heads, kv_heads, size, fused=fused) | experts(i, 8, 24)
        shapes |= norms(i, "attn_q_norm", "attn_k_norm", size=size)
    keys = base_keys(2, heads, kv_heads, size) | _MOE_KEYS
    return TinyFile("qwen3moe", keys | {k.replace("__", "."): v for k, v in more.items()}, shapes)


QWEN3MOE: dict[str, TinyFile] = {
    # r = 8 and r = 16.
    "qwen3moe": _qwen3moe(),
    "qwen3moe-16-heads-a-kv-head": _qwen3moe(heads=(16, 1, 8), tied=True),
    "qwen3moe-fused": _qwen3moe(heads=(4, 2, 24), fused=True),
    "qwen3moe-yarn": _qwen3moe(rope__freq_base=500.0).with_(YARN),
    "qwen3moe-one-expert": _qwen3moe(expert_used_count=1),
    "qwen3moe-size-by-default": _qwen3moe(feed_forward_length=72).with_(drop=("expert_feed_forward_length",)),
}


def _gpt_oss(layers: int = 3, *, fused: bool = False, **more: Any) -> TinyFile:
    shapes = outside()
    for i in range(layers):
        shapes |= attention(i, 8, 2, 16, fused=fused)
        shapes |= biases(i, attn_qkv=192) if fused else biases(i, attn_q=128, attn_k=32, attn_v=32)
        shapes |= biases(i, attn_output=WIDTH) | {f"blk.{i}.attn_sinks.weight": (8,)}
        shapes |= experts(i, 8, 24, biased=True, norm="post_attention_norm")
    keys = base_keys(layers, 8, 2, 16) | _MOE_KEYS | {"attention.sliding_window": 6}
    return TinyFile("gpt-oss", keys | {k.replace("__", "."): v for k, v in more.items()}, shapes)


GPT_OSS: dict[str, TinyFile] = {
    "gpt-oss": _gpt_oss(),
    "gpt-oss-yarn": _gpt_oss(fused=True).with_(YARN),
    "gpt-oss-every-third-layer": _gpt_oss(4, attention__sliding_window_pattern=3),
    "gpt-oss-layers-by-name": _gpt_oss(
        attention__sliding_window_pattern=[0, 1, 1], rope__freq_base_swa=500.0
    ),
    "gpt-oss-window-of-one": _gpt_oss(attention__sliding_window=1, expert_used_count=1),
    # Large enough that the clamp cuts.
    "gpt-oss-clamped": _gpt_oss().with_(
        values={
            f"blk.1.ffn_{which}_exps.bias": 9 * np.random.default_rng(3).standard_normal((8, 24))
            for which in ("gate", "up")
        }
    ),
}


def _gemma2(layers: int = 3, **more: Any) -> TinyFile:
    shapes = outside(tied=True)
    for i in range(layers):
        shapes |= attention(i, 4, 2, 16) | dense(i) | norms(i, "post_attention_norm", "post_ffw_norm")
    keys = base_keys(layers, 4, 2, 16) | {"attention.sliding_window": 6}
    return TinyFile("gemma2", keys | {k.replace("__", "."): v for k, v in more.items()}, shapes)


GEMMA2: dict[str, TinyFile] = {
    "gemma2": _gemma2(),
    "gemma2-tight-softcaps": _gemma2(attn_logit_softcapping=1.5, final_logit_softcapping=4.0),
    "gemma2-every-third-layer": _gemma2(4, attention__sliding_window_pattern=3),
    "gemma2-window-by-default": _gemma2().with_(drop=("attention.sliding_window",)),
    "gemma2-linear": _gemma2(rope__scaling__factor=3.0, rope__freq_base_swa=300.0),
    "gemma2-largest": _gemma2(46),
    "gemma2-sizes-by-kind": _gemma2(rope__dimension_count_swa=8),
}


def _minimax_m2(heads: int = 6, kv_heads: int = 1, size: int = 16, **more: Any) -> TinyFile:
    shapes = outside()
    fused = more.pop("fused", False)
    for i in range(2):
        shapes |= attention(i, heads, kv_heads, size, fused=fused) | experts(i, 8, 24, chooses=True)
        shapes |= norms(i, "attn_q_norm", size=heads * size) | norms(i, "attn_k_norm", size=kv_heads * size)
    keys = base_keys(2, heads, kv_heads, size) | _MOE_KEYS
    keys |= {"rope.dimension_count": size // 2, "expert_gating_func": 2, "feed_forward_length": 24}
    return TinyFile("minimax-m2", keys | {k.replace("__", "."): v for k, v in more.items()}, shapes)


MINIMAX_M2: dict[str, TinyFile] = {
    "minimax-m2": _minimax_m2(),
    "minimax-m2-two-kv-heads": _minimax_m2(12, 2, 8),
    "minimax-m2-fused": _minimax_m2(fused=True),
    "minimax-m2-softmax": _minimax_m2(expert_gating_func=1),
    "minimax-m2-whole-head": _minimax_m2(rope__dimension_count=16, expert_used_count=1),
    "minimax-m2-yarn": _minimax_m2().with_(YARN),
}


def _step35(layers: int = 4, *, gates: bool = True, normed: bool = True, **more: Any) -> TinyFile:
    """Layer 0 and every fourth see all keys, with 4 heads; the others have 6, over 2 KV heads."""
    local = [i % 4 != 0 for i in range(layers)]
    heads = [6 if windowed else 4 for windowed in local]
    shapes = outside()
    for i in range(layers):
        shapes |= attention(i, heads[i], 2, 16)
        shapes |= dense(i) if i < 2 else experts(i, 8, 24, shared=20, chooses=True)
        if gates:
            shapes[f"blk.{i}.attn_gate.weight"] = (heads[i], WIDTH)
        if normed:
            shapes |= norms(i, "attn_q_norm", "attn_k_norm", size=16)
    keys = base_keys(layers, heads, [2] * layers, 16) | _MOE_KEYS
    keys |= {"attention.sliding_window": 6, "attention.sliding_window_pattern": local}
    keys |= {"expert_shared_feed_forward_length": 20, "rope.freq_base_swa": 500.0}
    keys |= {"expert_weights_norm": True, "expert_weights_scale": 1.5}
    return TinyFile("step35", keys | {k.replace("__", "."): v for k, v in more.items()}, shapes)


STEP35: dict[str, TinyFile] = {
    "step35": _step35(),
    "step35-no-gate": _step35(gates=False, normed=False),
    "step35-clamped": _step35(swiglu_clamp_exp=[0.0, 0.0, 0.2, 0.3], swiglu_clamp_shexp=[0.3, 0.0, 0.0, 0.2]),
    "step35-frequencies": _step35().with_(values={"rope_freqs.weight": np.linspace(1, 3, 8)}),
    "step35-other-sizes": _step35(5, rope__dimension_count=12, rope__dimension_count_swa=8),
    "step35-linear": _step35(rope__scaling__factor=3.0),
    "step35-yarn": _step35().with_(YARN | {"rope.scaling.attn_factor": 1.3}),
    "step35-softmax": _step35(expert_gating_func=1, expert_weights_norm=False),
}


def _mistral3(**more: Any) -> TinyFile:
    return _llama("mistral3").with_({k.replace("__", "."): v for k, v in more.items()})


MISTRAL: dict[str, TinyFile] = {
    "mistral3": _mistral3(),
    "mistral3-temperature": _mistral3(attention__temperature_scale=0.4).with_(YARN),
    "mistral3-log-multiplier": _mistral3(rope__scaling__yarn_log_multiplier=0.7).with_(YARN),
    "mistral3-temperature-alone": _mistral3(
        attention__temperature_scale=0.4, rope__scaling__original_context_length=8
    ),
    "mistral3-betas": _mistral3(rope__scaling__yarn_beta_fast=4.0, rope__scaling__yarn_beta_slow=0.25).with_(
        YARN
    ),
    "mistral3-attn_factor": _mistral3().with_(YARN | {"rope.scaling.attn_factor": 1.3}),
    "mistral4": _deepseek2("mistral4"),
    "mistral4-temperature": _deepseek2(
        "mistral4", attention__temperature_scale=0.3, attention__temperature_length=10
    ),
    "mistral4-yarn": _deepseek2("mistral4").with_(YARN | {"rope.scaling.yarn_log_multiplier": 0.1}),
    "mistral4-yarn-0.0707": _deepseek2("mistral4").with_(YARN | {"rope.scaling.yarn_log_multiplier": 0.0707}),
    "mistral4-groups": _deepseek2("mistral4", expert_group_count=2, expert_group_used_count=1),
    "mistral4-missing-gating": _deepseek2("mistral4").with_(drop=("expert_gating_func",)),
}


def _qwen35(architecture: str = "qwen35", layers: int = 4, **more: Any) -> TinyFile:
    """Attention 4/1 x 16 in every fourth layer; else 2 heads of k and 4 of v, of size 16."""
    k_heads, v_heads, size = more.pop("net", (2, 4, 16))
    attending = more.pop("attending", [i for i in range(layers) if (i + 1) % 4 == 0])
    channels, values = (2 * k_heads + v_heads) * size, v_heads * size
    shapes = outside(tied=more.pop("tied", False))
    for i in range(layers):
        p = f"blk.{i}."
        if i in attending:
            shapes |= attention(i, 4, 1, 16) | norms(i, "attn_q_norm", "attn_k_norm", size=16)
            shapes[p + "attn_q.weight"] = (2 * 64, WIDTH)
        else:
            shapes |= norms(i, "attn_norm") | norms(i, "ssm_norm", size=size)
            shapes |= {
                p + "attn_qkv.weight": (channels, WIDTH),
                p + "attn_gate.weight": (values, WIDTH),
                p + "ssm_conv1d.weight": (channels, more.get("ssm__conv_kernel", 4)),
                p + "ssm_dt.bias": (v_heads,),
                p + "ssm_a": (v_heads,),
                p + "ssm_out.weight": (WIDTH, values),
            }
            if architecture == "qwen3next":
                shapes[p + "ssm_ba.weight"] = (2 * v_heads, WIDTH)
            else:
                shapes[p + "ssm_alpha.weight"] = shapes[p + "ssm_beta.weight"] = (v_heads, WIDTH)
        if architecture == "qwen35":
            shapes |= dense(i, norm="post_attention_norm")
        else:
            shapes |= experts(i, 8, 24, shared=20, norm="post_attention_norm")
            shapes[p + "ffn_gate_inp_shexp.weight"] = (WIDTH,)
    keys = base_keys(layers, 4, 1, 16) | {"rope.dimension_count": 8}
    keys |= {"ssm.conv_kernel": 4, "ssm.state_size": size, "ssm.group_count": k_heads}
    keys |= {"ssm.time_step_rank": v_heads, "ssm.inner_size": values}
    if architecture != "qwen3next":
        keys["rope.dimension_sections"] = [2, 1, 1, 0]
    if architecture != "qwen35":
        keys |= _MOE_KEYS | {"expert_shared_feed_forward_length": 20}
    return TinyFile(architecture, keys | {k.replace("__", "."): v for k, v in more.items()}, shapes)


QWEN35: dict[str, TinyFile] = {
    "qwen35": _qwen35(),
    "qwen35-every-second-layer": _qwen35(attending=[1, 3], full_attention_interval=2),
    "qwen35-short-kernel": _qwen35(net=(4, 4, 8), ssm__conv_kernel=3, tied=True),
    "qwen35-yarn": _qwen35(rope__freq_base=300.0).with_(YARN),
    "qwen35-whole-head": _qwen35(**{"rope.dimension_count": 16, "rope.dimension_sections": [3, 3, 2, 0]}),
    "qwen35-layers-by-name": _qwen35(
        attending=[0, 2], attention__recurrent_layers=[False, True, False, True]
    ),
    "qwen35moe": _qwen35("qwen35moe"),
    "qwen35moe-three-v-heads-a-k-head": _qwen35("qwen35moe", net=(2, 6, 8)),
    "qwen35moe-one-expert": _qwen35("qwen35moe", expert_used_count=1),
    "qwen35moe-linear": _qwen35("qwen35moe", rope__scaling__factor=3.0),
    "qwen35moe-7-layers": _qwen35("qwen35moe", 7, tied=True),
    "qwen3next": _qwen35("qwen3next"),
    "qwen3next-three-v-heads-a-k-head": _qwen35("qwen3next", net=(2, 6, 8)),
    "qwen3next-one-k-head": _qwen35("qwen3next", net=(1, 4, 16), ssm__conv_kernel=2),
    "qwen3next-every-second-layer": _qwen35("qwen3next", attending=[1, 3], full_attention_interval=2),
    "qwen3next-yarn": _qwen35("qwen3next").with_(YARN),
}


def _gemma4(
    layers: int = 6, *, shared: int = 0, own: int = 0, v: bool = True, moe: bool = False, **more: Any
) -> TinyFile:
    """Every third layer sees all keys, with heads 4/1 x 24 rather than 4/2 x 16, and rotates them slowly."""
    local = more.pop("local", [i % 3 != 2 for i in range(layers)])
    kv_heads = [2 if windowed else 1 for windowed in local]
    shapes = outside(tied=True)
    for i in range(layers):
        p, size = f"blk.{i}.", 16 if local[i] else 24
        of_layer = attention(i, 4, kv_heads[i], size) | norms(i, "attn_q_norm", "attn_k_norm", size=size)
        if i >= layers - shared:
            for name in ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight"):
                del of_layer[p + name]
        elif not v and not local[i]:
            del of_layer[p + "attn_v.weight"]
        shapes |= of_layer | dense(i) | norms(i, "post_attention_norm", "post_ffw_norm")
        if moe:
            shapes |= experts(i, 8, 24, fused=True)
            shapes |= norms(i, "pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")
            shapes |= {p + "ffn_gate_inp.scale": (WIDTH,), p + "ffn_down_exps.scale": (8,)}
        if own:
            shapes |= {p + "inp_gate.weight": (own, WIDTH), p + "proj.weight": (WIDTH, own)}
            shapes |= norms(i, "post_norm")
        if i % 2:
            shapes[p + "layer_output_scale.weight"] = (1,)
    if own:
        shapes |= {
            "per_layer_token_embd.weight": (VOCABULARY, own * layers),
            "per_layer_model_proj.weight": (own * layers, WIDTH),
            "per_layer_proj_norm.weight": (own,),
        }
    keys = base_keys(layers, 4, kv_heads, 24)
    keys |= {"attention.key_length_swa": 16, "attention.value_length_swa": 16, "rope.dimension_count": 24}
    keys |= {"rope.dimension_count_swa": 16, "rope.freq_base": 50000.0, "rope.freq_base_swa": 300.0}
    keys |= {"attention.sliding_window": 6, "attention.sliding_window_pattern": local}
    keys |= {"attention.shared_kv_layers": shared, "embedding_length_per_layer_input": own}
    keys |= _MOE_KEYS if moe else {}
    frequencies = {"rope_freqs.weight": np.where(np.arange(12) < 5, 1.0, 1e30)}
    return TinyFile(
        "gemma4", keys | {k.replace("__", "."): value for k, value in more.items()}, shapes, frequencies
    )


GEMMA4: dict[str, TinyFile] = {
    "gemma4": _gemma4(),
    "gemma4-linear": _gemma4(rope__scaling__factor=3.0),
    "gemma4-yarn": _gemma4().with_(YARN | {"rope.scaling.attn_factor": 1.3}),
    "gemma4-v-from-k": _gemma4(v=False, final_logit_softcapping=5.0),
    "gemma4-shared-keys": _gemma4(9, shared=3),
    "gemma4-all-but-two-share": _gemma4(6, shared=4, local=[True, False, True, True, False, False]),
    "gemma4-inputs-a-layer": _gemma4(own=12, shared=3),
    "gemma4-experts": _gemma4(3, moe=True, v=False),
    "gemma4-by-turns": _gemma4(4, local=[False, True, False, True], own=8),
}


def _indexed(architecture: str, *, heads: int = 2, **more: Any) -> TinyFile:
    """heads: of the indexer. With few of them scores of 0 are many, and which of those is taken is open."""
    shapes: Shapes = {}
    for i in range(2):
        p = f"blk.{i}.indexer."
        shapes |= {
            p + "attn_q_b.weight": (heads * 64, QUERY_RANK),
            p + "attn_k.weight": (64, WIDTH),
            p + "proj.weight": (heads, WIDTH),
            p + "k_norm.weight": (64,),
            p + "k_norm.bias": (64,),
        }
    keys = {"attention.indexer.head_count": heads, "attention.indexer.key_length": 64}
    keys["attention.indexer.top_k"] = more.pop("top_k", 64)
    return _deepseek2(architecture, **more).with_(keys, shapes)


DSA: dict[str, TinyFile] = (
    {
        f"{architecture}{name}": file
        for architecture in ("deepseek32", "glm-dsa")
        for name, file in {
            "": _indexed(architecture),
            "-as-many-keys-as-tokens": _indexed(architecture, top_k=40),
            "-linear": _indexed(architecture, rope__scaling__factor=3.0),
            "-yarn": _indexed(architecture).with_(YARN),
            "-unnormalised": _indexed(architecture, expert_weights_norm=False, expert_weights_scale=2.5),
            "-groups": _indexed(architecture, expert_group_count=4, expert_group_used_count=2),
        }.items()
    }
    | {
        "deepseek32-yarn-0.0707": _indexed("deepseek32").with_(
            YARN | {"rope.scaling.yarn_log_multiplier": 0.0707}
        ),
        "glm-dsa-missing-gating": _indexed("glm-dsa").with_(drop=("expert_gating_func",)),
    }
    | {
        # Fewer keys than there are tokens.
        f"{architecture}-{name}": file
        for architecture in ("deepseek32", "glm-dsa")
        for name, file in {
            "chosen": _indexed(architecture, heads=8, top_k=8),
            "chosen-20": _indexed(architecture, heads=8, top_k=20),
            "all-chosen-but-one": _indexed(architecture, heads=8, top_k=39),
            "one-chosen": _indexed(architecture, heads=8, top_k=1),
            "chosen-linear": _indexed(architecture, heads=8, top_k=8, rope__scaling__factor=3.0),
            "chosen-yarn": _indexed(architecture, heads=8, top_k=8).with_(YARN),
            "chosen-by-many": _indexed(architecture, heads=64, top_k=12),
        }.items()
    }
)

TINY: dict[str, TinyFile] = {
    **FOUND,
    **QWEN3MOE,
    **GPT_OSS,
    **GEMMA2,
    **MINIMAX_M2,
    **STEP35,
    **MISTRAL,
    **QWEN35,
    **GEMMA4,
    **DSA,
}
