"""The router app: photos, JSON and Open Inference Protocol requests in, predictions out."""

from __future__ import annotations

from flask import Flask

from isthmus.errors import SettingsError
from isthmus.pipeline.hop import check_hops, open_hops
from isthmus.processing.image_budget import ImageMemory
from isthmus.registry import open_registry
from isthmus.routing import (
    CanaryTrials,
    Comparison,
    Estimates,
    Guard,
    LinkProber,
    RouteSelector,
    Warming,
    parse_override,
    watch,
)
from isthmus.runtime.tables import Tables
from isthmus.serving.app import FunctionApp
from isthmus.serving.inference_routes import InferenceRoutes
from isthmus.serving.model_routes import ModelRoutes, PermittedCatalog, StateRoute
from isthmus.serving.openai.api import OpenAIApi
from isthmus.serving.prediction import Predictor
from isthmus.serving.preload import load_deadline, open_drafts, open_sessions, parse_entry, preload
from isthmus.serving.routing_metrics import MeasuredDispatcher, RoutingMetrics
from isthmus.settings import RouterSettings


def create_router_app(settings: RouterSettings) -> Flask:
    """The app that serves models. Ready once `settings.model` is known and preloads are in memory.

    Raises:
        SettingsError: a setting that only building can judge.
    """
    app = _RouterApp(settings)
    app.readiness.start()
    return app.flask


class _RouterApp(FunctionApp):
    def __init__(self, settings: RouterSettings) -> None:
        if not settings.registry:
            raise SettingsError(
                "the setting registry is missing: the router reads its model's manifest there", variable="registry"
            )
        # Settings are judged before connections and threads exist, which a failed start would leave behind.
        check_hops(settings.hops)
        codec = parse_override(settings)
        for entry in settings.preload:
            parse_entry(entry)
        self._router_settings = settings
        self._registry = open_registry(settings)
        sessions = open_sessions(settings, self._registry) if "local" in settings.hops else None
        self._store = None if sessions is None else sessions.store
        estimates = Estimates()
        hops = watch(open_hops(settings, sessions), estimates)
        super().__init__("router", settings, self._prepare)
        images = ImageMemory(settings.image_memory_bytes)
        tables = Tables(self._registry.bundle, self._registry.blob, settings.max_image_pixels, memory=images)
        routes = RouteSelector(settings, self._registry, hops, tables, codec)
        guard = Guard(settings.guard_share, routes.fidelity, self.metrics, self.log, deadline_s=settings.deadline_s)
        self._warming = Warming(hops, self.log)
        trials = CanaryTrials(self._registry, self.log)
        self._catalog = PermittedCatalog(self._registry, settings.refresh_s, self.log, routes, self._warming, trials)
        dispatcher = MeasuredDispatcher(hops, estimates, self._warming, self.log, settings.fallback)
        dispatcher.tracing, dispatcher.exits = self.tracing, guard.exits
        routing_metrics = RoutingMetrics(settings)
        routing_metrics.measure(dispatcher)
        self.metrics.add(routing_metrics)
        comparison = Comparison(settings, trials, routes.fidelity, images, self.metrics.busy, self.log)
        predictor = Predictor(settings, dispatcher, guard, comparison, images, self.metrics, self.log)
        if sessions is not None and self._store is not None:
            self.closing.callback(self._store.close)
            self.metrics.gauge_store(sessions)
            self._store.share_memory(self._memory)
            self.slots.keep_at_least(sessions.room_for_batches)
        for close in (dispatcher.close, *(hop.close for hop in hops), tables.close, self._catalog.close, guard.close):
            self.closing.callback(close)
        self.closing.callback(trials.close)
        self.closing.callback(comparison.close)
        self.closing.callback(LinkProber({hop.name: hop.watched[0].inner for hop in hops}, estimates).close)
        inference = InferenceRoutes(self, settings, self._catalog, trials, predictor, images, tables)
        models = ModelRoutes(self, self._catalog, settings)
        StateRoute(self, dispatcher, trials, settings)
        self._drafts = open_drafts(settings, self._registry, hops[0])
        OpenAIApi(
            self, settings, inference.versions, self._registry, models.listing, dispatcher, predictor, self._drafts
        )
        if settings.page:
            from isthmus.serving.page import Page  # templates are for routers with a page alone

            Page(settings, self._catalog, models.listing, inference.reader, predictor, inference.explainer).serve_on(
                self
            )

    def _prepare(self) -> None:
        self._catalog.forget(self._router_settings.model)
        model = self._catalog.get(self._router_settings.model, load_deadline())
        # Its routes load while the function is ready: the first requests take the plan's choice.
        self._warming.loaded(model)
        if self._drafts is not None:
            is_here = self._router_settings.hops[0] == "local"
            self._drafts.prepare(model, self._store if is_here else None, load_deadline())
        if self._store is not None:
            preload(self._router_settings.preload, self._registry, self._store)
