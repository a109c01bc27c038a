"""Prompt lookup: proposals from earlier occurrences of the sequence's end, by an index that grows with the sequence.

Source: Saxena, github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

# A pair of tokens is the shortest repetition that says something of what follows.
_SHORTEST = 2
# Longer matches are not distinguished: measured acceptance does not rise any more.
_LONGEST = 16
# Occurrences of a pair that are compared: " of the" is in every line of a long prompt.
_MAX_OCCURRENCES = 32


class _Match(NamedTuple):
    """`length` tokens at the sequence's end also end at `stop`, where other tokens follow."""

    length: int
    stop: int


_NO_MATCH = _Match(0, 0)


class PromptLookup:
    """Proposes what followed the longest earlier occurrence of the sequence's end; of equally long ones the latest.

    One object belongs to one sequence, which only grows: each token is indexed once.
    """

    kind = "prompt"

    def __init__(self) -> None:
        # Each pair's occurrences, as the index behind the pair.
        self._occurrences: dict[tuple[int, int], deque[int]] = {}
        self._indexed = 1

    def confidence(self, sequence: Sequence[int]) -> int:
        """The binary logarithm of the match's length, rounded down; 0 without a match."""
        return max(0, self._match(sequence).length.bit_length() - 1)

    def draft(self, sequence: Sequence[int], count: int) -> list[int]:
        """`count` tokens; none without an earlier occurrence."""
        match = self._match(sequence)
        if not match.length:
            return []
        # A repetition that reaches the sequence's end goes on with itself, as loops do.
        period = len(sequence) - match.stop
        return [sequence[match.stop + i % period] for i in range(count)]

    def _match(self, sequence: Sequence[int]) -> _Match:
        self._index(sequence)
        end = len(sequence)
        if end < _SHORTEST:
            return _NO_MATCH
        best = _NO_MATCH
        for stop in reversed(self._occurrences.get((sequence[-2], sequence[-1]), ())):
            length = _SHORTEST
            while length < min(_LONGEST, stop) and sequence[stop - length - 1] == sequence[end - length - 1]:
                length += 1
            if length > best.length:
                best = _Match(length, stop)
            if length == _LONGEST:
                break
        return best

    def _index(self, sequence: Sequence[int]) -> None:
        # The pair at the very end has no token behind it yet.
        for stop in range(max(self._indexed + 1, _SHORTEST), len(sequence)):
            pair = (sequence[stop - 2], sequence[stop - 1])
            self._occurrences.setdefault(pair, deque(maxlen=_MAX_OCCURRENCES)).append(stop)
            self._indexed = stop
