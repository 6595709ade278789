"""What a group's tokens bring into the first layer: rows of the embedding matrix, each read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from verify.model.architectures.architecture import Architecture
from verify.model.logits import VOCABULARY_ROWS, State
from verify.model.products import Products
from verify.model.stream import TensorStream

# Rows of a tile where tokens' own vectors are made, once a group.
OWN_TILE = 512


class SlabRows:
    """`TokenRows` of tokens, each once, decoding a slice of a tensor at a time."""

    def __init__(self, stream: TensorStream, tokens: torch.Tensor, vocabulary: int) -> None:
        self.stream, self.tokens, self.vocabulary = stream, tokens, vocabulary

    def of_tokens(self, name: str) -> torch.Tensor:
        parts = []
        for first in range(0, self.vocabulary, VOCABULARY_ROWS):
            mine = self.tokens[(self.tokens >= first) & (self.tokens < first + VOCABULARY_ROWS)]
            # Processes that share their reading may need different rows: then all are read.
            if len(mine) or self.stream.share is not None:
                part = self.stream.take(name, slice(first, first + VOCABULARY_ROWS))
                parts.append(part[mine - first])
        return torch.cat(parts)

    def weights(self, name: str) -> torch.Tensor:
        return self.stream.take(name)


class FirstRows(NamedTuple):
    """What a group's tokens bring.

    states: embeddings [B * T, width] by slab; own: `Architecture.own_inputs` of the tokens, each once;
    places: by slab, which of them each position has [B * T]; n_ctx: positions of a window.
    """

    states: list[torch.Tensor]
    own: torch.Tensor | None
    places: dict[int, torch.Tensor]
    n_ctx: int

    def own_of(self, layer: int, spans: Mapping[str, range], state: State) -> torch.Tensor:
        """Rows [B * T, P] of a state for a layer; spans: what each arm computes of a window."""
        assert self.own is not None
        span = spans[state[1]]
        place = self.places[state[0]].unflatten(0, (-1, self.n_ctx))[:, span.start : span.stop]
        return self.own[place.flatten(), layer]


def first_rows(
    architecture: Architecture,
    stream: TensorStream,
    products: Products,
    tokens: torch.Tensor,
    slabs: Sequence[range],
) -> FirstRows:
    """Rows of the embedding matrix of tokens [W, T], and what layers take of a token beside them."""
    n_ctx = tokens.shape[1]
    found, place = tokens.flatten().long().unique(return_inverse=True)
    rows = SlabRows(stream, found, architecture.sizes.vocabulary)
    states = rows.of_tokens(architecture.embedding_tensor) * architecture.embedding_scale
    places = {slab.start: place[slab.start * n_ctx : slab.stop * n_ctx] for slab in slabs}
    # On tiles of one size: a row's bits depend on nothing but its token.
    own = architecture.own_inputs(states, rows, products.with_tile(OWN_TILE))
    return FirstRows([states[places[slab.start]] for slab in slabs], own, places, n_ctx)
