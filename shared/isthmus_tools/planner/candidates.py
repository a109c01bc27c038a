"""Which cuts are worth a trial: those that are the fastest for some codec and link, and the near ones behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from isthmus.artifacts.choice import Choice
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.profile import Profile
from isthmus.errors import ConstraintMalformed
from isthmus_tools.graph.cuts import CutInfo, cuts
from isthmus_tools.graph.model import Model
from isthmus_tools.planner.search.from_graph import boundaries, cut_of, from_model, positions
from isthmus_tools.planner.search.latency import solve, sweep
from isthmus_tools.planner.search.problem import LinkTimes, Problem
from isthmus_tools.planner.survey import Survey

NEAR = 3
"""Of the prefix cuts, so many of the fastest for each codec and link are tried: predictions are not that sure."""


Found: TypeAlias = tuple[frozenset[int], CutInfo]
"""A cut, by the places of the nodes before it."""


@dataclass(frozen=True)
class Search:
    """A model's cuts, for profiles of the two tiers and what its tensors pack to."""

    model: Model
    edge: Profile
    cloud: Profile
    survey: Survey
    private_depth: int = 0
    fits: Callable[[int], bool] = lambda position: True
    """Whether the head of the prefix cut at a position fits the edge."""

    def __post_init__(self) -> None:
        if self.private_depth > len(self.model.nodes):
            raise ConstraintMalformed(
                f"--private-depth is {self.private_depth}, and the model has {len(self.model.nodes)} nodes",
                what="private_depth",
            )

    def cuts(self, links: Sequence[Conditions], choices: Sequence[Choice], most: int) -> list[CutInfo]:
        """At most `most` cuts, the most promising first: see the module. None where splitting never pays, or cannot."""
        # By what runs before them; a cut found by several searches is better the more of them found it.
        found: dict[frozenset[int], CutInfo] = {}
        ways = [self._optima(links, choices), self._near(links, choices), self._envelopes(links, choices)]
        for way in ways:
            for upstream, cut in way:
                # One that is no prefix has a head of at most the prefix's up to its last node.
                if len(found) < most and self.fits(max(upstream)):
                    found.setdefault(upstream, cut)
        return list(found.values())

    def prefixes(self) -> list[CutInfo]:
        """All prefix cuts that the private depth and the edge's memory allow."""
        return [
            c
            for c in cuts(self.model)
            if c.position is not None
            and c.position + 1 >= self.private_depth
            and not (self.private_depth and c.passing)
            and self.fits(c.position)
        ]

    def problem(self, conditions: Conditions, choice: Choice, *, effective: bool = True) -> Problem:
        """The division of the model, tensors as the choice packs them; packing counts as bytes where `effective`."""
        up, down = conditions.up_byte_s + _hop(self.cloud)[1], conditions.down_byte_s + _hop(self.cloud)[2]
        made = from_model(
            self.model,
            [self.edge.nodes, self.cloud.nodes],
            [LinkTimes(up, down, conditions.rtt_s + _hop(self.cloud)[0])],
            pins=dict.fromkeys(self._private(), (0, 0)),
        )
        sizes, seconds = self.survey.bytes.get(choice.codec, {}), self.survey.seconds.get(choice.codec, {})

        def weight(name: str, nbytes: float) -> float:
            packed = sizes.get(name, nbytes)
            return packed + (seconds.get(name, 0.0) / up if effective and up > 0 else 0.0)

        tensors = tuple(
            t if t.output or math.isinf(t.bytes) else replace(t, bytes=weight(t.name, t.bytes)) for t in made.tensors
        )
        return replace(made, tensors=tensors)

    def _optima(self, links: Sequence[Conditions], choices: Sequence[Choice]) -> Iterator[Found]:
        """The fastest division of all, prefix or not, for each link and codec."""
        for conditions in links:
            for choice in choices:
                yield from self._cut(solve(self.problem(conditions, choice)).labels)

    def _envelopes(self, links: Sequence[Conditions], choices: Sequence[Choice]) -> Iterator[Found]:
        """The fastest ones over all bandwidths."""
        for choice in choices:
            for piece in sweep(self.problem(links[0], choice, effective=False)):
                yield from self._cut(piece.labels)

    def _near(self, links: Sequence[Conditions], choices: Sequence[Choice]) -> Iterator[Found]:
        """The fastest prefix cuts for each link and codec, the best of each before the second best of any."""
        prefixes = self.prefixes()
        if not prefixes:
            return
        places = np.array([c.position for c in prefixes], np.int64)
        before = np.cumsum(self.edge.nodes)[places]
        after = sum(self.cloud.nodes) - np.cumsum(self.cloud.nodes)[places]
        ranks = []
        for choice in choices:
            sizes, seconds = self.survey.bytes.get(choice.codec, {}), self.survey.seconds.get(choice.codec, {})
            weight = np.array([sum(sizes.get(t.name, self._bytes(t.name)) for t in c.tensors) for c in prefixes])
            packing = np.array([sum(seconds.get(t.name, 0.0) for t in c.tensors) for c in prefixes])
            for conditions in links:
                up = conditions.up_byte_s + _hop(self.cloud)[1]
                ranks.append(np.argsort(before + after + packing + weight * up, kind="stable"))
        for place in range(min(NEAR, len(prefixes))):
            for rank in ranks:
                cut = prefixes[int(rank[place])]
                yield self._upstream(cut), cut

    def _private(self) -> set[int]:
        """The nodes that stay at the edge: the first ones, and all that read an input, which else would leave it."""
        if not self.private_depth:
            return set()
        readers = {i for i, used in enumerate(self.model.uses) if any(v.is_graph_input() for v in used)}
        return readers | set(range(self.private_depth))

    def _cut(self, labels: tuple[int, ...]) -> Iterator[Found]:
        boundary = boundaries(self.model, labels, 2)[0]
        if (cut := cut_of(self.model, boundary)) is not None:
            yield boundary.upstream, cut

    def _upstream(self, cut: CutInfo) -> frozenset[int]:
        return frozenset(i for i in positions(self.model) if i <= (cut.position or 0))

    def _bytes(self, name: str) -> int:
        return self.model.nbytes(self.model.values[name])


def smallest_crossing(model: Model, survey: Survey) -> float:
    """The fewest bytes that any prefix cut lets cross, under the codec that packs it best; infinite without a cut."""
    every: list[Mapping[str, float]] = [{}, *survey.bytes.values()]
    return min(
        (
            sum(sizes.get(t.name, model.nbytes(model.values[t.name])) for t in cut.tensors)
            for cut in cuts(model)
            for sizes in every
        ),
        default=math.inf,
    )


def _hop(profile: Profile) -> tuple[float, float, float]:
    hop = profile.hop
    return (hop.fixed_s, max(0.0, hop.up_byte_s), max(0.0, hop.down_byte_s)) if hop else (0.0, 0.0, 0.0)
