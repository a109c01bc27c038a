"""The way that a model's requests take: by the setting, by the bundle's plan, or by its own partition; known once a
version, looked up ever after."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from isthmus.artifacts import fidelity_document
from isthmus.artifacts.agreement import Measure, measure_for
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import RAW_ID, Choice
from isthmus.artifacts.plan_document import read_plan
from isthmus.codecs import Tables
from isthmus.errors import HopRejected, ImageMalformed, IsthmusError, MediaUnsupported, RequestTooLarge
from isthmus.pipeline import Hop, PhotoInput, Route, photo_input, plan_route, planned_route
from isthmus.registry import Registry
from isthmus.serving import by_hand
from isthmus.serving.models import Model
from isthmus.settings import RouterSettings

MAX_KEPT = 256
"""Versions whose way is kept; names come from callers, so there must be an end."""
_OF_A_PHOTO = {c.__name__: c for c in (ImageMalformed, MediaUnsupported, RequestTooLarge)}


@dataclass(frozen=True)
class Way:
    """One version's route, how a photo goes if it goes as it came, and what answers say of the choice."""

    route: Route
    photo: PhotoInput | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


class Routes:
    """The way of each version of each model; what a version's plan says is read when it is first asked for."""

    def __init__(
        self,
        settings: RouterSettings,
        registry: Registry,
        hops: tuple[Hop, ...],
        tables: Tables,
        codec: Choice | None,
    ) -> None:
        self._settings, self._registry, self._hops = settings, registry, hops
        self._tables, self._codec = tables, codec
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Way] = OrderedDict()

    def of(self, model: Model) -> Way:
        """The way that requests for this version take.

        Raises:
            PlanMismatch, PlanMalformed: its plan is another bundle's, or none.
            Missing, RegistryError: a cut, or what the plan names, cannot be had.
        """
        with self._lock:
            if (way := self._kept.get(model.digest)) is not None:
                self._kept.move_to_end(model.digest)
                return way
        way = self._find(model)
        with self._lock:
            self._kept[model.digest] = way
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return way

    def _find(self, model: Model) -> Way:
        # The settings speak of the default model; another has cuts of its own.
        own = self._settings.model.partition(":")[0] == model.name
        cuts = (self._settings.cuts or None) if own else None
        if cuts is None and self._settings.plan and (way := self._planned(model)) is not None:
            raw = own and self._codec is not None and self._codec.codec == RAW_ID
            return replace(way, route=replace(way.route, encodings=(), looks=None)) if raw else way
        route = plan_route(model.digest, model.bundle, self._hops, cuts)
        if not own or self._codec is None:
            return Way(route)
        return Way(by_hand.packed(route, self._codec, self._tables, self._measure))

    def _measure(self, bundle: Bundle) -> Measure:
        """What the answers of a bundle are: as it was calibrated, or as it declares them."""
        found = fidelity_document.read(bundle, self._registry.blob)
        return measure_for(bundle) if found is None else found.measure

    def _planned(self, model: Model) -> Way | None:
        if (plan := read_plan(model.bundle, self._registry.blob)) is None:
            return None
        route = planned_route(
            plan.choice, model.digest, model.bundle, self._hops, self._tables, variant=self._registry.bundle
        )
        return Way(route, photo_input(plan.choice, model.bundle, self._hops), {"plan": plan.chosen})


def of_the_photo(error: HopRejected) -> IsthmusError | None:
    """What a hop had against a photo that came to it as it was, as the router would have said it; None for another."""
    said = error.facts.get("error")
    if not isinstance(said, Mapping) or (kind := _OF_A_PHOTO.get(str(said.get("type")))) is None:
        return None
    facts = said.get("facts")
    return kind(str(said.get("error", "")), **(dict(facts) if isinstance(facts, Mapping) else {}))
