"""The text of a generation: pieces as tokens come, up to the first stop string."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from typing import NamedTuple

from isthmus.generation.text import TextCodec, TextStream
from isthmus.processing.sampling import SampledToken


class TextPiece(NamedTuple):
    """Text, and the tokens that completed it; the last piece of a completion may have tokens alone."""

    text: str
    tokens: tuple[SampledToken, ...] = ()


class CompletionText:
    """Decodes the tokens of a completion.

    The text ends before the first of `stops`. Tokens of `ends`, which end the sequence, are no part of any piece.
    """

    def __init__(
        self, codec: TextCodec, stops: Sequence[str] = (), *, prompt: Sequence[int] = (), ends: Collection[int] = ()
    ) -> None:
        self._stream = TextStream(codec, prompt)
        self._stops, self._ends = tuple(stops), frozenset(ends)
        self.stopped = False
        """Whether a stop string ended the text."""

    def pieces(self, tokens: Iterator[SampledToken]) -> Generator[TextPiece, None, None]:
        """The text as it comes. An end that may begin a stop string waits until a later token decides."""
        text, drawn = "", list[SampledToken]()
        for token in tokens:
            if token.token in self._ends:
                continue
            text += self._stream.add(token.token)
            drawn.append(token)
            if self._cut(text) is not None:
                break
            ready = len(text) - self._undecided(text)
            if ready > 0:
                yield TextPiece(text[:ready], tuple(drawn))
                text, drawn = text[ready:], []
        if (end := self._cut(text)) is None:
            text += self._stream.rest()
            end = self._cut(text)
        self.stopped = end is not None
        if text[:end] or drawn:
            yield TextPiece(text[:end], tuple(drawn))

    def _cut(self, text: str) -> int | None:
        """Where the first stop string begins."""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        return min(places, default=None)

    def _undecided(self, text: str) -> int:
        """Characters at the end that may be the begin of a stop string."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
