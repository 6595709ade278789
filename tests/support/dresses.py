"""The clothes that tests put the trained model into, and its perplexity in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from support.plain_arms import logits_of
from verify.model.architectures import architecture_of
from verify.model.dressing.dress import Dress
from verify.model.gguf.file import GGUFFile
from verify.model.layer_call import AttentionPass
from verify.model.runner import Runner

# 9 heads over 3 KV heads of 64 become 96 over 8 of 128, as GLM-4.5 has them: 12 query heads a KV head.
WIDE = Dress(copies=4, kv_heads=8, live=(0, 4, 7), head_size=128)
GLM = replace(WIDE, to="glm4moe", experts="halves")
DRESSES = {
    "llama-r12": WIDE,
    "llama-experts": replace(WIDE, experts="cancel"),
    "qwen2": Dress(to="qwen2"),
    # As gpt-oss: a sink that takes nothing, a window as long as the context, its gate and experts.
    "gpt-oss": Dress(to="gpt-oss", experts="clamped"),
    # 6 query heads a KV head, and 16 of size 256.
    "llama-r6": Dress(copies=2),
    "llama-r16-256": Dress(copies=5, idle=1, head_size=256),
    "glm-halves": GLM,
    "glm-cancel": replace(GLM, experts="cancel", dense_first=0),
    "glm-shared": replace(GLM, experts="shared"),
}


def perplexity(
    path: Path,
    ids: np.ndarray,
    arms: Sequence[AttentionPass],
    *,
    device: str = "cpu",
    attention_type: str = "f32",
) -> dict[str, float]:
    """exp of the mean negative log-likelihood of the second halves of windows ids [W, T], by arm."""
    n_ctx = ids.shape[1]
    scored = range(n_ctx // 2, n_ctx - 1)
    architecture = architecture_of(GGUFFile.open(path))
    runner = Runner(architecture, device=torch.device(device), attention_type=attention_type)
    targets = torch.from_numpy(ids[:, scored.start + 1 : scored.stop + 1]).long()[..., None]
    return {
        name: float((-logits.cpu().double().log_softmax(-1).gather(-1, targets)).mean().exp())
        for name, logits in logits_of(runner, ids, arms, scored).items()
    }
