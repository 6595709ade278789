"""A GGUF file rewritten with other keys or tensors: for files that contradict themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support.twins import add_key
from verify.model.gguf.dequantize import dequantize
from verify.model.gguf.file import GGUFFile


def rewrite(
    source: Path,
    out: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    drop: Sequence[str] = (),
    architecture: str | None = None,
) -> Path:
    """Write `source` to `out` in float32. keys, without the architecture, and tensors are replaced or added.

    drop: keys and tensors to be left out.
    """
    file = GGUFFile.open(source)
    new = architecture or file.architecture
    writer = gguf.GGUFWriter(out, new)
    kept = {
        key.removeprefix(f"{file.architecture}."): value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in file.metadata.items()
        if key.startswith(f"{file.architecture}.")
    }
    for key, value in (kept | dict(keys or {})).items():
        if key not in drop:
            add_key(writer, f"{new}.{key}", value)
    values = {name: dequantize(file, name).numpy() for name in file.tensors} | dict(tensors or {})
    for name, value in values.items():
        if name not in drop:
            writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
