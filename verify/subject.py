"""What a run is about: the model it names, and kernels that fit that model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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
    """Run each of our kernels on one row of this model: a plan that does not fit is refused now.

    Raises UsageError.
    """
    sizes, kind = architecture.sizes, ATTENTION_TYPES[cache_type]
    q = torch.zeros(1, 1, sizes.heads, sizes.k_size, dtype=kind, device=device)
    k = torch.zeros(1, 1, sizes.kv_heads, sizes.k_size, dtype=kind, device=device)
    v = torch.zeros(1, 1, sizes.kv_heads, sizes.v_size, dtype=kind, device=device)
    one = torch.ones(1, 1, dtype=torch.int32, device=device)
    for arm in arms:
        if arm.kernel is None or arm.spec.startswith("py:"):
            continue
        with untraced(arm.kernel) as kernel:
            try:
                kernel.attend(q, k, v, kv_len=one, scale=1.0, path=arm.path)
            except ValueError as error:
                raise UsageError(f"kernel {arm.spec!r} does not fit this model: {error}") from None
