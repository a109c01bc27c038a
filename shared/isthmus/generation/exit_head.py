"""Drafts by the exit branch of a bundle: the first segment runs ahead, and the branch predicts each next token.

What the first segment computes for drafts that are accepted is what the segments behind the cut take: it runs once.
"""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.generation.request import EarlyToken, EarlyTokens

# Classes of a prediction's probability, each with an acceptance of its own; below the first nothing is drafted further.
_CLASSES = (0.2, 0.45, 0.7, 0.9)


class ExitHead:
    """A source of proposals for one sequence; without an exit at the route's first cut it has none."""

    kind = "exit"

    def __init__(self) -> None:
        self._early: EarlyTokens | None = None
        self._next: EarlyToken | None = None

    def attach(self, early: EarlyTokens) -> None:
        """Draft by the early predictions of this generation's session."""
        self._early = early

    def confidence(self, sequence: Sequence[int]) -> int:
        """The class of the prediction's probability; the first segment runs the sequence's end, as a step would."""
        self._next = self._early(sequence) if self._early is not None else None
        return _confidence(self._next)

    def draft(self, sequence: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens, fewer where the branch is unsure of the next."""
        drafted: list[int] = []
        while self._early is not None and self._next is not None and _confidence(self._next):
            drafted.append(self._next.token)
            if len(drafted) == count:
                break
            self._next = self._early([*sequence, *drafted])
        return drafted


def _confidence(early: EarlyToken | None) -> int:
    return 0 if early is None else sum(early.probability >= least for least in _CLASSES)
