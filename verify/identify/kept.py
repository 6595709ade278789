"""Readings that are kept from run to run, each under what it depends on, and proved before it is used.

A reading is a file of a folder of the user's, named by a hash of the kernel's specification and binary (or
the source of a `py:` file), the device, torch, the code that reads, and the sizes of the calls. None of them
says what a kernel imports, or chooses as it runs. So a reading has the hash of one result beside it, of
inputs that are always the same: only a kernel that still gives these bits is taken to compute as it did.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import verify.kernels.identify as reading_code
from verify.kernels.call import AttentionPath
from verify.kernels.identify.asking import NotIdentifiable, Regime, bare
from verify.kernels.identify.reading import Reading, bits_of, read
from verify.kernels.kernel import Kernel

# A folder for readings, or `off`: none are kept.
VARIABLE = "VERIFY_CACHE"
_SCHEMA = 1


def folder() -> Path | None:
    """Where readings are kept; None for nowhere."""
    named = os.environ.get(VARIABLE, "")
    if named == "off":
        return None
    if named:
        return Path(named)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "verify" / "readings"


def read_or_known(
    kernel: Kernel, path: AttentionPath, regime: Regime, shorter: Reading | None = None
) -> Reading:
    """`read`, or what it found before, where one call shows that the kernel has not changed.

    shorter: the reading of such calls with fewer keys. Raises NotIdentifiable.
    """
    asked = bare(kernel, path)
    file = _file(kernel, path, regime)
    if file is None:
        return read(asked, regime, known=shorter)
    known = _loaded(file)
    if known is not None and known[0] == bits_of(asked, regime):
        return known[1]
    found = read(asked, regime, known=shorter)
    with suppress(OSError, NotIdentifiable):
        _keep(file, bits_of(asked, regime), found)
    return found


@cache
def _code() -> str:
    """Hash of the code that reads."""
    here = Path(str(reading_code.__file__)).parent
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(here.glob("*.py")))).hexdigest()


def _file(kernel: Kernel, path: AttentionPath, regime: Regime) -> Path | None:
    """Where the reading of a kernel in a regime is kept; None where it is not told apart from others."""
    where = folder()
    binary = getattr(kernel, "binary", "") or getattr(kernel, "version", "")
    if where is None or not binary:
        return None
    # Some run elsewhere than their calls lie.
    device = getattr(kernel, "runs_on", None) or torch.device(regime.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sizes = [str(x) for x in regime._replace(device=name)]
    key = json.dumps([_SCHEMA, _code(), kernel.spec, binary, path, torch.__version__, sizes])
    return where / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _loaded(file: Path) -> tuple[str, Reading] | None:
    """The bits and the reading in a file; None for none, or one that is not ours."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        found = {name: _as_was(value) for name, value in kept["reading"].items()}
        if found.keys() != {field.name for field in fields(Reading)}:
            return None
        found["exponential"] = math.nan if found["exponential"] is None else found["exponential"]
        return str(kept["bits"]), Reading(**found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _as_was(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _keep(file: Path, bits: str, found: Reading) -> None:
    """Raises OSError."""
    values = asdict(replace(found, how=dict(found.how)))
    if math.isnan(found.exponential):
        values["exponential"] = None
    file.parent.mkdir(parents=True, exist_ok=True)
    # Others may read it while it is written.
    half = file.with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps({"bits": bits, "reading": values}), encoding="utf-8")
    half.replace(file)
