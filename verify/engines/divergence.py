"""Two logits files, token by token: nll, divergence, the most likely tokens, and what 16 bits can resolve.

For a scored position with codes a and b, ln p_i = s a_i + m in the base and ln q_i = t b_i + n in the other:

    KLD = sum_i p_i (ln p_i - ln q_i)      over ln p_i > -16, as llama-perplexity sums it

The difference of logarithms is taken as (s - t) a_i + t (a_i - b_i) + (m - n): codes subtract exactly, so
that float32 does not add a rounding of its own to a difference of 1e-6 between numbers of 20.

The floor: each logarithm was rounded to its step, an error uniform over one step, so a difference of two has
the variance (s^2 + t^2) / 12, and a divergence, to first order, sum_i p_i^2 (s^2 + t^2) / 12. That is from
above: the largest logarithm lies on the grid.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from verify.engines.logits_file import CLIP_WIDTHS, LARGEST_CODE, LogitsFile, Records
from verify.machine.environment import usable_cpus
from verify.machine.errors import UsageError
from verify.machine.terminal import Progress

# llama-perplexity leaves out what is less likely than exp(-16).
SMALLEST_LOG_PROB = -16.0
# A clipped record spans its width up to float32's rounding of numbers of 20 or so.
CLIP_TOLERANCE = 1e-4
MOST_THREADS = 4


class FileScores(NamedTuple):
    """One file's own columns, arrays [windows, scored]."""

    # Of the token that came.
    nll: np.ndarray
    # The most likely token.
    top1: np.ndarray
    # Its logarithm of probability.
    largest: np.ndarray
    # Its distance in nats to the second.
    margin: np.ndarray
    # Of the record's codes, in nats.
    step: np.ndarray
    # The token that came lies at the bottom of a clipped record: its nll is a lower bound.
    clipped: np.ndarray
    # Scale and offset are numbers.
    finite: np.ndarray
    # Sum of p^2 (of a pair's base; NaN elsewhere).
    squares: np.ndarray

    def clipped_at(self, width: float) -> FileScores:
        """These columns as a file would hold them that was clipped `width` nats below the largest."""
        most = width - self.largest
        at_clip = self.nll >= most - self.step
        return self._replace(nll=np.minimum(self.nll, most), clipped=self.clipped | at_clip)


class PairScores(NamedTuple):
    """Another file against the base, arrays [windows, scored]. kld is NaN where a record is not finite.

    same: the two records are equal to the bit; clip: the narrower of two unlike clips, which kld is taken
    under, or None.
    """

    base: FileScores
    other: FileScores
    kld: np.ndarray
    same: np.ndarray
    clip: float | None = None

    @property
    def on_what_both_hold(self) -> PairScores:
        """The pair with both files clipped alike (see the module's text)."""
        if self.clip is None:
            return self
        return self._replace(base=self.base.clipped_at(self.clip), other=self.other.clipped_at(self.clip))

    @property
    def nll_floor(self) -> np.ndarray:
        """Standard deviation of one token's nll difference that the rounding alone makes."""
        return np.sqrt((self.base.step**2 + self.other.step**2) / 12)

    @property
    def kld_floor(self) -> np.ndarray:
        """Standard deviation of one token's divergence that the rounding alone makes."""
        return self.nll_floor * np.sqrt(self.base.squares)


def check_same_text(base: LogitsFile, other: LogitsFile) -> None:
    """Raises UsageError with the first difference where two files are not of the same tokens."""
    for field in ("n_vocab", "n_ctx", "n_chunk"):
        a, b = getattr(base.layout, field), getattr(other.layout, field)
        if a != b:
            raise UsageError(f"{other.path}: {field} is {b}, expected {a} as in {base.path}")
    check_tokens(other, base.tokens, str(base.path))


