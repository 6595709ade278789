"""How reports name what several GPUs of an engine share (`verify.arms.split_mode`)."""

from __future__ import annotations

from collections import Counter

from verify.arms.records import TensorParallelRecord


def split_mode_sentence(shares: TensorParallelRecord | None) -> str | None:
    """`split mode graph over 4 GPUs: 2 KV heads a GPU`, of `run.json`'s `tensor_parallel`."""
    if shares is None:
        return None
    counts = Counter(shares.kv_heads_by_gpu)
    if len(counts) == 1:
        heads = f"{_heads(shares.kv_heads_by_gpu[0])} a GPU"
    else:
        heads = ", ".join(f"{_heads(n)} on {gpus} of them" for n, gpus in sorted(counts.items()))
    return f"split mode graph over {shares.gpus} GPUs: {heads}"


def _heads(count: int) -> str:
    return f"{count} KV head{'s' if count > 1 else ''}"


def shared_out(shares: TensorParallelRecord | None) -> str:
    """A sentence, with a space before it, on the GPUs that a run reproduces; empty where there is one."""
    sentence = split_mode_sentence(shares)
    return f" As in {sentence}." if sentence else ""
