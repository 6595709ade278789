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

from verify.diff.examining import CellInputs
from verify.kernels.call import AttentionPath, Call, checked_call
from verify.kernels.said import one_line
from verify.machine.errors import UsageError
from verify.machine.files import is_plain_folder, open_plain, written_whole
from verify.model.layer_call import LayerCall

FOLDER = "captured"
_FILE = re.compile(r"layer-(\d+)\.npz")
# Rows that a diff takes of a captured window, samples of a stratum: the last ones, where n_kv is largest.
ROWS = 64
_NUMBERS, _OF_HEADS = ("scale", "sliding_window", "softcap"), ("sinks", "alibi_slopes")
_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


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
        if call.keys is not None:
            arrays["keys"] = call.keys[:1].cpu().numpy()
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


def captured_inputs(run: str, path: AttentionPath, device: torch.device) -> Iterator[CellInputs]:
    """The captured layers of a run folder as inputs of a diff. Raises UsageError."""
    folder = Path(run) / FOLDER
    files = []
    if is_plain_folder(folder):
        files = sorted(f for f in folder.glob("layer-*.npz") if _FILE.fullmatch(f.name))
    if not files:
        raise UsageError(
            f"--captured-from {run}: no captured layers there (verify ppl --capture LAYERS writes them)"
        )
    for file in files:
        match = _FILE.fullmatch(file.name)
        assert match is not None
        try:
            call = _read(file, path, device)
        except (OSError, KeyError, ValueError, MemoryError, EOFError, zipfile.BadZipFile) as error:
            said = one_line(str(error) if not isinstance(error, KeyError) else f"{error} is missing", 200)
            raise UsageError(f"--captured-from {run}: {file.name} cannot be read: {said}") from None
        layer = int(match[1])
        name = f"{call.shape.q_heads}/{call.shape.kv_heads}x{call.shape.k_size}"
        yield CellInputs(name, call.shape.keys, f"layer {layer}", 0, call)


def _read(file: Path, path: AttentionPath, device: torch.device) -> Call:
    """The last rows of a captured layer. Raises OSError, KeyError, ValueError."""
    with open_plain(file) as opened:
        with zipfile.ZipFile(opened) as archive:
            # Ours are: what is packed could be of any size once it is not.
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is packed, which verify ppl --capture does not do")
        opened.seek(0)
        with np.load(opened, allow_pickle=False) as stored:
            found = {name: stored[name] for name in (*"qkv", "kv_len", *_NUMBERS, "dtype")}
            heads = {name: stored[name] for name in _OF_HEADS if name in stored.files}
            keys = stored["keys"] if "keys" in stored.files else None
    for name in "qkv":
        if found[name].ndim != 4 or found[name].dtype != np.float32 or not found[name].size:
            raise ValueError(
                f"{name} is {found[name].dtype}{list(found[name].shape)}, expected float32[1, T, H, D]"
            )
        if not np.isfinite(found[name]).all():
            raise ValueError(f"{name} holds NaN or Inf: the captured model overflows")
    if found["kv_len"].ndim != 2 or found["kv_len"].dtype.kind != "i":
        raise ValueError(
            f"kv_len is {found['kv_len'].dtype}{list(found['kv_len'].shape)}, expected int32[1, T]"
        )
    for name, x in heads.items():
        if x.ndim != 1 or x.dtype != np.float32 or len(x) not in (0, found["q"].shape[2]):
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}, expected float32[{found['q'].shape[2]}]")
    numbers = {}
    for name in _NUMBERS:
        if found[name].shape != () or found[name].dtype.kind not in "iuf" or not np.isfinite(found[name]):
            raise ValueError(f"{name} is {one_line(str(found[name]), 40)}, expected a finite number")
        numbers[name] = float(found[name])
    if str(found["dtype"]) not in _TYPES:
        raise ValueError(f"dtype is {one_line(str(found['dtype']), 40)}, expected one of {', '.join(_TYPES)}")
    dtype = _TYPES[str(found["dtype"])]
    if keys is not None and (keys.ndim != 3 or keys.dtype != np.int32):
        raise ValueError(f"keys is {keys.dtype}{list(keys.shape)}, expected int32[1, T, K]")
    q, k, v = (torch.from_numpy(found[name]).to(device, dtype) for name in "qkv")
    rows = slice(max(q.shape[1] - ROWS, 0), None)
    return checked_call(
        q[:, rows].contiguous(),
        k,
        v,
        kv_len=torch.from_numpy(found["kv_len"].astype(np.int32)).to(device)[:, rows].contiguous(),
        keys=None if keys is None else torch.from_numpy(keys).to(device)[:, rows].contiguous(),
        scale=numbers["scale"],
        path=path,
        sliding_window=int(numbers["sliding_window"]) or None,
        softcap=numbers["softcap"] or None,
        sinks=_per_head(heads.get("sinks"), device),
        alibi_slopes=_per_head(heads.get("alibi_slopes"), device),
    )


def _per_head(values: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
    """Numbers [H], None where there are none."""
    return None if values is None or not len(values) else torch.from_numpy(values).to(device)
