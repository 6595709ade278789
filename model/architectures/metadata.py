"""Numbers of a model's metadata, checked as they are read. Keys are `A.key`, A the architecture."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile

# A key with one of these in its name says how a layer computes.
_TELLING = re.compile(
    "attention|attn|rope|expert|moe|softcap|scal|swa|window|clamp|residual|ssm|norm|nextn|indexer|per_layer"
    "|interval|parallel|hyper|kda|conv|shared|every_n|num_loops|dense|activation|alibi|interleave"
)
# Keys that change nothing in any model here, whatever they say: llama.cpp does not read them either, or reads
# them and uses them for nothing.
WITHOUT_EFFECT = frozenset(
    {
        "attention.layer_norm_epsilon",
        "attention.group_norm_epsilon",
        "attention.group_norm_groups",
        "expert_shared_count",
        "expert_shared_feed_forward_length",
        "rope.dimension_sections",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_log_multiplier",
    }
)


class Metadata:
    """The keys of one file's architecture. Every error names the file and the full key.

    asked: keys that somebody asked for. running: how many blocks run, where that is known to be less than
    there are; lists may hold a value for those alone.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.asked: set[str] = set()
        self.running: int | None = None

    def name(self, key: str) -> str:
        return f"{self.file.architecture}.{key}"

    def get(self, key: str) -> Any:
        """The value as it stands in the file, None where there is none."""
        self.asked.add(key)
        return self.file.metadata.get(self.name(key))

    def check_all_asked(self, without_effect: Collection[str]) -> None:
        """Raises ModelError for a key that nobody asked for, and that says how a layer computes.

        Zero and false stand for a setting that was never made. without_effect: keys that change nothing in
        this architecture.
        """
        prefix = self.name("")
        for full, value in self.file.metadata.items():
            key = full.removeprefix(prefix)
            if key == full or key in self.asked or key in without_effect or not _TELLING.search(key):
                continue
            unset = not isinstance(value, (str, list, np.ndarray)) and not value
            if key == "attention.causal":
                unset = value is True
            if not unset:
                raise ModelError(
                    f"{self.file.path}: metadata key {full} is not known in {self.file.architecture!r} files,"
                    " and to pass over it could change what the model computes"
                )

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

    def per_layer(self, key: str, blocks: int, default: int | None = None, *, least: int = 1) -> list[int]:
        """A whole number a block: an array of `blocks` values, or one value for all."""
        values = self._array(key, blocks)
        if values is None:
            return [self.whole(key, default, least=least)] * blocks
        return [self._whole(key, number, least) for number in values]

    def numbers_per_layer(self, key: str, blocks: int, default: float) -> list[float]:
        """A number a block: an array of `blocks` values, or one value for all."""
        values = self._array(key, blocks)
        if values is None:
            return [self.number(key, default)] * blocks
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ModelError(
                    f"{self.file.path}: metadata key {self.name(key)}: expected numbers, got {value!r:.60}"
                )
        return values

    def windowed(self, key: str, blocks: int, period: int | None = None) -> list[bool]:
        """Which blocks see a window: an array of `blocks` flags, or a period of which the last one does not.

        period: where the file does not say. By the engines' formula all do for 0, none for 1.
        """
        flags = self.flags_per_layer(key, blocks)
        if flags is not None:
            return flags
        every = self.whole(key, period, least=0)
        return [every == 0 or layer % every < every - 1 for layer in range(blocks)]

    def flags_per_layer(self, key: str, blocks: int) -> list[bool] | None:
        """A flag a block; None where the value is no array."""
        values = self._array(key, blocks)
        for value in values or ():
            if value not in (0, 1):
                raise ModelError(
                    f"{self.file.path}: metadata key {self.name(key)}: expected flags, got {value!r:.60}"
                )
        return None if values is None else [bool(value) for value in values]

    def _array(self, key: str, blocks: int) -> list[Any] | None:
        """The values of an array, one a block; None where it is none."""
        value = self.get(key)
        if not isinstance(value, (list, np.ndarray)):
            return None
        if len(value) not in (blocks, self.running):
            raise ModelError(
                f"{self.file.path}: metadata key {self.name(key)} has {len(value)} values,"
                f" expected one for each of {blocks} blocks"
            )
        return [v.item() if isinstance(v, np.generic) else v for v in value]

    def _whole(self, key: str, value: Any, least: int) -> int:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value % 1 or value < least:
            raise ModelError(
                f"{self.file.path}: metadata key {self.name(key)}:"
                f" expected a whole number from {least}, got {value!r:.60}"
            )
        return int(value)
