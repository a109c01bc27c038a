"""Candidate routes, the ways to answer a model's requests, and a version with its candidates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.plan import Terms
from isthmus.pipeline import PhotoInput, Route
from isthmus.routing.demand import Demand
from isthmus.wire.frame import DTYPES

if TYPE_CHECKING:  # Pillow is slow to import
    from isthmus.processing.photo_redaction import PhotoRedactor

NO_DEMAND = Demand()
# Where a plan saw every input exit, its sums say nothing about a request that does not.
MIN_BEHIND = 0.01
NO_TERMS = Terms()


@dataclass(frozen=True)
class RouteCandidate:
    """A version's route and its demand on the resources.

    `photo` is set where the last hop decodes photos. `name` is the plan's name of the candidate; empty for a route
    beside those that the router chooses from. `terms` and `demand`, and `planned_s`, the seconds of a request alone,
    are the plan's, of a language model those of a further token; the first two are zero and the last None without a
    plan. `degradation` states what an approximation costs; empty where the candidate is as close to the model as the
    plan allows. `exit_share` is the share of requests that end at the route's exit, as the plan has it, or else as the
    exit was measured; terms and demand count what lies behind it for the others. `answers_unsure` says that the exit's
    unsure prediction is better than none.
    """

    route: Route
    photo: PhotoInput | None = None
    name: str = ""
    demand: Demand = NO_DEMAND
    planned_s: float | None = None
    degradation: str = ""
    terms: Terms = NO_TERMS
    exit_share: float = 0.0
    answers_unsure: bool = False

    @cached_property
    def hops(self) -> tuple[str, ...]:
        """Names of the hops on the way."""
        return tuple(dict.fromkeys(hop.name for hop in self.route.hops))

    def full(self) -> RouteCandidate:
        """The candidate without its exit, for a request that asks for the full model."""
        return self if self.route.exit is None else replace(self, route=self.route.full(), answers_unsure=False)

    @property
    def planned_behind(self) -> float:
        """The share of requests that pass the exit, as terms and demand count them; 1 without an exit."""
        return max(1 - self.exit_share, MIN_BEHIND)

    @cached_property
    def input_bytes(self) -> int:
        """Size of the first segment's inputs as arrays; a free dimension counts as 1."""
        first = self.route.segments[0]
        sizes = (math.prod(n for n in spec.shape if isinstance(n, int)) for spec in first.inputs)
        return sum(size * DTYPES[spec.dtype].itemsize for size, spec in zip(sizes, first.inputs, strict=True))

    @property
    def far_hop(self) -> str:
        """Name of the last hop, behind the link where the route has one."""
        return self.hops[-1]


@dataclass(frozen=True)
class ServedModel:
    """A version of a model: its class names where the bundle has any, its candidate routes, the redaction of photos."""

    name: str
    version: str
    digest: str
    bundle: Bundle
    labels: tuple[str, ...] | None
    candidates: tuple[RouteCandidate, ...]
    redactor: PhotoRedactor | None = None
    """Of its photos; None where the bundle redacts none."""

    @property
    def route(self) -> RouteCandidate:
        """The plan's choice."""
        return self.candidates[0]
