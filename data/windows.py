"""Tokens cut into the windows that perplexity is measured on: the same ones that llama-perplexity cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from verify.data.errors import CorpusError

SMALLEST_N_CTX = 4
_LARGEST_ID = 2**31 - 1


class ScoredRows(NamedTuple):
    """The scored positions of windows of n_ctx tokens: first .. n_ctx - 2, each a row, window after window.

    >>> rows = ScoredRows.second_half(512)
    >>> rows.positions, rows.per_window, rows.place(300)
    (range(256, 511), 255, (1, 45))
    """

    n_ctx: int
    first: int

    @classmethod
    def second_half(cls, n_ctx: int) -> ScoredRows:
        """What llama-perplexity scores."""
        return cls(n_ctx, n_ctx // 2)

    @property
    def positions(self) -> range:
        """In a window; each scores the token after it."""
        return range(self.first, self.n_ctx - 1)

    @property
    def per_window(self) -> int:
        return len(self.positions)

    def place(self, row: int) -> tuple[int, int]:
        """The window of a row, and its number among that window's rows."""
        return divmod(row, self.per_window)


@dataclass(frozen=True, eq=False)
class Windows:
    """Consecutive windows of `n_ctx` tokens that do not overlap, the first at the start of the text.

    `tokens` [n_windows, n_ctx] int32, as evaluated: where the model adds BOS, position 0 of every window is
    BOS, and `overwritten` [n_windows] int32 is what the text had there (None where the model adds no BOS).
    `n_tokens_total` counts the whole text, with a BOS before it if the model adds one and with the tail
    that fills no window.

    The positions `first_scored` .. n_ctx - 2 each score the token after them:

    >>> windows = cut_windows(range(16), n_ctx=8)
    >>> windows.scored_positions, windows.targets.tolist()
    (range(4, 7), [[5, 6, 7], [13, 14, 15]])
    """

    tokens: np.ndarray
    n_ctx: int
    first_scored: int
    n_tokens_total: int
    overwritten: np.ndarray | None = None

    @property
    def n_windows(self) -> int:
        return len(self.tokens)

    @property
    def scored_positions(self) -> range:
        """The positions in a window whose logits are scored."""
        return self.rows.positions

    @property
    def scored_per_window(self) -> int:
        """Tokens scored in a window: n_ctx - 1 - first_scored (255 of 512)."""
        return self.rows.per_window

    @property
    def rows(self) -> ScoredRows:
        return ScoredRows(self.n_ctx, self.first_scored)

    @property
    def targets(self) -> np.ndarray:
        """[n_windows, scored_per_window] int32: the token after each scored position.

        Always the text's own: only position 0 is ever substituted, and nothing scores that.
        """
        return self.tokens[:, self.first_scored + 1 :]

    @property
    def text_tokens(self) -> np.ndarray:
        """[n_windows, n_ctx] int32: the windows as the text has them, without the BOS of the evaluation."""
        if self.overwritten is None:
            return self.tokens
        tokens = self.tokens.copy()
        tokens[:, 0] = self.overwritten
        return tokens


def cut_windows(
    token_ids: Sequence[int] | np.ndarray, *, n_ctx: int, chunks: int = -1, bos_id: int | None = None
) -> Windows:
    """The first `chunks` windows of a text (-1, or more than there are: all of them).

    `token_ids` [n_tokens] are the text's own, without BOS. Where the model adds BOS, `bos_id` is put before
    the text, which shifts it by one, and then overwrites the first token of every window: the two things
    that llama-perplexity does.

    Raises CorpusError where n_ctx < 4, where chunks is 0 or < -1, where the text (with its BOS) has fewer
    than 2 * n_ctx tokens, and for ids that are not integers of 0 .. 2**31 - 1 in one dimension.
    """
    if n_ctx < SMALLEST_N_CTX:
        raise CorpusError(f"windows: n_ctx: expected at least {SMALLEST_N_CTX} tokens, got {n_ctx}")
    if chunks < -1 or chunks == 0:
        raise CorpusError(f"windows: chunks: expected -1 (all) or at least 1, got {chunks}")
    text = _as_ids(token_ids)
    if bos_id is not None:
        text = np.concatenate((_as_ids([bos_id]), text))
    if len(text) < 2 * n_ctx:
        raise CorpusError(
            f"text: tokens: expected at least {2 * n_ctx} (2 * n_ctx, n_ctx = {n_ctx}), got {len(text)}; "
            "give a longer text or a smaller n_ctx"
        )
    n_windows = len(text) // n_ctx
    if chunks != -1:
        n_windows = min(n_windows, chunks)
    tokens = text[: n_windows * n_ctx].reshape(n_windows, n_ctx)
    overwritten = None
    if bos_id is not None:
        overwritten = tokens[:, 0].copy()
        tokens[:, 0] = bos_id
    return Windows(
        tokens=tokens,
        n_ctx=n_ctx,
        first_scored=ScoredRows.second_half(n_ctx).first,
        n_tokens_total=len(text),
        overwritten=overwritten,
    )


def strided_windows(
    token_ids: Sequence[int] | np.ndarray,
    *,
    n_ctx: int,
    stride: int,
    chunks: int = -1,
    bos_id: int | None = None,
) -> Windows:
    """Overlapping windows that begin `stride` tokens apart, as llama-perplexity --ppl-stride cuts them.

    A window has n_ctx + stride / 2 tokens and scores its last `stride`: every token is scored once, with
    nearly n_ctx before it. A BOS stands before the text alone. Raises CorpusError as `cut_windows` does, and
    where stride is not of 1 .. n_ctx - 1.
    """
    if not 1 <= stride < n_ctx:
        raise CorpusError(f"windows: stride: expected 1 to {n_ctx - 1} tokens, got {stride}")
    length = n_ctx + stride // 2
    # Whatever is refused of a text and of whole windows is refused there.
    cut_windows(token_ids, n_ctx=length, chunks=chunks, bos_id=bos_id)
    text = _as_ids(token_ids)
    if bos_id is not None:
        text = np.concatenate((_as_ids([bos_id]), text))
    n_windows = -(-(len(text) - length) // stride)
    if chunks != -1:
        n_windows = min(n_windows, chunks)
    tokens = np.stack([text[i * stride : i * stride + length] for i in range(n_windows)])
    return Windows(tokens=tokens, n_ctx=length, first_scored=length - stride - 1, n_tokens_total=len(text))


def _as_ids(token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """[n] int32, in memory of its own."""
    ids = np.asarray(token_ids)
    if ids.size == 0:
        return np.zeros(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise CorpusError(
            f"text: tokens: expected integers in one dimension, got {ids.dtype} of shape {ids.shape}"
        )
    if ids.min() < 0 or ids.max() > _LARGEST_ID:
        raise CorpusError(
            f"text: tokens: expected ids of 0 .. {_LARGEST_ID}, got {int(ids.min())} .. {int(ids.max())}"
        )
    return ids.astype(np.int32)
