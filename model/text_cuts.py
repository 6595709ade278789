"""A long text in pieces, at places where cutting it changes no token: memory does not grow with the text.

A tokenizer's library takes some 128 bytes a byte of what it is given at once. A place to cut is one before
a space or a mark that follows a letter or digit, where pieces of every pre-tokenizer begin and merges of a
SentencePiece vocabulary end; and each is tried: what lies around it, from one such place to another, must
give the same tokens whole and cut. A text without such places (one word of megabytes) stays whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from verify.model.errors import ModelError

# Letters of a piece; and what a text without a place to cut may have.
PIECE, LONGEST_PIECE = 1 << 18, 1 << 24
# Letters around a place that are tried with it: more than any token has.
_AROUND = 512
# Places that are tried before more of the text is read.
_TRIES = 64
_PLACE = re.compile(r"(?<=[^\W_])(?= [^\W_])")
_OTHER_PLACE = re.compile(r"(?<=[^\W_])(?=[^\w\s])")
# Pieces that are encoded at once: a tokenizer's library leaves Python's other threads alone meanwhile.
_THREADS = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, 8)

Encode = Callable[[str], np.ndarray]


def encode_in_pieces(
    texts: Iterable[str],
    encode: Encode,
    *,
    enough: int | None = None,
    piece: int = PIECE,
    prefixed: bool = False,
    joined: frozenset[str] | None = None,
) -> tuple[np.ndarray, bool]:
    """Token ids, int32 [n], of the texts joined, and whether they are of all of it.

    encode: ids of one text, whole; enough: ids after which it stops; prefixed: `encode` puts a space in
    front, so that a piece after the first is given without its own; joined: of a vocabulary that merges
    across words, letters that a space follows inside a token: only other spaces are places then. Raises
    ModelError for a text that has no place to cut in LONGEST_PIECE letters.
    """
    if enough is None:
        # How many ids there are need not be known before the next piece is cut.
        with ThreadPoolExecutor(_THREADS) as pool:
            waiting: list[Future[np.ndarray]] = []

            def put(text: str) -> int:
                if len(waiting) >= 2 * _THREADS:
                    waiting[-2 * _THREADS].result()
                waiting.append(pool.submit(encode, text))
                return 0

            _cut(texts, encode, put, enough=None, piece=piece, prefixed=prefixed, joined=joined)
            return np.concatenate([ids.result() for ids in waiting] or [np.zeros(0, np.int32)]), True
    found: list[np.ndarray] = []

    def put_now(text: str) -> int:
        found.append(encode(text))
        return len(found[-1])

    whole = _cut(texts, encode, put_now, enough=enough, piece=piece, prefixed=prefixed, joined=joined)
    return np.concatenate([*found, np.zeros(0, np.int32)]), whole


def _cut(
    texts: Iterable[str],
    encode: Encode,
    put: Callable[[str], int],
    *,
    enough: int | None,
    piece: int,
    prefixed: bool,
    joined: frozenset[str] | None,
) -> bool:
    """`encode_in_pieces`, whose pieces are put somewhere, which says how many ids they are; whether they are
    all of the text."""
    count, first, waits = 0, True, piece
    buffer = ""
    later = iter(texts)

    def begin(text: str, *, whole: bool) -> str:
        return text[1:] if prefixed and not whole else text

    def fits(at: int, places: list[int]) -> bool:
        """Whether tokens are the same, cut there or not."""
        low = next((p for p in reversed(places) if p <= at - _AROUND), 0)
        high = next((p for p in places if p >= at + _AROUND), len(buffer))
        left, right = buffer[low:at], buffer[at:high]
        of_start = low == 0 and first
        left = begin(left, whole=of_start)
        return np.array_equal(
            encode(left + right), np.concatenate((encode(left), encode(begin(right, whole=False))))
        )

    def places() -> list[int]:
        inside = [m.start() for m in _PLACE.finditer(buffer) if buffer[m.start() - 1] not in (joined or ())]
        if len(inside) < _TRIES and joined is None:
            inside += [m.start() for m in _OTHER_PLACE.finditer(buffer)]
        return sorted(inside)

    while enough is None or count < enough:
        for more in later:
            buffer += more
            if len(buffer) >= waits:
                break
        if len(buffer) < waits:
            if buffer or first:
                put(begin(buffer, whole=first))
            return True
        known = places()
        inside = [p for p in known if _AROUND <= p <= len(buffer) - _AROUND]
        at = next((p for p in inside[: -_TRIES - 1 : -1] if fits(p, known)), None)
        if at is None:
            waits *= 2
            if waits > max(LONGEST_PIECE, 2 * piece):
                raise ModelError(f"text: has no place to be cut at in {len(buffer)} letters, one word say")
            continue
        count += put(begin(buffer[:at], whole=first))
        buffer, first, waits = buffer[at:], False, piece
    return False


def slices(text: str, letters: int = PIECE) -> Iterator[str]:
    """A text in slices of this length, cut anywhere."""
    return (text[at : at + letters] for at in range(0, len(text), letters))