def check_tokens(file: LogitsFile, tokens: np.ndarray, where: str) -> None:
    """Raises UsageError with the first token that is not that of tokens [windows, n_ctx]."""
    differs = file.tokens != tokens
    if differs.any():
        window, position = (int(x) for x in np.argwhere(differs)[0])
        raise UsageError(
            f"{file.path}: token {position} of window {window + 1} is {int(file.tokens[window, position])},"
            f" expected {int(tokens[window, position])} as in {where}"
            f" ({int(differs.sum())} of {tokens.size} tokens differ)"
        )


def score_file(file: LogitsFile, progress: Progress | None = None) -> FileScores:
    """Columns of one file."""
    return _score(file, None, progress)[0]


def score_pair(base: LogitsFile, other: LogitsFile, progress: Progress | None = None) -> PairScores:
    """Columns of two files of the same text (see `check_same_text`)."""
    clip = common_clip(base, other)
    found, more, kld, same = _score(base, other, progress, clip)
    assert more is not None
    return PairScores(found, more, kld, same, clip)


def common_clip(base: LogitsFile, other: LogitsFile) -> float | None:
    """The narrower clip where one file holds less than the other; None where they hold as much."""
    spans = [file.widest_span() for file in (base, other)]
    widths = [w for span in spans if (w := _width_of(span)) is not None]
    narrow = min(widths, default=None)
    if narrow is None or max(spans) <= narrow * (1 + CLIP_TOLERANCE):
        return None
    return narrow


def clip_width(scores: FileScores) -> float | None:
    """The clip width that the file was written with, 24 or 16; None where no record reached one."""
    return _width_of(float(np.nanmax(scores.step * LARGEST_CODE, initial=0.0)))


def _width_of(span: float) -> float | None:
    return next((w for w in CLIP_WIDTHS.values() if abs(span - w) <= CLIP_TOLERANCE * w), None)


def _score(
    base: LogitsFile, other: LogitsFile | None, progress: Progress | None, clip: float | None = None
) -> tuple[FileScores, FileScores | None, np.ndarray, np.ndarray]:
    shape = (base.layout.n_chunk, base.layout.scored)
    found = _empty(shape)
    more = _empty(shape) if other is not None else None
    kld, same = np.full(shape, np.nan), np.zeros(shape, bool)
    threads = min(usable_cpus(), MOST_THREADS)
    done, total = 0, shape[0] * shape[1]
    with ThreadPoolExecutor(threads) as pool:
        for block in base.blocks():
            theirs = other.read(block.window, block.row, len(block.scale)) if other is not None else None
            at = block.window, slice(block.row, block.row + len(block.scale))
            targets = base.targets[at]
            _own_columns(found, block, targets, at)
            if more is not None and theirs is not None:
                _own_columns(more, theirs, targets, at)
            rows = np.array_split(np.arange(len(block.scale)), threads)
            for part in pool.map(lambda mine: _rows(block, theirs, mine, clip), rows):  # noqa: B023
                for i, top1, second, squares, top1_theirs, second_theirs, divergence, equal in part:
                    place = block.window, block.row + i
                    found.squares[place] = squares
                    _top_columns(found, block, place, i, top1, second)
                    if more is not None and theirs is not None:
                        _top_columns(more, theirs, place, i, top1_theirs, second_theirs)
                        kld[place], same[place] = divergence, equal
            done += len(block.scale)
            if progress:
                progress(done, total)
    return found, more, kld, same


def _empty(shape: tuple[int, int]) -> FileScores:
    return FileScores(
        nll=np.zeros(shape),
        top1=np.zeros(shape, np.int32),
        largest=np.zeros(shape),
        margin=np.zeros(shape),
        step=np.zeros(shape),
        clipped=np.zeros(shape, bool),
        finite=np.zeros(shape, bool),
        squares=np.full(shape, np.nan),
    )


@np.errstate(over="ignore", invalid="ignore")
def _top_columns(
    found: FileScores, block: Records, place: tuple[int, int], row: int, top1: int, second: int
) -> None:
    found.top1[place] = top1
    found.largest[place] = block.scale[row] * block.codes[row, top1] + block.low[row]
    found.margin[place] = second * found.step[place]


