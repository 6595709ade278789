"""Headroom of float16 sums on a model: a line a layer, window and length in the run's folder, summed up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from verify.arms.arm import kernel_call
from verify.kernels.judging.headroom import (
    OFFSETS,
    HeadroomPlace,
    grown_to,
    headroom,
    headroom_sentences,
    row_headroom,
    safe_offset,
)
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import FP8_TYPES
from verify.model.layer_call import LayerCall
from verify.ppl.headroom_record import HeadroomRecord, LayerHeadroom, OffsetHeadroom

FILE = "headroom.jsonl"
# Shorter rows say nothing of longer ones.
_SHORTEST = 64
# A length that engines have, to which those of a run are drawn out.
LONGER = 131072


def headroom_to(folder: Path, kernel: Kernel) -> Callable[[LayerCall], None]:
    """What the exact arm calls at every layer: appends a line a window and length to the run's file."""
    target = folder / FILE

    def look(call: LayerCall) -> None:
        lengths = call.kv_len[0].tolist()
        longest = max(lengths)
        chosen = [t for t, n in enumerate(lengths) if n == longest or (n >= _SHORTEST and n & (n - 1) == 0)]
        made = kernel_call(call, "decode", torch.tensor(chosen, device=call.q.device))
        found = row_headroom(made, kernel.arithmetic_of(made))
        with target.open("a", encoding="utf-8") as file:
            for b in range(call.q.shape[0]):
                for i, t in enumerate(chosen):
                    line = {
                        "layer": call.layer,
                        "window": call.window + b,
                        "n_kv": lengths[t],
                        "partial": found.partial[b, i].tolist(),
                        "logit": float(found.logit[b, i].max()),
                        "value": float(found.value[b, i].max()),
                    }
                    file.write(json.dumps(line) + "\n")

    return look


def headroom_record(folder: Path, kernel: Kernel) -> HeadroomRecord | None:
    """What the file of a run amounts to; None for none. A window that was run twice counts once."""
    lines = _lines(folder / FILE)
    if not lines:
        return None
    layers: list[LayerHeadroom] = []
    for layer, n_kv in sorted({(line["layer"], line["n_kv"]) for line in lines}):
        here = [line for line in lines if (line["layer"], line["n_kv"]) == (layer, n_kv)]
        worst = max(here, key=lambda line: max(line["partial"]))
        partial = max(worst["partial"])
        layers.append(
            LayerHeadroom(
                layer=layer,
                n_kv=n_kv,
                partial=partial,
                head=worst["partial"].index(partial),
                logit=max(line["logit"] for line in here),
                value=max(line["value"] for line in here),
            )
        )
    largest = max(each.partial for each in layers)
    longer = grown_to(_by_length(layers), LONGER)
    return HeadroomRecord(
        order=kernel.spec,
        windows=len({line["window"] for line in lines}),
        layers=layers,
        largest_partial=largest,
        offsets=[OffsetHeadroom(offset=c, headroom=headroom(largest, c)) for c in OFFSETS],
        safe_offset=safe_offset(largest),
        longer=None if longer is None else [longer.low, longer.partial, longer.high],
    )


def headroom_notes(record: HeadroomRecord | None, kernel: Kernel, cache_type: str) -> list[str]:
    """What a reader is told."""
    if record is None:
        return []

    def place(name: str) -> HeadroomPlace:
        one = max(record.layers, key=lambda each: float(getattr(each, name)))
        head = f", head {one.head}" if name == "partial" else ""
        return HeadroomPlace(getattr(one, name), f"layer {one.layer}{head}, {one.n_kv} keys")

    cache = kernel.cache.at(None)
    fp8 = any(kind in FP8_TYPES for kind in (cache.k, cache.v)) or any(x in cache_type for x in FP8_TYPES)
    return headroom_sentences(
        kernel.spec,
        place("partial"),
        place("logit"),
        place("value"),
        grown_to(_by_length(record.layers), LONGER),
        fp8=fp8,
    )


def _by_length(layers: Sequence[LayerHeadroom]) -> list[tuple[int, float]]:
    return [(n, max(x.partial for x in layers if x.n_kv == n)) for n in sorted({x.n_kv for x in layers})]


def _lines(file: Path) -> list[dict[str, Any]]:
    """By layer, window and length, the last of each: an interrupted group is run again."""
    found: dict[tuple[int, int, int], dict[str, Any]] = {}
    with suppress(OSError), file.open(encoding="utf-8") as opened:
        for text in opened:
            # The last line of a run that was cut off may be half a one.
            with suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                found[line["layer"], line["window"], line["n_kv"]] = line
    return list(found.values())
