"""The routes of a model's requests: by the settings, by the bundle's plan, or along its default partition."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import RAW_ID, Choice
from isthmus.artifacts.fidelity import Fidelity, Measure, measure_for, read_fidelity
from isthmus.artifacts.plan import Candidate, Plan, read_plan
from isthmus.codecs import Tables
from isthmus.errors import Missing, PlanMalformed
from isthmus.pipeline import Hop, photo_input, plan_route, planned_route
from isthmus.registry import Registry
from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.codec_override import override_codec
from isthmus.routing.demand import Demand
from isthmus.routing.efficient import degradation_of, efficient_candidates
from isthmus.settings import RouterSettings


class RouteSelector:
    """Selects the candidate routes of a version, once for all its requests."""

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

    def select(self, name: str, digest: str, bundle: Bundle) -> tuple[RouteCandidate, ...]:
        """The candidate routes of requests for this version of the model `name`; the first is the plan's choice.

        Without a plan, or with `cuts` by the settings, the route along the partition is the only candidate.

        Raises:
            PlanMismatch, PlanMalformed: its plan is another bundle's, or none.
            Missing, RegistryError: a cut, or a blob that the plan names, cannot be had.
        """
        # The settings are for the default model; another has cuts of its own.
        is_default = self._settings.model_name == name
        cuts = (self._settings.cuts or None) if is_default else None
        if cuts is None and self._settings.plan and (plan := read_plan(bundle, self._registry.blob)) is not None:
            candidates = self._planned(plan, digest, bundle)
            if is_default and self._codec is not None and self._codec.codec == RAW_ID:
                return tuple(map(_raw, candidates))
            return candidates
        route = plan_route(digest, bundle, self._hops, cuts)
        if is_default and self._codec is not None:
            route = override_codec(route, self._codec, self._tables, self._measure)
        route = route.with_exit()
        share = 0.0 if route.exit is None else route.exit.gate.share
        return (self._at_exit(RouteCandidate(route, name="default", exit_share=share)),)

    def alternatives(self, digest: str, bundle: Bundle, selected: RouteCandidate) -> dict[str, RouteCandidate]:
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

    def _planned(self, plan: Plan, digest: str, bundle: Bundle) -> tuple[RouteCandidate, ...]:
        chosen = self._candidate(plan, plan.choice, digest, bundle)
        if not self._settings.adapt or len(self._hops) == 1:
            return (chosen,)
        candidates = [chosen]
        for other in efficient_candidates(plan)[1:]:
            with suppress(Missing, PlanMalformed):  # a variant that was removed costs a choice, not the model
                candidates.append(self._candidate(plan, other, digest, bundle))
        return tuple(candidates)

    def _candidate(self, plan: Plan, candidate: Candidate, digest: str, bundle: Bundle) -> RouteCandidate:
        route = planned_route(candidate, digest, bundle, self._hops, self._tables, variant=self._registry.bundle)
        photo = photo_input(candidate, bundle, self._hops)
        demand = Demand.planned(candidate)
        degradation = degradation_of(candidate, plan)
        costs = candidate.generation
        # Live estimates of a language model's segments are those of steps of one token.
        terms, seconds = (
            (candidate.predicted, candidate.seconds) if costs is None else (costs.per_token, candidate.per_token_s)
        )
        share = 0.0 if candidate.exit is None else candidate.exit.share
        selected = RouteCandidate(route, photo, candidate.name, demand, seconds, degradation, terms, share)
        return self._at_exit(selected)

    def _at_exit(self, candidate: RouteCandidate) -> RouteCandidate:
        """The candidate with its exit as the settings have it."""
        if candidate.route.exit is None:
            return candidate
        if not self._settings.exits:
            return candidate.full()
        return replace(candidate, answers_unsure=self._settings.exit_when_cut_off)


def _raw(candidate: RouteCandidate) -> RouteCandidate:
    """The candidate without codecs."""
    photo = None if candidate.photo is None else replace(candidate.photo, jpeg_quality=0)
    return replace(candidate, route=candidate.route.raw(), photo=photo)
