"""The trigger app: messages of a queue to the router in the background; calls into that queue, and their state.

Source: docs/reference/calls.md.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flask import Flask, Response, jsonify

from isthmus.admission import RETRY_AFTER_S
from isthmus.errors import BrokerRefused, ConfigurationMalformed, NotConfigured, NotReady, SettingsError
from isthmus.events.assembly import open_trigger
from isthmus.events.configuration import TriggerConfiguration, given_configuration, has_configuration
from isthmus.events.intake import CallIntake, place_of_calls
from isthmus.events.loops import check_loops
from isthmus.events.open import open_publisher
from isthmus.events.trigger import Trigger, TriggerStatus
from isthmus.serving.app import FunctionApp
from isthmus.serving.call_routes import CallRoutes, OpenCalls
from isthmus.serving.openapi import openapi_document
from isthmus.serving.trigger_metrics import TriggerCollector, counterpart
from isthmus.serving.trigger_openapi import TRIGGER
from isthmus.settings import TriggerSettings

# A thread that ended with an error is seen within this time.
_LOOK_S = 1.0
# Only a new deployment brings a configuration.
_UNCONFIGURED_RETRY_S = 60
# The watchdog ends the process healthcheck_interval (5 s) after SIGTERM, or once the last request is answered.
_DRAIN_S = 4.0
EX_SOFTWARE = 70  # sysexits.h: the platform starts the process anew


def create_trigger_app(
    settings: TriggerSettings, folder: Path, on_failure: Callable[[], None] = lambda: os._exit(EX_SOFTWARE)
) -> Flask:
    """The app that runs the trigger configured in `folder`, ready once everything that it names answers.

    `on_failure` is called where a thread of the trigger ended with an error.

    Raises:
        SettingsError: a malformed configuration; without any the app is not ready, and says so.
    """
    configuration = _configuration(settings, folder)
    app = _TriggerApp(settings, configuration, on_failure)
    if configuration is None:
        app.readiness.refuse(
            NotConfigured(
                f"no configuration: {settings.trigger_config} is not in the function's folder",
                hint="write it (docs/reference/trigger.md), or set trigger_config, and deploy again",
                retry_after_s=_UNCONFIGURED_RETRY_S,
            )
        )
    else:
        app.readiness.start()
    return app.flask


def _configuration(settings: TriggerSettings, folder: Path) -> TriggerConfiguration | None:
    given = settings.trigger_config
    if not has_configuration(given, folder):
        return None
    try:
        configuration = given_configuration(given, folder, dict(os.environ))
        check_loops(configuration)
    except ConfigurationMalformed as e:
        # A wrong setting: another start would fail as well.
        raise SettingsError(e.message, **{**e.facts, "hint": e.hint, "variable": "trigger_config"}) from e
    return configuration


@dataclass(frozen=True)
class _Running:
    """A trigger at work, and calls into its queue."""

    trigger: Trigger
    calls: OpenCalls


class _TriggerApp(FunctionApp):
    def __init__(
        self, settings: TriggerSettings, configuration: TriggerConfiguration | None, on_failure: Callable[[], None]
    ) -> None:
        # Those who wait have a share of the threads of their own, so that calls are taken meanwhile.
        slots = settings.max_concurrency - settings.max_waiters
        super().__init__("trigger", replace(settings, max_concurrency=slots), self._prepare)
        self._trigger_settings, self._configuration = settings, configuration
        self._on_failure = on_failure
        self._running: _Running | None = None
        self._closed = threading.Event()
        self._source_answered = False
        self.closing.callback(self._stop)
        self.metrics.add(TriggerCollector(self._status))
        CallRoutes(self, settings, lambda: self._required().calls)
        self.flask.add_url_rule("/openapi.json", "openapi", self.openapi, methods=["GET"])

    def ready(self) -> Response:
        """200 while source, records and places answer. The router may be away: calls are queued meanwhile."""
        trigger = self._required().trigger
        if not self._source_answered:
            # Until the first fetch nothing is known of the source.
            trigger.parts.consumer.backlog()
            self._source_answered = True
        away = {name: reason for name, reason in trigger.status().away.items() if name != "router"}
        if away:
            # Names of places hold their addresses.
            told = [f"{n}: {reason}" if self._settings.expose_details else counterpart(n) for n, reason in away.items()]
            raise NotReady(f"not ready: {'; '.join(sorted(told))} does not answer", retry_after_s=RETRY_AFTER_S)
        return jsonify(ready=True)

    def openapi(self) -> Response:
        """The description of this app."""
        return jsonify(openapi_document(self.flask.url_map, TRIGGER))

    def drain(self) -> None:
        """Work on no further message, and give back what is not over in time; calls are told of and queued still."""
        if self._running is not None:
            self._running.trigger.drain(_DRAIN_S)
        super().drain()

    def _required(self) -> _Running:
        self.readiness.check()
        if self._running is None:
            raise NotReady("not ready: the trigger has stopped", retry_after_s=RETRY_AFTER_S)
        return self._running

    def _prepare(self) -> None:
        configuration = self._configuration
        if configuration is None:
            raise NotConfigured("no configuration")
        traced = None if self.tracing is None else self.tracing.handler
        trigger = open_trigger(configuration, self._trigger_settings, traced)
        try:
            calls = OpenCalls(trigger.parts.calls, self._intake(trigger, configuration))
        except BaseException:
            trigger.stop(0.0)
            raise
        trigger.start()
        self._running = _Running(trigger, calls)
        threading.Thread(target=self._watch, args=(trigger,), name="watch", daemon=True).start()

    def _intake(self, trigger: Trigger, configuration: TriggerConfiguration) -> CallIntake | BrokerRefused:
        try:
            place = place_of_calls(configuration.source)
        except BrokerRefused as e:
            return e
        return CallIntake(
            configuration,
            trigger.parts.calls,
            open_publisher(place, self._trigger_settings, read_by=configuration.source),
            trigger.parts.claims,
            name=trigger.name,
            backlog=lambda: trigger.status().backlog,
            max_backlog=self._trigger_settings.max_backlog,
        )

    def _watch(self, trigger: Trigger) -> None:
        while not self._closed.wait(_LOOK_S):
            try:
                trigger.check()
            except BaseException as e:
                # Half a trigger would take calls and never work on them.
                self.log.critical("the trigger ended: %s", type(e).__name__, exc_info=e)
                self._on_failure()
                return

    def _status(self) -> TriggerStatus | None:
        return None if self._running is None else self._running.trigger.status()

    def _stop(self) -> None:
        self._closed.set()
        running, self._running = self._running, None
        if running is not None:
            running.trigger.stop()
            if isinstance(running.calls.intake, CallIntake):
                running.calls.intake.close()
