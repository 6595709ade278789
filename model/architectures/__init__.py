"""One module an architecture, found by the name in the file's `general.architecture`."""

from __future__ import annotations

from model.architectures.architecture import Architecture
from model.architectures.llama import Llama
from model.errors import ModelError
from model.gguf_file import GGUFFile

ARCHITECTURES: dict[str, type[Architecture]] = {"llama": Llama}


def architecture_of(file: GGUFFile) -> Architecture:
    """The architecture of a file, its metadata read and checked. Raises ModelError."""
    found = ARCHITECTURES.get(file.architecture)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{file.path}: general.architecture is {file.architecture!r}, expected one of: {known}"
        )
    return found(file)
