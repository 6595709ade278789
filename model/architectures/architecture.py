"""What an architecture provides: tensors of a layer, and the two halves of a layer around attention.

    x, weights --attention_inputs--> q, k, v  --attention (the caller's)-->  o  --after_attention--> x

Both drivers use the same two halves: whole windows a layer at a time, and token by token with a cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.errors import ModelError
from model.gguf_file import GGUFFile
from model.products import Products

Weights = Mapping[str, torch.Tensor]


class AttentionInputs(NamedTuple):
    """q [T, H, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv], float32, before they are rounded to the cache's type."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class AttentionSettings:
    """What attention of a layer takes beside q, k, v."""

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, as its metadata gives them."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    k_size: int
    v_size: int
    vocabulary: int
    context: int

    @property
    def ratio(self) -> int:
        return self.heads // self.kv_heads


class Architecture(ABC):
    """One model: its sizes, the tensors that each layer needs, and how a layer computes."""

    sizes: Sizes

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    @abstractmethod
    def layer_tensors(self, layer: int) -> dict[str, str]:
        """Short name -> tensor name in the file, for every tensor of this layer that the file has."""

    @abstractmethod
    def attention_settings(self, layer: int) -> AttentionSettings: ...

    @abstractmethod
    def attention_inputs(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, weights: Weights, products: Products
    ) -> AttentionInputs:
        """x [T, width] of consecutive tokens at `positions` [T]."""

    @abstractmethod
    def after_attention(
        self, layer: int, x: torch.Tensor, o: torch.Tensor, weights: Weights, products: Products
    ) -> torch.Tensor:
        """x [T, width] and the attention's output o [T, H, Dv] to the next layer's x [T, width]."""

    @abstractmethod
    def final_norm(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """The last hidden states, ready for the output matrix."""

    @property
    def embedding_tensor(self) -> str:
        return "token_embd.weight"

    @property
    def output_tensor(self) -> str:
        """The output matrix; files with tied embeddings leave it out."""
        return "output.weight" if "output.weight" in self.file.tensors else self.embedding_tensor

    @property
    def norm_tensors(self) -> dict[str, str]:
        return {"output_norm": "output_norm.weight"}

    def number(self, key: str, default: float | None = None) -> float:
        """A number of the metadata, `A.key` with A the architecture. Raises ModelError if it is missing."""
        full = f"{self.file.architecture}.{key}"
        value = self.file.metadata.get(full, default)
        if value is None:
            raise ModelError(f"{self.file.path}: metadata key {full} is missing, expected a number")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelError(f"{self.file.path}: metadata key {full}: expected a number, got {value!r:.60}")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 of the metadata."""
        value = self.number(key, default)
        if value != int(value) or value < 1:
            raise ModelError(
                f"{self.file.path}: metadata key {self.file.architecture}.{key}:"
                f" expected a whole number from 1, got {value}"
            )
        return int(value)

    def expect_shape(self, tensor: str, shape: tuple[int, ...]) -> None:
        """Raises ModelError if the tensor is missing or has another shape."""
        info = self.file.tensors.get(tensor)
        if info is None:
            raise ModelError(f"{self.file.path}: tensor {tensor} is missing")
        if tuple(info.shape) != shape:
            raise ModelError(
                f"{self.file.path}: tensor {tensor} has shape {list(info.shape)}, expected {list(shape)}"
            )
