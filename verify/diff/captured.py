"""q, k and v of a model's layers on real text: written by `verify ppl --capture`, read by `verify diff`.

One .npz file a layer in the folder `captured` of a run: q [1, T, Hq, Dk], k [1, T, Hkv, Dk] and
v [1, T, Hkv, Dv] of the exact arm in the first window, and the attention's settings.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verify.diff.cells import Inputs
from verify.kernels.call import AttentionPath, checked_call
from verify.machine.errors import UsageError
from verify.machine.files import written_whole
from verify.model.runner import LayerCall

FOLDER = "captured"
_FILE = re.compile(r"layer-(\d+)\.npz")
# Rows that a diff takes of a captured window, samples of a stratum: the last ones, where n_kv is largest.
ROWS = 64


def parse_layers(
    text: str, layers: int, attends: Callable[[int], bool] = lambda layer: True
) -> frozenset[int]:
    """`all`, or `0,5,29`. Raises UsageError for a layer that the model has not, or that has no attention."""
    if text == "all":
        return frozenset(filter(attends, range(layers)))
    try:
        chosen = frozenset(int(part) for part in text.split(","))
    except ValueError:
        chosen = frozenset({-1})
    if not all(0 <= layer < layers for layer in chosen):
        raise UsageError(f"--capture {text}: expected all, or layers from 0 to {layers - 1}, comma between")
    if without := [layer for layer in sorted(chosen) if not attends(layer)]:
        having = ",".join(str(layer) for layer in range(layers) if attends(layer))
        raise UsageError(f"--capture {text}: layer {without[0]} has no attention, expected some of {having}")
    return chosen


def capture_to(folder: Path, layers: frozenset[int]) -> Callable[[LayerCall], None]:
    """What the exact arm calls at every layer: writes the chosen layers of the first window."""
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)

    def capture(call: LayerCall) -> None:
        if call.window != 0 or call.layer not in layers:
            return
        arrays: dict[str, Any] = {
            name: x[:1].cpu().float().numpy() for name, x in zip("qkv", (call.q, call.k, call.v), strict=True)
        }
        with written_whole(target / f"layer-{call.layer:03d}.npz") as part, part.open("wb") as file:
            np.savez(
                file,
                kv_len=call.kv_len[:1].cpu().numpy(),
                scale=np.float64(call.settings.scale),
                sliding_window=np.int64(call.settings.sliding_window or 0),
                softcap=np.float64(call.settings.softcap or 0),
                # Empty where there are none.
                sinks=np.array(call.settings.sinks or (), np.float32),
                alibi_slopes=np.array(call.settings.alibi_slopes or (), np.float32),
                dtype=np.array(str(call.q.dtype).removeprefix("torch.")),
                **arrays,
            )

    return capture


def captured_inputs(run: str, path: AttentionPath, device: torch.device) -> Iterator[Inputs]:
    """The captured layers of a run folder as inputs of a diff. Raises UsageError."""
    folder = Path(run) / FOLDER
    files = sorted(f for f in folder.glob("layer-*.npz") if _FILE.fullmatch(f.name))
    if not files:
        raise UsageError(
            f"--captured-from {run}: no captured layers there (verify ppl --capture LAYERS writes them)"
        )
    for file in files:
        match = _FILE.fullmatch(file.name)
        assert match is not None
        try:
            with np.load(file, allow_pickle=False) as stored:
                found: dict[str, Any] = {name: stored[name] for name in stored.files}
            dtype = getattr(torch, str(found["dtype"]))
            q, k, v = (torch.from_numpy(found[name]).to(device, dtype) for name in "qkv")
            kv_len = torch.from_numpy(found["kv_len"]).to(device)
            rows = slice(max(q.shape[1] - ROWS, 0), None)
            call = checked_call(
                q[:, rows].contiguous(),
                k,
                v,
                kv_len=kv_len[:, rows].contiguous(),
                scale=float(found["scale"]),
                path=path,
                sliding_window=int(found["sliding_window"]) or None,
                softcap=float(found["softcap"]) or None,
                sinks=_per_head(found.get("sinks"), device),
                alibi_slopes=_per_head(found.get("alibi_slopes"), device),
            )
        except (OSError, KeyError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise UsageError(f"--captured-from {run}: {file.name} cannot be read: {error}") from None
        layer = int(match[1])
        name = f"{call.shape.q_heads}/{call.shape.kv_heads}x{call.shape.k_size}"
        yield Inputs(name, call.shape.keys, f"layer {layer}", 0, call)


def _per_head(values: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
    """Numbers [H], None where there are none."""
    return None if values is None or not len(values) else torch.from_numpy(values).to(device)
