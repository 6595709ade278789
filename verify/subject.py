"""What a run is about: the model it names, and kernels that fit that model."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.contract import checked_call
from kernels.errors import KernelFailure
from model.architectures.architecture import Architecture
from model.runner import ATTENTION_TYPES
from verify.arms import Arm
from verify.attempt import untraced
from verify.errors import UsageError

SAMPLE_BYTES = 1 << 20


def model_json(architecture: Architecture) -> dict[str, Any]:
    """The model, as `run.json` names it."""
    file, sizes = architecture.file, architecture.sizes
    return {
        "path": str(file.path),
        "name": file.metadata.get("general.name"),
        "architecture": file.architecture,
        "bytes": sum(p.stat().st_size for p in file.paths),
        "fingerprint": fingerprint(file.paths),
        "layers": sizes.layers,
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "ratio": sizes.ratio,
        "head_size": sizes.k_size,
        "context": sizes.context,
    }


def fingerprint(paths: Sequence[Path]) -> str:
    """Hash of the sizes, first and last mebibytes of a model's files: cheap, and enough to tell two apart."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as f:
            digest.update(f.read(SAMPLE_BYTES))
            f.seek(max(size - SAMPLE_BYTES, 0))
            digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()


def try_kernels(
    arms: Sequence[Arm], architecture: Architecture, cache_type: str, device: torch.device
) -> None:
    """Run each kernel on one row of this model: what does not fit it, or is not taken, is refused now.

    A function in a file is only asked what it takes: to run it is to judge it. So is a kernel that fails
    otherwise. Raises UsageError.
    """
    sizes, kind = architecture.sizes, ATTENTION_TYPES[cache_type]
    settings = {architecture.attention_settings(layer) for layer in range(sizes.layers)}
    q = torch.zeros(1, 1, sizes.heads, sizes.k_size, dtype=kind, device=device)
    k = torch.zeros(1, 1, sizes.kv_heads, sizes.k_size, dtype=kind, device=device)
    v = torch.zeros(1, 1, sizes.kv_heads, sizes.v_size, dtype=kind, device=device)
    one = torch.ones(1, 1, dtype=torch.int32, device=device)
    for arm, given in itertools.product(arms, settings):
        if arm.kernel is None:
            continue
        call = checked_call(
            q,
            k,
            v,
            kv_len=one,
            scale=given.scale,
            path=arm.path,
            sliding_window=given.sliding_window,
            softcap=given.softcap,
        )
        why = None
        with untraced(arm.kernel) as kernel:
            if arm.spec.startswith("py:"):
                why = kernel.capabilities().refuses(call)
            else:
                try:
                    kernel.run(call)
                except ValueError as error:
                    why = str(error)
                except KernelFailure as failed:
                    why = str(failed) if failed.kind == "unsupported" else None
        if why is not None:
            raise UsageError(f"kernel {arm.spec!r} does not fit this model: {why}")
