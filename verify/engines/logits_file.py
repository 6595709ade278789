"""The logits files of llama-perplexity's `--kl-divergence-base`, a block of records at a time.

Little-endian:

    0    the 8 bytes `_logits_`
    8    int32 n_ctx, n_vocab, n_chunk
    20   int32 tokens [n_chunk, n_ctx], as the text has them (BOS does not overwrite the first of a window)
    ...  n_chunk * (n_ctx - 1 - n_ctx // 2) records, one a scored position

A record holds the logarithms of one position's probabilities in 16 bits each:

    float32 scale, float32 min_log_prob, uint16 q [n_vocab], one zero uint16 more where n_vocab is odd
    ln p_i = scale * q_i + min_log_prob

    mx = max l    mn = max(min l, mx - W)    lse = ln sum exp(l - mx)      in float32
    scale = (mx - mn) / 65535    min_log_prob = mn - mx - lse    q_i = round((l_i - mn) / scale), 0 below mn

W, the clip width, is 24 in ik_llama.cpp and 16 in llama.cpp; the file does not say which.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from verify.data.windows import ScoredRows
from verify.machine.errors import UsageError

MAGIC = b"_logits_"
CLIP_WIDTHS = {"ik_llama.cpp": 24.0, "llama.cpp": 16.0}
DEFAULT_CLIP = CLIP_WIDTHS["ik_llama.cpp"]
LARGEST_CODE = 65535
# Bytes of records that a reader holds, which is also what one read of the file takes.
BLOCK_BYTES = 8 << 20
_HEADER = np.dtype("<i4")
_RECORD_HEAD = 8
# No writer spans more: the wider clip and the logarithm of a vocabulary make 40. What float32 leaves of 0.
_WIDEST, _ROUNDING = 100.0, 0.01


class Layout(NamedTuple):
    """Sizes that follow from the header."""

    n_ctx: int
    n_vocab: int
    n_chunk: int

    @property
    def rows(self) -> ScoredRows:
        return ScoredRows.second_half(self.n_ctx)

    @property
    def first_scored(self) -> int:
        return self.rows.first

    @property
    def scored(self) -> int:
        """Records of one window."""
        return self.rows.per_window

    @property
    def record_bytes(self) -> int:
        return _RECORD_HEAD + 2 * (self.n_vocab + self.n_vocab % 2)

    @property
    def records_at(self) -> int:
        """Offset of the first record."""
        return len(MAGIC) + 12 + 4 * self.n_chunk * self.n_ctx

    @property
    def file_bytes(self) -> int:
        return self.records_at + self.n_chunk * self.scored * self.record_bytes

    def record_at(self, window: int, row: int) -> int:
        return self.records_at + (window * self.scored + row) * self.record_bytes


class Records(NamedTuple):
    """Consecutive records of one window: scale and low [n] float32, codes [n, n_vocab] uint16.

    row: of the first among the window's scored positions. The arrays are overwritten by the next read.
    """

    window: int
    row: int
    scale: np.ndarray
    low: np.ndarray
    codes: np.ndarray

    def log_probs(self) -> np.ndarray:
        """[n, n_vocab] float32, memory of its own."""
        return self.scale[:, None] * self.codes + self.low[:, None]


class LogitsFile:
    """A logits file open for reading. `tokens` [n_chunk, n_ctx] int32.

    Raises UsageError naming the file and the field for anything that is not a whole logits file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_fifo():
            # Its records are read in any order; and a pipe that nobody writes would be waited for.
            raise UsageError(f"{path}: is a pipe, expected a file")
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
        try:
            self.layout, self.tokens = self._read_head()
        except BaseException:
            self.close()
            raise
        self._buffer = np.empty(0, np.uint8)

    def _read_head(self) -> tuple[Layout, np.ndarray]:
        try:
            head = self._file.read(len(MAGIC) + 12)
            size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if head[: len(MAGIC)] != MAGIC:
            raise UsageError(
                f"{self.path}: begins with {head[: len(MAGIC)]!r}, expected {MAGIC!r}:"
                " not a logits file of llama-perplexity --kl-divergence-base"
            )
        if len(head) < len(MAGIC) + 12:
            raise UsageError(f"{self.path}: ends after {size} bytes, in the header: the file is cut off")
        layout = Layout(*(int(x) for x in np.frombuffer(head, _HEADER, offset=len(MAGIC))))
        for field, least in (("n_ctx", 4), ("n_vocab", 1), ("n_chunk", 1)):
            value = getattr(layout, field)
            if value < least:
                raise UsageError(f"{self.path}: {field} is {value}, expected at least {least}")
        if size != layout.file_bytes:
            whole = max(size - layout.records_at, 0) // (layout.scored * layout.record_bytes)
            said = (
                f"the file is cut off after {whole} whole windows"
                if size < layout.file_bytes
                else ("there is more after the last record")
            )
            raise UsageError(
                f"{self.path}: {size} bytes, expected {layout.file_bytes} for {layout.n_chunk} windows of"
                f" {layout.n_ctx} tokens and a vocabulary of {layout.n_vocab}: {said}"
            )
        raw = self._file.read(4 * layout.n_chunk * layout.n_ctx)
        tokens = np.frombuffer(raw, _HEADER).reshape(layout.n_chunk, layout.n_ctx)
        outside = (tokens < 0) | (tokens >= layout.n_vocab)
        if outside.any():
            at = int(outside.ravel().argmax())
            raise UsageError(
                f"{self.path}: token {at} is {int(tokens.ravel()[at])}, expected 0 to {layout.n_vocab - 1}"
            )
        return layout, tokens

    @property
    def targets(self) -> np.ndarray:
        """[n_chunk, scored] int32: the token after each scored position."""
        return self.tokens[:, self.layout.first_scored + 1 :]

    def blocks(self) -> Iterator[Records]:
        """All records in order, at most BLOCK_BYTES at a time (but one record at least)."""
        rows = self.rows_a_block
        for window in range(self.layout.n_chunk):
            for index in range(0, self.layout.scored, rows):
                yield self.read(window, index, min(rows, self.layout.scored - index))

    def widest_span(self) -> float:
        """Nats that the widest record spans, from the records' heads alone; 0 where none is a number.

        A writer's clip shows as this: no record spans more.
        """
        records = np.memmap(self.path, np.uint8, "r", self.layout.records_at)
        scales = records.reshape(-1, self.layout.record_bytes)[:, :4].copy().view("<f4")[:, 0]
        finite = scales[np.isfinite(scales)]
        return float(finite.max(initial=0.0)) * LARGEST_CODE

    @property
    def rows_a_block(self) -> int:
        return max(BLOCK_BYTES // self.layout.record_bytes, 1)

    def read(self, window: int, index: int, count: int) -> Records:
        """`count` records of a window from its scored position `index`, in a buffer that is used again."""
        layout = self.layout
        need = count * layout.record_bytes
        if len(self._buffer) < need:
            self._buffer = np.empty(need, np.uint8)
        raw = self._buffer[:need]
        view = raw.data
        done = 0
        try:
            self._file.seek(layout.record_at(window, index))
            while done < need:
                got = self._file.readinto(view[done:])
                if not got:
                    raise UsageError(f"{self.path}: window {window + 1} ended while it was read")
                done += got
        except OSError as error:
            raise UsageError(f"{self.path}: window {window + 1}: {error.strerror or error}") from None
        rows = raw.reshape(count, layout.record_bytes)
        head = rows[:, :_RECORD_HEAD].copy().view("<f4")
        self._check_heads(head, window, index)
        codes = rows.view("<u2")[:, _RECORD_HEAD // 2 : _RECORD_HEAD // 2 + layout.n_vocab]
        return Records(window, index, head[:, 0], head[:, 1], codes)

    def _check_heads(self, head: np.ndarray, window: int, index: int) -> None:
        """Raises UsageError for finite numbers that no writer makes: the file is damaged there.

        NaN and Inf pass: an engine whose logits are not finite writes them.
        """
        with np.errstate(invalid="ignore"):
            scale, least = head[:, 0].astype(np.float64), head[:, 1].astype(np.float64)
            finite = np.isfinite(scale) & np.isfinite(least)
            span = scale * 65535
            absurd = finite & ((scale < 0) | (span > _WIDEST) | (least < -_WIDEST) | (least > _ROUNDING))
        if absurd.any():
            i = int(absurd.argmax())
            raise UsageError(
                f"{self.path}: window {window + 1}, record {index + i + 1}: scale {scale[i]:g}, min_log_prob"
                f" {least[i]:g}: expected logarithms of probabilities, 0 to -{_WIDEST:g}: the file is damaged"
            )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: object, trace: TracebackType | None) -> None:
        self.close()


class LogitsWriter:
    """A logits file being written. Records may come in any order of windows; each has its place.

    tokens [n_chunk, n_ctx]: the windows as the text has them. clip: W. resume: go on with the file that is
    there, whose header and tokens must be these.
    """

    def __init__(
        self,
        path: str | Path,
        tokens: np.ndarray,
        n_vocab: int,
        *,
        clip: float = DEFAULT_CLIP,
        resume: bool = False,
    ) -> None:
        self.path, self.clip = Path(path), clip
        self.layout = Layout(tokens.shape[1], n_vocab, tokens.shape[0])
        head = MAGIC + np.array(self.layout, _HEADER).tobytes() + tokens.astype(_HEADER).tobytes()
        try:
            self._file = self.path.open("r+b" if resume else "w+b")
            if resume:
                if self._file.read(len(head)) != head:
                    raise UsageError(f"{path}: is not the logits file that this run began")
            else:
                self._file.write(head)
                self._file.truncate(self.layout.file_bytes)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from None

    def write(self, window: int, index: int, logits: np.ndarray) -> None:
        """Logits [n, n_vocab] float32 of a window's scored positions index, index + 1, ..."""
        try:
            self._file.seek(self.layout.record_at(window, index))
            self._file.write(encode(logits, self.clip).data)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written: {error.strerror or error}") from None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: object, trace: TracebackType | None) -> None:
        self.close()


def encode(logits: np.ndarray, clip: float = DEFAULT_CLIP) -> np.ndarray:
    """Records [n, record_bytes] uint8 of logits [n, n_vocab] float32."""
    l = np.asarray(logits, np.float32)
    n, n_vocab = l.shape
    largest = l.max(1, keepdims=True)
    least = np.maximum(l.min(1, keepdims=True), largest - np.float32(clip))
    lse = np.log(np.exp(l - largest).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (largest - least) / np.float32(LARGEST_CODE)
    # Where all logits are equal there is no scale, and every code is 0.
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.where(l > least, np.rint(inverse * (l - least)), 0)
    records = np.zeros((n, _RECORD_HEAD + 2 * (n_vocab + n_vocab % 2)), np.uint8)
    head = np.concatenate([scale, least - largest - lse], 1)
    records[:, :_RECORD_HEAD] = head.astype("<f4").view(np.uint8)
    kept = records.view("<u2")[:, _RECORD_HEAD // 2 :]
    kept[:, :n_vocab] = np.minimum(codes, LARGEST_CODE)
    return records
