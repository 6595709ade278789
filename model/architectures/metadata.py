"""Numbers of a model's metadata, checked as they are read. Keys are `A.key`, A the architecture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile


class Metadata:
    """The keys of one file's architecture. Every error names the file and the full key."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def name(self, key: str) -> str:
        return f"{self.file.architecture}.{key}"

    def get(self, key: str) -> Any:
        """The value as it stands in the file, None where there is none."""
        return self.file.metadata.get(self.name(key))

    def number(self, key: str, default: float | None = None) -> float:
        """A number. Raises ModelError if it is missing and has no default, or is something else."""
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.file.path}: metadata key {self.name(key)} is missing, expected a number")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ModelError(
                f"{self.file.path}: metadata key {self.name(key)}: expected a number, got {value!r:.60}"
            )
        return value

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number from `least`."""
        return self._whole(key, self.number(key, default), least)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; 0 and 1 pass for them."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, (list, np.ndarray)) or value not in (True, False):
            raise ModelError(
                f"{self.file.path}: metadata key {self.name(key)}: expected true or false, got {value!r:.60}"
            )
        return bool(value)

    def word(self, key: str, default: str) -> str:
        """A text. Raises ModelError where it is something else."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise ModelError(
                f"{self.file.path}: metadata key {self.name(key)}: expected a text, got {value!r:.60}"
            )
        return value or default

    def per_layer(self, key: str, blocks: int, default: int | None = None) -> list[int]:
        """A whole number a block: an array of `blocks` values, or one value for all."""
        value = self.get(key)
        if not isinstance(value, (list, np.ndarray)):
            return [self.whole(key, default)] * blocks
        if len(value) != blocks:
            raise ModelError(
                f"{self.file.path}: metadata key {self.name(key)} has {len(value)} values,"
                f" expected one for each of {blocks} blocks"
            )
        numbers = [v.item() if isinstance(v, np.generic) else v for v in value]
        return [self._whole(key, number, 1) for number in numbers]

    def _whole(self, key: str, value: Any, least: int) -> int:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value % 1 or value < least:
            raise ModelError(
                f"{self.file.path}: metadata key {self.name(key)}:"
                f" expected a whole number from {least}, got {value!r:.60}"
            )
        return int(value)
