"""Speculation: tokens proposed at the edge and verified in one crossing, with the output of generation without.

Tokens are sampled by numbers of their position alone, so a proposal is accepted where it is the token that would be
sampled, and a refused one costs time and nothing else. How many tokens to propose, and from which source, follows from
what steps take and from what was accepted.

Source: Leviathan et al., arXiv 2211.17192.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from isthmus.generation.exit_head import ExitHead
from isthmus.generation.prompt_lookup import PromptLookup
from isthmus.generation.request import EarlyProposer, EarlyTokens

MAX_PROPOSED = 32
# A source that takes more than this share of a step to ask is left out while its proposals do not pay, and asked again
# each so many steps.
_NEGLIGIBLE, _ASKED_AGAIN = 0.01, 32
# Before any step was timed, and so before it is known what a further token costs.
_UNTIMED = 4
# Observations of steps and of acceptance count for less with each further step. Estimates without recent observations
# go back to an optimistic prior, so that a source that was given up is tried again now and then.
_FORGETTING = 0.98
# Shares of proposals accepted before any was observed: of first ones c / (c + doubt) with a confidence c, and of later
# ones. Set with simulations of sequences that repeat themselves never to almost always: tests/generation.
_PRIOR_DOUBT, _PRIOR_LATER = 1.5, 0.8
# In observations.
_PRIOR_WEIGHT = 0.5
# Before steps with proposals were timed, these take a tenth longer than others and a twentieth more for each.
_PRIOR_TIMES = _PRIOR_WEIGHT * (np.outer(v := np.array([-0.1, 1, 0]), v) + np.outer(v := np.array([-0.05, 0, 1]), v))


class ProposalSource(Protocol):
    """Where proposals come from; belongs to one sequence."""

    @property
    def kind(self) -> str:
        """Its name in metrics."""
        ...

    def confidence(self, sequence: Sequence[int]) -> int:
        """A class of the proposals that it has now, 0 for none; acceptance is learned for each class."""
        ...

    def draft(self, sequence: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens to follow `sequence`."""
        ...


class StepTimes:
    """Seconds of a step by its number of proposals k: a + b [k > 0] + c k, by least squares with forgetting.

    b is there since a run of one token multiplies by a vector and one of several tokens by a matrix. Both b and c are
    0 until observed.
    """

    def __init__(self) -> None:
        self._weights, self._sums = np.zeros((3, 3)), np.zeros(3)
        self._predicted = np.zeros(MAX_PROPOSED + 1)

    @property
    def known(self) -> bool:
        """Whether any step was timed."""
        return bool(self._weights[0, 0] > 0)

    def observe(self, proposed: int, seconds: float) -> None:
        """Learn from a step."""
        if self.known:
            # A pause of the machine or a recovery says nothing of the next step.
            seconds = min(seconds, 3 * self.predicted(proposed))
        row = np.array([1.0, float(proposed > 0), float(proposed)])
        self._weights = self._weights * _FORGETTING + np.outer(row, row)
        self._sums = self._sums * _FORGETTING + row * seconds
        a, b, c = np.linalg.solve(self._weights + _PRIOR_TIMES, self._sums)
        lengths = np.arange(MAX_PROPOSED + 1)
        # Noise must not make longer steps quicker.
        self._predicted = max(a, 1e-9) + max(b, 0.0) * (lengths > 0) + max(c, 0.0) * lengths

    def predicted(self, proposed: int) -> float:
        """Seconds of a step with so many proposals."""
        return float(self._predicted[min(proposed, MAX_PROPOSED)])


@dataclass
class _Share:
    """A share with forgetting, which without observations goes back to its prior."""

    prior: float
    accepted: float = 0.0
    tried: float = 0.0

    def observe(self, accepted: int, tried: int) -> None:
        self.accepted += accepted
        self.tried += tried

    def forget(self) -> None:
        self.accepted *= _FORGETTING
        self.tried *= _FORGETTING

    @property
    def value(self) -> float:
        # Below 1: a sum of its powers must have an end.
        return min(0.98, (self.accepted + self.prior * _PRIOR_WEIGHT) / (self.tried + _PRIOR_WEIGHT))


@dataclass
class Acceptance:
    """The share of first proposals accepted, and of later ones behind an accepted one.

    The two differ: where the first proposal is right the sequence often repeats itself, and the next is right too.
    """

    first: _Share
    later: _Share = field(default_factory=lambda: _Share(_PRIOR_LATER))

    def observe(self, proposed: int, accepted: int) -> None:
        """Learn from a step's proposals; behind the first refusal nothing was tried."""
        self.first.observe(min(accepted, 1), 1)
        self.later.observe(max(0, accepted - 1), max(0, min(proposed, accepted + 1) - 1))

    def forget(self) -> None:
        """Another step has passed."""
        self.first.forget()
        self.later.forget()

    def tokens(self, proposed: int) -> float:
        """Expected tokens of a step with so many proposals."""
        later = self.later.value
        return 1 + self.first.value * (1 - later**proposed) / (1 - later)


