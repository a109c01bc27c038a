"""The route of a model's requests: by the settings, by the bundle's plan, or along its default partition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import RAW_ID, Choice
from isthmus.artifacts.fidelity import Fidelity, Measure, measure_for, read_fidelity
from isthmus.artifacts.plan import read_plan
from isthmus.codecs import Tables
from isthmus.pipeline import Hop, PhotoInput, Route, photo_input, plan_route, planned_route
from isthmus.registry import Registry
from isthmus.routing.codec_override import override_codec
from isthmus.settings import RouterSettings


@dataclass(frozen=True)
class SelectedRoute:
    """A version's route; `photo` is set where the last hop decodes photos, `notes` name the plan in responses."""

    route: Route
    photo: PhotoInput | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


class RouteSelector:
    """Selects the route of a version, once for all its requests."""

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

    def select(self, name: str, digest: str, bundle: Bundle) -> SelectedRoute:
        """The route of requests for this version of the model `name`.

        Raises:
            PlanMismatch, PlanMalformed: its plan is another bundle's, or none.
            Missing, RegistryError: a cut, or a blob that the plan names, cannot be had.
        """
        # The settings are for the default model; another has cuts of its own.
        is_default = self._settings.model.partition(":")[0] == name
        cuts = (self._settings.cuts or None) if is_default else None
        if cuts is None and self._settings.plan and (from_plan := self._planned(digest, bundle)) is not None:
            if is_default and self._codec is not None and self._codec.codec == RAW_ID:
                raw = replace(from_plan.route, encodings=(), looks=None)
                photo = None if from_plan.photo is None else replace(from_plan.photo, jpeg_quality=0)
                return replace(from_plan, route=raw, photo=photo)
            return from_plan
        route = plan_route(digest, bundle, self._hops, cuts)
        if not is_default or self._codec is None:
            return SelectedRoute(route)
        return SelectedRoute(override_codec(route, self._codec, self._tables, self._measure))

    def alternatives(self, digest: str, bundle: Bundle, selected: SelectedRoute) -> dict[str, SelectedRoute]:
        """Routes other than `selected`, by name."""
        from isthmus.routing.alternatives import alternative_routes  # only the page compares routes

        return alternative_routes(digest, bundle, self._hops, selected)

    def fidelity(self, bundle: Bundle) -> Fidelity | None:
        """The bundle's fidelity; None where the bundle was not calibrated.

        Raises:
            CalibrationError, RegistryError: as `read_fidelity`.
        """
        return read_fidelity(bundle, self._registry.blob)

    def _measure(self, bundle: Bundle) -> Measure:
        """The bundle's rule of agreement, as calibrated, or else as its outputs suggest."""
        fidelity = self.fidelity(bundle)
        return measure_for(bundle) if fidelity is None else fidelity.measure

    def _planned(self, digest: str, bundle: Bundle) -> SelectedRoute | None:
        if (plan := read_plan(bundle, self._registry.blob)) is None:
            return None
        route = planned_route(plan.choice, digest, bundle, self._hops, self._tables, variant=self._registry.bundle)
        return SelectedRoute(route, photo_input(plan.choice, bundle, self._hops), {"plan": plan.chosen})