@np.errstate(over="ignore", invalid="ignore")
def _own_columns(found: FileScores, block: Records, targets: np.ndarray, at: tuple[int, slice]) -> None:
    codes = block.codes[np.arange(len(targets)), targets]
    # In float32, as the programs decode; then exact. Records that are not finite are told apart below.
    found.nll[at] = -(block.scale * codes + block.low)
    found.step[at] = block.scale
    span = block.scale.astype(np.float64) * LARGEST_CODE
    at_width = [np.abs(span - w) <= CLIP_TOLERANCE * w for w in CLIP_WIDTHS.values()]
    found.clipped[at] = (codes == 0) & np.logical_or.reduce(at_width)
    found.finite[at] = np.isfinite(block.scale) & np.isfinite(block.low) & (block.scale >= 0)


@np.errstate(over="ignore", invalid="ignore")
def _rows(
    block: Records, theirs: Records | None, rows: np.ndarray, clip: float | None
) -> list[tuple[int, int, int, float, int, int, float, bool]]:
    """(row, top1, codes to the second, sum p^2, and the other's top1, codes to its second, KLD, equal)."""
    found = []
    n_vocab = block.codes.shape[1]
    p, difference, moved = (np.empty(n_vocab, np.float32) for _ in range(3))
    table = np.empty((256, 256), np.float32)
    for i in rows:
        a = block.codes[i]
        if theirs is None:
            found.append((int(i), *_top(a), np.nan, 0, 0, np.nan, False))
            continue
        b = theirs.codes[i]
        s, low = float(block.scale[i]), float(block.low[i])
        t, other_low = float(theirs.scale[i]), float(theirs.low[i])
        squares = divergence = np.nan
        if np.isfinite(s) and np.isfinite(low) and np.isfinite(t) and np.isfinite(other_low):
            _probabilities(s, low, table).take(a, out=p, mode="clip")
            squares = float(np.dot(p, p))
            np.copyto(moved, a)
            np.copyto(difference, b)
            np.subtract(moved, difference, out=difference)
            difference *= np.float32(t)
            moved *= np.float32(s - t)
            difference += moved
            difference += np.float32(low - other_low)
            if clip is not None:
                # ln p less the least ln q that both files hold.
                np.copyto(moved, a)
                moved *= np.float32(s)
                moved += np.float32(low - (t * float(b.max()) + other_low - clip))
                np.minimum(difference, moved, out=difference)
            divergence = float(np.dot(p, difference))
        equal = s == t and low == other_low and bool(np.array_equal(a, b))
        found.append((int(i), *_top(a), squares, *_top(b), divergence, equal))
    return found


def _probabilities(scale: float, low: float, table: np.ndarray) -> np.ndarray:
    """exp(scale * code + low) [65536] float32 of every code, 0 below SMALLEST_LOG_PROB, in `table`'s memory.

    A product of two short tables: exp is what costs here, and two records rarely share a scale.
    """
    steps = np.arange(256) * scale
    with np.errstate(over="ignore"):
        coarse, fine = (np.exp(x).astype(np.float32) for x in (256 * steps + low, steps))
        np.multiply(coarse[:, None], fine, out=table)
    flat = table.reshape(-1)
    if scale > 0:
        flat[: max(min(int(np.floor((SMALLEST_LOG_PROB - low) / scale)) + 1, LARGEST_CODE + 1), 0)] = 0
    return flat


def _top(codes: np.ndarray) -> tuple[int, int]:
    """The first of the largest codes, and how many codes lie between it and the second largest."""
    top = int(codes.argmax())
    largest = codes[top]
    # In the reader's own buffer, and put back.
    codes[top] = 0
    second = int(codes.max())
    codes[top] = largest
    return top, int(largest) - second
