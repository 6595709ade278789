"""What a run is about: the model it names, and kernels that fit that model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from verify.arms.arm import Arm
from verify.arms.attempt import attempt
from verify.arms.records import OWN, ModelRecord
from verify.arms.result_type import Match, is_matched, matched, shows_its_type
from verify.kernels.cache_types import run_cache
from verify.kernels.call import AttentionPath, Call, Shape, checked_call
from verify.kernels.errors import KernelFailure
from verify.kernels.formed import whole_path
from verify.kernels.heads import Heads
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.plans.shapes import ModelShape
from verify.kernels.registry import build_kernel
from verify.machine.devices import free_memory
from verify.machine.errors import UsageError
from verify.model.architectures.architecture import Architecture


def model_record(architecture: Architecture) -> ModelRecord:
    """The model, as `run.json` names it."""
    file, sizes = architecture.file, architecture.sizes
    return ModelRecord(
        path=str(file.path),
        name=file.metadata.get("general.name"),
        architecture=file.architecture,
        bytes=file.n_bytes,
        fingerprint=file.fingerprint,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        ratio=sizes.ratio,
        head_size=sizes.k_size,
        context=sizes.context,
    )


def check_shapes(specs: Sequence[str], shapes: Sequence[ModelShape], path: AttentionPath) -> None:
    """Raises UsageError where a plan or a head size does not fit, SpecError for no specification."""
    for spec in specs:
        kernel = build_kernel(spec)
        try:
            for shape in shapes:
                asked = Shape(1, 2, 1, shape.heads)
                kernel.arithmetic(asked, path).depths(1)
                odd = kernel.capabilities().size_multiple
                if shape.k_size % odd or shape.v_size % odd:
                    raise ValueError(f"it has only head sizes that are multiples of {odd}")
        except ValueError as error:
            raise UsageError(f"kernel {spec!r} does not fit this shape: {error}") from None
        finally:
            kernel.close()


def any_call(architecture: Architecture) -> Shape:
    """The shape of a call of this model: one row that sees one key."""
    sizes = architecture.sizes
    return Shape(1, 1, 1, Heads(q=sizes.heads, kv=sizes.kv_heads, k_size=sizes.k_size, v_size=sizes.v_size))


def check_lengths(
    n_kvs: Sequence[int], shapes: Sequence[ModelShape], device: torch.device, *, sequences: int = 1
) -> None:
    """Raises UsageError where keys and values of one layer alone are more than is free."""
    free = free_memory(device)
    for shape in shapes:
        for n_kv in n_kvs:
            if (needed := sequences * shape.cache_bytes(n_kv)) > free:
                raise UsageError(
                    f"--n-kv {n_kv}: keys and values of shape {shape.name} alone take {needed / 1e9:.3g} GB,"
                    f" {free / 1e9:.3g} GB are free on {device}"
                )


def try_kernels(
    arms: Sequence[Arm], architecture: Architecture, cache_type: str, device: torch.device
) -> None:
    """Run each kernel on a row or two of this model: what does not fit it, or is not taken, is refused now.

    A function in a file is only asked what it takes: to run it is to judge it. So is a kernel that fails
    otherwise. Raises UsageError.
    """
    _check_cache(architecture, cache_type)
    for arm, layer in itertools.product(arms, unlike_layers(architecture)):
        if arm.kernel is None:
            continue
        # Of a kernel that is given windows a small one: on a GPU that is other code than one row by itself.
        rows = 2 if arm.path == "decode" and arm.kernel.as_if_alone else 1
        call = few_rows(architecture, layer, cache_type, device, arm.path, rows=rows)
        why = None
        if arm.spec.startswith("py:"):
            why = arm.kernel.refuses(call)
        else:
            try:
                arm.kernel.run(call)
            except ValueError as error:
                why = str(error)
            except KernelFailure as failed:
                why = str(failed) if failed.kind == "unsupported" else None
        if why is not None:
            raise UsageError(f"kernel {arm.spec!r} does not fit this model: {why}")


def _check_cache(architecture: Architecture, cache_type: str) -> None:
    """Raises UsageError where heads of some layer do not fit the cache that all arms have."""
    cache = run_cache(cache_type).cache
    for layer in filter(architecture.attends, range(architecture.sizes.layers)):
        for size in architecture.head_sizes_of(layer):
            if size % cache.size_multiple:
                raise UsageError(
                    f"--cache-type {cache_type}: expected head sizes in multiples of {cache.size_multiple},"
                    f" layer {layer} has {size}"
                )


def few_rows(
    architecture: Architecture,
    layer: int,
    cache_type: str,
    device: torch.device,
    path: AttentionPath,
    *,
    rows: int = 1,
) -> Call:
    """A call of one row and one key, or of a window of as many, all zeros, with a layer's heads, sizes and
    settings."""
    heads, kv_heads = architecture.heads_of(layer), architecture.kv_heads_of(layer)
    k_size, v_size = architecture.head_sizes_of(layer)
    q, k, v = (
        torch.zeros(1, rows, n, size, dtype=FLOAT_TYPES[run_cache(cache_type).attention].dtype, device=device)
        for n, size in ((heads, k_size), (kv_heads, k_size), (kv_heads, v_size))
    )
    options = architecture.attention_settings(layer).options(device)
    kv_len = torch.arange(1, rows + 1, dtype=torch.int32, device=device)[None]
    return checked_call(q, k, v, kv_len=kv_len, path=whole_path(path), **options)


def match_baselines(
    baseline: str,
    candidates: Sequence[str],
    architecture: Architecture,
    *,
    cache_type: str,
    device: torch.device,
    path: AttentionPath,
) -> list[Match]:
    """The baseline of each candidate: of `own` itself, else (`out=match`) by one call of a kernel that only
    shows its type so.

    The call is one of a process of its own: an arm's first call is still its first. Raises SpecError.
    """
    if baseline == OWN:
        return [Match(spec, "") for spec in candidates]
    layer = unlike_layers(architecture)[0]
    call = few_rows(architecture, layer, cache_type, device, path)
    found = []
    for spec in candidates:
        if not is_matched(baseline):
            found.append(Match(baseline, ""))
            continue
        kernel = build_kernel(spec)
        try:
            failed = shows_its_type(spec) and attempt(kernel, call).output is None
            found.append(matched(baseline, spec, "f32" if failed else kernel.result_type(call)))
        finally:
            kernel.close()
    return found


def unlike_layers(architecture: Architecture) -> list[int]:
    """Of the layers with attention the first of each kind: alike are heads, sizes, settings, sinks aside."""
    found: dict[Any, int] = {}
    for layer in filter(architecture.attends, range(architecture.sizes.layers)):
        settings = architecture.attention_settings(layer)
        alike = (
            architecture.heads_of(layer),
            architecture.kv_heads_of(layer),
            architecture.head_sizes_of(layer),
            replace(settings, sinks=None),
            settings.sinks is None,
        )
        found.setdefault(alike, layer)
    return list(found.values())