class AdaptiveProposer:
    """Proposes from the source, and as many tokens, as raise the generation's tokens a second most.

    A step of t seconds that gives n tokens is worth n - r t, where r is the present rate in tokens a second: the rule
    that raises the rate of a whole sequence of unlike steps. `times` may be shared by the generations of a route.

    Source: Dinkelbach, Management Science 13 (1967): fractional programming.
    """

    def __init__(
        self,
        sources: Sequence[ProposalSource],
        times: StepTimes | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._sources, self._times, self._clock = sources, times or StepTimes(), clock
        self._accepted: dict[tuple[str, int], Acceptance] = {}
        # Seconds by kind: to say whether there are proposals, and to draft each.
        self._asking_s: dict[str, float] = {}
        self._drafting_s: dict[str, float] = {}
        self._tokens = self._seconds = self._spent_s = 0.0
        self._steps = 0
        self.kind = ""
        """Of the latest proposals; empty without any."""
        self._confidence = 0

    def attach(self, early: EarlyTokens) -> None:
        """See `EarlyProposer.attach`."""
        for source in self._sources:
            if isinstance(source, EarlyProposer):
                source.attach(early)

    def propose(self, sequence: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens to follow `sequence`; empty where a step without proposals promises more."""
        started, rate = self._clock(), self._rate()
        self._steps += 1
        plain = best = 1 - rate * self._times.predicted(0)
        chosen, length, confidence = None, 0, 0
        for source in self._sources:
            if not self._is_worth_asking(source.kind, count, rate, plain):
                continue
            if found := self._ask(source, sequence):
                value, k = self._best_length(source.kind, found, count, rate)
                if value > best:
                    best, chosen, length, confidence = value, source, k, found
        asked = self._clock()
        tokens = chosen.draft(sequence, length) if chosen is not None else []
        self.kind, self._confidence = (chosen.kind, confidence) if chosen is not None and tokens else ("", 0)
        if self.kind:
            _learn(self._drafting_s, self.kind, (self._clock() - asked) / len(tokens))
        self._spent_s = self._clock() - started
        return tokens

    def _ask(self, source: ProposalSource, sequence: Sequence[int]) -> int:
        started = self._clock()
        confidence = source.confidence(sequence)
        _learn(self._asking_s, source.kind, self._clock() - started)
        return confidence

    def _is_worth_asking(self, kind: str, count: int, rate: float, plain: float) -> bool:
        """Whether a source that takes time to ask may have proposals that pay; now and then also where none did."""
        if self._asking_s.get(kind, 0.0) < _NEGLIGIBLE * self._times.predicted(0) or self._steps % _ASKED_AGAIN == 0:
            return True
        classes = [confidence for known, confidence in self._accepted if known == kind]
        return any(self._best_length(kind, each, count, rate)[0] > plain for each in classes)

    def observe(self, proposed: int, accepted: int, seconds: float) -> None:
        """Learn from the step that verified the latest proposals; `seconds` without those of `propose`."""
        self._times.observe(proposed, seconds)
        for acceptance in self._accepted.values():
            acceptance.forget()
        if proposed and self.kind:
            self._acceptance(self.kind, self._confidence).observe(proposed, accepted)
        self._tokens = self._tokens * _FORGETTING + accepted + 1
        self._seconds = self._seconds * _FORGETTING + seconds + self._spent_s

    def _rate(self) -> float:
        """Tokens a second of late; 0 before the first step, when the most tokens are the best."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def _best_length(self, kind: str, confidence: int, count: int, rate: float) -> tuple[float, int]:
        """The value of a step with the best number of proposals, and this number."""
        acceptance = self._acceptance(kind, confidence)
        drafting_s = self._drafting_s.get(kind, 0.0)
        most = min(count, MAX_PROPOSED if self._times.known else _UNTIMED)
        values = [
            (acceptance.tokens(k) - rate * (self._times.predicted(k) + drafting_s * k), k) for k in range(1, most + 1)
        ]
        return max(values, default=(-math.inf, 0))

    def _acceptance(self, kind: str, confidence: int) -> Acceptance:
        first = _Share(confidence / (confidence + _PRIOR_DOUBT))
        return self._accepted.setdefault((kind, confidence), Acceptance(first))


def edge_proposer(*further: ProposalSource) -> AdaptiveProposer:
    """A proposer by the prompt, by an exit at the route's first cut where the bundle has one, and by `further`."""
    return AdaptiveProposer([PromptLookup(), ExitHead(), *further])


def _learn(seconds: dict[str, float], kind: str, value: float) -> None:
    before = seconds.get(kind, value)
    seconds[kind] = before + 0.2 * (value - before)
