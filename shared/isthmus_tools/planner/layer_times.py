"""Seconds of the steps of a language model's segments on a device, from a profile of a few.

Layers of a decoder are alike, so that a segment's time is linear in their number, as far as their weights have one
precision; attention makes it linear in the tokens before the step, and quadratic over a prompt. Steps of one token wait
for memory and chunks for arithmetic: between the measured sizes the time is interpolated.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from isthmus.artifacts.profile import Profile
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.errors import ProfileMalformed
from isthmus_tools.planner.costs import RunTime
from isthmus_tools.planner.decoder_layers import DecoderLayers, layers_before


class _Point(NamedTuple):
    tokens: int
    past: int


@dataclass(frozen=True)
class LayerTimes:
    """The times and memory of any segment of a tier: heads at the edge, tails in the cloud, the whole model on both."""

    profile: Profile
    layers: DecoderLayers

    def seconds(self, segment: SegmentId, tokens: int, past: int) -> RunTime:
        """Seconds of a step of `tokens` tokens behind `past` others, and whether the profile timed the segment.

        Raises:
            ProfileMalformed: the profile has too few steps for that.
        """
        times = self._times(segment)
        return RunTime(_interpolated(times, tokens, past), "measured" if segment in self._measured else "predicted")

    def memory_bytes(self, segment: SegmentId) -> int:
        """Bytes of a segment without the state of sessions: weights, the runtime's copies, and the largest chunk."""
        if (cost := self.profile.segments.get(segment)) is not None:
            return cost.memory_bytes
        parts = {s: float(cost.memory_bytes) for s, cost in self.profile.segments.items() if s != WHOLE}
        return round(self._by_layers(parts, segment))

    def _times(self, segment: SegmentId) -> Mapping[_Point, float]:
        if segment in self._measured:
            return self._measured[segment]
        parts = {s: times for s, times in self._measured.items() if s != WHOLE}
        if not parts:
            raise self._incomplete(segment)
        # Merged profiles may have steps of other sizes for some segments.
        points = set.intersection(*(set(times) for times in parts.values()))
        return {p: self._by_layers({s: times[p] for s, times in parts.items()}, segment) for p in points}

    def _by_layers(self, values: Mapping[SegmentId, float], segment: SegmentId) -> float:
        """The value of a segment between measured ones, linear in its layers; never below 0."""
        by_place = {_place(s): value for s, value in values.items()}
        ends = {min(by_place, default=0), max(by_place, default=0)}
        # Of measured ones between those, only where layers change: nearer ones divide more noise by fewer layers.
        knots = sorted(place for place in by_place if place in ends or place in self.layers.changes)
        if len(knots) < 2:
            raise self._incomplete(segment)
        place = _place(segment)
        first, last = next((pair for pair in itertools.pairwise(knots) if place <= pair[1]), (knots[-2], knots[-1]))
        slope = (by_place[last] - by_place[first]) / (last - first)
        # A head grows with its cut, a tail shrinks: noise of small models can say otherwise.
        slope = min(0.0, slope) if segment.start else max(0.0, slope)
        return max(0.0, by_place[first] + slope * (place - first))

    @cached_property
    def _measured(self) -> Mapping[SegmentId, Mapping[_Point, float]]:
        by_segment: dict[SegmentId, dict[_Point, float]] = {}
        for step in self.profile.steps:
            by_segment.setdefault(step.segment, {})[_Point(step.tokens, step.past)] = step.run.median
        if WHOLE not in by_segment:
            raise self._incomplete(WHOLE)
        return by_segment

    def _incomplete(self, segment: SegmentId) -> ProfileMalformed:
        return ProfileMalformed(
            f"the profile of {self.profile.model} at {self.profile.tier} has too few steps to tell those of {segment}",
            hint=f"measure again: isthmus profile {self.profile.model} --again",
        )


def _place(segment: SegmentId) -> int:
    """The layers before the segment's cut."""
    return layers_before(segment.start or segment.stop)


def _interpolated(times: Mapping[_Point, float], tokens: int, past: int) -> float:
    """Seconds of a step by the measured ones, linear between sizes, and beyond the largest."""
    sizes = sorted({p.tokens for p in times})
    values = [_behind(times, size, past, sizes[-1]) for size in sizes]
    if tokens <= sizes[0] or len(sizes) == 1:
        return values[0]
    pairs = list(itertools.pairwise(zip(sizes, values, strict=True)))
    (low, before), (high, after) = next((p for p in pairs if tokens <= p[1][0]), pairs[-1])
    return max(0.0, before + (after - before) * (tokens - low) / (high - low))


def _behind(times: Mapping[_Point, float], size: int, past: int, largest: int) -> float:
    """Seconds of a step of a measured size behind `past` tokens."""
    pasts = sorted(p.past for p in times if p.tokens == size)
    slope = _slope(times, size, pasts)
    if len(pasts) < 2 and size != largest and size > 1:
        # Attention of a chunk works on each pair of a new token and an earlier one.
        longest = sorted(p.past for p in times if p.tokens == largest)
        slope = _slope(times, largest, longest) * size / largest
    return times[_Point(size, pasts[0])] + slope * (past - pasts[0])


def _slope(times: Mapping[_Point, float], size: int, pasts: Sequence[int]) -> float:
    if len(pasts) < 2:
        return 0.0
    first, last = pasts[0], pasts[-1]
    # Noise of a small model can exceed the growth; a step never takes less time behind more tokens.
    return max(0.0, (times[_Point(size, last)] - times[_Point(size, first)]) / (last - first))
