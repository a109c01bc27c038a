"""Speculation: what is proposed, and that the length and the source adapt to times and acceptance."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from isthmus.generation.prompt_lookup import PromptLookup
from isthmus.generation.speculation import MAX_PROPOSED, AdaptiveProposer, StepTimes


def naive_lookup(tokens: Sequence[int], count: int) -> list[int]:
    """The tokens behind the longest earlier occurrence of the end, up to 16 tokens; of equal ones the latest."""
    for length in range(min(16, len(tokens) - 1), 1, -1):
        for stop in range(len(tokens) - 1, length - 1, -1):
            if tokens[stop - length : stop] == tokens[-length:]:
                extended = [*tokens]
                for i in range(count):
                    extended.append(extended[stop + i])
                return extended[len(tokens) :]
    return []


def test_lookup_finds_what_a_search_of_the_whole_sequence_finds() -> None:
    draw = random.Random(0)
    for alphabet in (2, 4, 30):
        sequence = [draw.randrange(alphabet) for _ in range(30)]
        lookup = PromptLookup()
        for _ in range(40):  # an index that grows, with an end that it has not seen yet
            assert lookup.draft(sequence, 5) == naive_lookup(sequence, 5)
            sequence += [draw.randrange(alphabet) for _ in range(draw.choice([1, 1, 3]))]


def test_lookup_takes_the_longest_occurrence_and_not_the_latest() -> None:
    sequence = [1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4]
    lookup = PromptLookup()
    assert lookup.draft(sequence, 2) == [50, 9]
    assert lookup.confidence(sequence) == 2
    assert PromptLookup().draft([1, 2, 3], 4) == []
    assert PromptLookup().confidence([7]) == 0


def test_a_loop_is_continued_beyond_the_sequence() -> None:
    assert PromptLookup().draft([5, 1, 2, 1, 2, 1], 5) == [2, 1, 2, 1, 2]


class Repeating:
    """A sequence whose proposals are right by chance. Its classes come with probabilities, 0 for none."""

    kind = "repeating"

    def __init__(self, seed: int, classes: Sequence[float], first: Sequence[float], later: Sequence[float]) -> None:
        self._draw = random.Random(seed)
        self._classes, self._first, self._later = classes, first, later
        self.now = 0

    def roll(self) -> None:
        self.now = self._draw.choices(range(len(self._classes)), self._classes)[0]

    def confidence(self, sequence: Sequence[int]) -> int:
        return self.now

    def draft(self, sequence: Sequence[int], count: int) -> list[int]:
        return [0] * count

    def accepted(self, proposed: int) -> int:
        count = int(bool(proposed) and self._draw.random() < self._first[self.now])
        while 0 < count < proposed and self._draw.random() < self._later[self.now]:
            count += 1
        return count

    def best_rate(self, times: tuple[float, float, float]) -> float:
        """Tokens a second of the best length for each class, all probabilities known."""
        single, several, each = times
        rate = 1 / single
        for _ in range(20):  # Dinkelbach's iteration converges faster than that
            tokens = seconds = 0.0
            for share, first, later in zip(self._classes, self._first, self._later, strict=True):
                options = [(1.0, single)]
                if first:
                    options += [
                        (1 + first * (1 - later**k) / (1 - later), single + several + each * k)
                        for k in range(1, MAX_PROPOSED + 1)
                    ]
                gained, spent = max(options, key=lambda option: option[0] - rate * option[1])
                tokens, seconds = tokens + share * gained, seconds + share * spent
            rate = tokens / seconds
        return rate


TEXTS = {
    "no repetition": ([0.6, 0.3, 0.1], [0, 0.05, 0.1], [0, 0.3, 0.3]),
    "a question": ([0.5, 0.35, 0.1, 0.05], [0, 0.2, 0.4, 0.7], [0, 0.4, 0.6, 0.8]),
    "a summary": ([0.3, 0.2, 0.2, 0.3], [0, 0.3, 0.6, 0.85], [0, 0.5, 0.8, 0.93]),
    "an edit": ([0.05, 0.1, 0.15, 0.7], [0, 0.5, 0.8, 0.95], [0, 0.7, 0.9, 0.97]),
}


def simulated_rate(text: str, times: tuple[float, float, float], steps: int, seed: int) -> tuple[float, float]:
    """Tokens a second of the proposer in a simulated clock, and of the best lengths."""
    source = Repeating(seed, *TEXTS[text])
    proposer = AdaptiveProposer([source], clock=lambda: 0.0)
    tokens, seconds = 0, 0.0
    for _ in range(steps):
        source.roll()
        proposed = len(proposer.propose([], 1000))
        taken = times[0] + (times[1] if proposed else 0) + times[2] * proposed
        accepted = source.accepted(proposed)
        proposer.observe(proposed, accepted, taken)
        tokens, seconds = tokens + accepted + 1, seconds + taken
    return tokens / seconds, source.best_rate(times)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("single", [0.05, 0.15])
def test_regret_against_the_best_lengths_is_small(text: str, single: float) -> None:
    rates = [simulated_rate(text, (single, 0.012, 0.004), 400, seed) for seed in range(8)]
    regret = 1 - sum(own / best for own, best in rates) / len(rates)
    assert regret < 0.09
    assert sum(own for own, _ in rates) / len(rates) > 0.93 / single  # hardly slower than without proposals


def test_proposals_are_tried_again_once_they_are_worth_it() -> None:
    source = Repeating(0, [0, 0, 1.0], [0, 0, 0.02], [0, 0, 0.02])
    proposer = AdaptiveProposer([source], clock=lambda: 0.0)
    source.roll()

    def run(steps: int) -> list[int]:
        lengths = []
        for _ in range(steps):
            lengths.append(len(proposer.propose([], 100)))
            proposer.observe(lengths[-1], source.accepted(lengths[-1]), 0.05 + 0.01 * lengths[-1])
        return lengths

    given_up = run(300)[100:]
    assert given_up.count(0) > 150
    assert sum(given_up) > 0
    source._first, source._later = [0, 0, 1.0], [0, 0, 1.0]
    assert min(run(200)[-20:]) > 8


def test_longer_steps_that_take_longer_make_proposals_shorter() -> None:
    def length(each: float) -> int:
        source = Repeating(0, [0, 0, 1.0], [0, 0, 0.8], [0, 0, 0.8])
        source.roll()
        proposer = AdaptiveProposer([source], clock=lambda: 0.0)
        for _ in range(100):
            proposed = len(proposer.propose([], 100))
            proposer.observe(proposed, source.accepted(proposed), 0.05 + each * proposed)
        return len(proposer.propose([], 100))

    assert length(0.001) > length(0.01) > length(0.1)


class Certain:
    """A source that is right with every token, and takes time."""

    def __init__(self, kind: str, tick: float) -> None:
        self.kind, self._tick, self.now = kind, tick, 0.0

    def confidence(self, sequence: Sequence[int]) -> int:
        return 3

    def draft(self, sequence: Sequence[int], count: int) -> list[int]:
        self.now += self._tick * count
        return [0] * count


def test_the_source_with_less_time_to_draft_is_taken() -> None:
    slow, quick = Certain("slow", 0.08), Certain("quick", 0.001)
    proposer = AdaptiveProposer([slow, quick], clock=lambda: slow.now + quick.now)
    kinds = []
    for _ in range(60):
        proposed = len(proposer.propose([], 8))
        kinds.append(proposer.kind)
        proposer.observe(proposed, proposed, 0.1)
    assert set(kinds[-20:]) == {"quick"}


def test_at_most_the_wanted_tokens_are_proposed() -> None:
    source = Certain("quick", 0.0)
    proposer = AdaptiveProposer([source], clock=lambda: 0.0)
    assert proposer.propose([], 0) == []
    for count in (1, 2, 500):
        proposed = proposer.propose([], count)
        assert len(proposed) <= min(count, MAX_PROPOSED)
        proposer.observe(len(proposed), len(proposed), 0.05)


def test_a_pause_of_the_machine_does_not_end_proposals() -> None:
    times = StepTimes()
    for proposed in (0, 4, 8, 0, 4, 8):
        times.observe(proposed, 0.05 + 0.002 * proposed)
    times.observe(8, 30.0)
    assert times.predicted(8) < 0.2
