"""Speculation: tokens proposed at the edge and verified in one crossing, with the output of generation without.

Source: Leviathan et al., arXiv 2211.17192; prompt lookup: Saxena, github.com/apoorvumang/prompt-lookup-decoding. Tokens
are sampled by numbers of their position alone, so a proposal is accepted where it is the token that would be sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# The longest repeated end of the sequence that is looked for, and the shortest.
_LONGEST, _SHORTEST = 4, 2
MAX_PROPOSED = 16
_FORGETTING = 0.9


def prompt_lookup(tokens: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the latest earlier occurrence of the sequence's end; empty without any."""
    for length in range(_LONGEST, _SHORTEST - 1, -1):
        if len(tokens) <= length:
            continue
        end = list(tokens[-length:])
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start] == end[0] and list(tokens[start : start + length]) == end:
                return list(tokens[start + length : start + length + count])
    return []


class PromptLookup:
    """Proposes what followed the latest earlier occurrence of the sequence's end, where that pays; a `Proposer`."""

    def __init__(self) -> None:
        self._length = ProposalLength()

    def propose(self, sequence: Sequence[int], count: int) -> list[int]:
        """See `Proposer.propose`."""
        wanted = min(self._length.best(), count)
        return prompt_lookup(sequence, wanted) if wanted > 0 else []

    def observe(self, proposed: int, accepted: int, seconds: float) -> None:
        """See `Proposer.observe`."""
        self._length.observe(proposed, accepted, seconds)


class ProposalLength:
    """How many tokens to propose, by the share accepted and by what a token and a crossing take.

    Units: seconds. The expected tokens of a step of k proposals with acceptance a are (1 - a^(k+1)) / (1 - a); the
    length with the most tokens a second is taken.
    """

    def __init__(self) -> None:
        self._accepted, self._proposed = 1.0, 2.0
        self._step_s: dict[int, float] = {}

    def observe(self, proposed: int, accepted: int, seconds: float) -> None:
        """Learn from a step."""
        if proposed:
            # Behind the first refusal nothing was tried.
            tried = min(proposed, accepted + 1)
            self._accepted = self._accepted * _FORGETTING + accepted
            self._proposed = self._proposed * _FORGETTING + tried
        before = self._step_s.get(proposed, seconds)
        self._step_s[proposed] = before + 0.3 * (seconds - before)

    def best(self) -> int:
        """The number of tokens to propose."""
        share = min(0.98, self._accepted / self._proposed)
        if 0 not in self._step_s:
            return 4
        single = self._step_s[0]
        slope = self._slope(single)
        rates = {k: (1 - share ** (k + 1)) / (1 - share) / (single + slope * k) for k in range(MAX_PROPOSED + 1)}
        return max(rates, key=lambda k: rates[k])

    def _slope(self, single: float) -> float:
        """Seconds of each further token in a step."""
        longer = [(k, s) for k, s in self._step_s.items() if k]
        if not longer:
            return 0.0
        slope = sum(k * (s - single) for k, s in longer) / sum(k * k for k, _ in longer)
        return slope if math.isfinite(slope) and slope > 0 else 0.0
