"""SentencePiece's merging, pair by pair, for vocabularies whose scores do not say which pair comes first.

Of all neighbours that make a token those with the best score are merged; of equal ones the leftmost. The
`tokenizers` library orders pairs rather than places, which comes to the same only where no two scores are
equal. Some converted files give all tokens one score.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence

# What SentencePiece writes for a space.
SPACE = "▁"


class SentencePiece:
    """ids: of tokens; scores: of those that merging makes; byte_ids: of the 256 bytes, where there are such.

    own: ids of tokens that are cut out of a text as they stand; prefixed: whether a space comes first.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        scores: Mapping[str, float],
        *,
        unknown: int,
        byte_ids: Mapping[int, int],
        own: Mapping[str, int],
        prefixed: bool,
    ) -> None:
        self.ids, self.scores, self.unknown, self.byte_ids = ids, scores, unknown, byte_ids
        self.own, self.prefixed = own, prefixed
        longest_first = sorted(own, key=len, reverse=True)
        self._own = re.compile("|".join(map(re.escape, longest_first))) if own else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        found: list[int] = []
        for part in self._parts(text):
            if part in self.own:
                found.append(self.own[part])
            elif part:
                spaced = part.replace(" ", SPACE)
                for symbol in self._merged(SPACE + spaced if self.prefixed else spaced):
                    found += self._ids_of(symbol)
        return found

    def _parts(self, text: str) -> Iterator[str]:
        """The text cut at tokens that stand in it, and these."""
        at = 0
        for match in self._own.finditer(text) if self._own else ():
            yield text[at : match.start()]
            yield match.group()
            at = match.end()
        yield text[at:]

    def _merged(self, text: str) -> Sequence[str]:
        symbols = list(text)
        after = list(range(1, len(symbols) + 1))
        before = list(range(-1, len(symbols) - 1))
        pairs: list[tuple[float, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols):
                joined = symbols[left] + symbols[right]
                if joined in self.scores:
                    heapq.heappush(pairs, (-self.scores[joined], left, joined))

        for right in range(1, len(symbols)):
            offer(right - 1, right)
        while pairs:
            _, left, joined = heapq.heappop(pairs)
            right = after[left]
            # One of the two has grown, or is gone, since the pair was offered.
            if not symbols[left] or right >= len(symbols) or symbols[left] + symbols[right] != joined:
                continue
            symbols[left], symbols[right] = joined, ""
            after[left] = after[right]
            if after[left] < len(symbols):
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [symbol for symbol in symbols if symbol]

    def _ids_of(self, symbol: str) -> list[int]:
        if symbol in self.ids:
            return [self.ids[symbol]]
        if self.byte_ids:
            return [self.byte_ids[byte] for byte in symbol.encode()]
        return [self.unknown]
