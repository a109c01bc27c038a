"""Running a trigger in this process, and checking its configuration against what it names."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from isthmus.errors import BrokerUnavailable, IsthmusError, ResultStoreUnavailable
from isthmus.events.assembly import open_trigger, trigger_name
from isthmus.events.broker import Reachable
from isthmus.events.configuration import Place, TriggerConfiguration, where_of
from isthmus.events.loops import check_loops
from isthmus.events.message import Message
from isthmus.events.open import open_consumer, open_publisher
from isthmus.events.route import Outcome, RouterRoute
from isthmus.events.stores.open import open_claims, open_records
from isthmus.events.trigger import STOP_S, TriggerStatus
from isthmus.http.tls import open_trust
from isthmus.settings import RegistrySettings

# Between looks at the queue of a run that ends with it.
_LOOK_S = 0.2


def _ignore_status(status: TriggerStatus) -> None:
    """No-op default callback."""


@dataclass(frozen=True, kw_only=True)
class TriggerRequest:
    """A trigger to run until `stop` is set; with `until_empty` also until nothing waits at its source.

    `settings` have the folder of secrets and the S3 server. `on_status` gets the state every `status_every_s` seconds.
    """

    configuration: TriggerConfiguration
    settings: RegistrySettings
    stop: threading.Event = field(default_factory=threading.Event)
    until_empty: bool = False
    on_status: Callable[[TriggerStatus], None] = _ignore_status
    status_every_s: float = 5.0
    stop_s: float = STOP_S


@dataclass(frozen=True)
class PartCheck:
    """A counterpart of a trigger, and the error of connecting to it, empty where it answers."""

    part: str
    where: str
    error: str = ""
    hint: str = ""


def run_trigger(request: TriggerRequest) -> TriggerStatus:
    """Run a trigger to its end; its last state.

    Raises:
        As `isthmus.events.assembly.open_trigger`.
    """
    trigger = open_trigger(request.configuration, request.settings)
    trigger.start()
    try:
        shown_at = time.monotonic()
        while not request.stop.wait(_LOOK_S):
            trigger.check()
            if time.monotonic() - shown_at >= request.status_every_s:
                shown_at = time.monotonic()
                request.on_status(trigger.status())
            # A broker that is away is not empty.
            with suppress(BrokerUnavailable):
                if request.until_empty and trigger.is_empty():
                    break
    finally:
        trigger.stop(request.stop_s)
    return trigger.status()


def check_trigger(configuration: TriggerConfiguration, settings: RegistrySettings) -> list[PartCheck]:
    """Connect once to everything that the configuration names; a callback gets no request.

    Raises:
        ConfigurationMalformed: a loop.
    """
    check_loops(configuration)
    places = [("results", place) for place in configuration.results]
    if configuration.dead_letters is not None:
        places.append(("dead letters", configuration.dead_letters))
    checks = [_checked("source", where_of(configuration.source), lambda: _check_source(configuration, settings))]
    checks += [_checked(part, where_of(place), partial(_check_place, place, settings)) for part, place in places]
    checks.append(_checked("records", configuration.records.url, lambda: _check_records(configuration, settings)))
    if configuration.claims is not None:
        checks.append(_checked("claims", configuration.claims.url, lambda: _check_claims(configuration, settings)))
    return [*checks, _check_router(configuration, settings)]


def _checked(part: str, where: str, connect: Callable[[], object]) -> PartCheck:
    try:
        connect()
    except IsthmusError as e:
        return PartCheck(part, where, e.message, e.hint)
    return PartCheck(part, where)


def _check_source(configuration: TriggerConfiguration, settings: RegistrySettings) -> None:
    consumer = open_consumer(configuration.source, settings)
    try:
        consumer.backlog()
    finally:
        consumer.close()


def _check_place(place: Place, settings: RegistrySettings) -> None:
    publisher = open_publisher(place, settings)
    try:
        if isinstance(publisher, Reachable):
            publisher.check()
    finally:
        publisher.close()


def _check_records(configuration: TriggerConfiguration, settings: RegistrySettings) -> None:
    records = open_records(configuration.records, settings)
    try:
        # A write shows what a read does not: a disk that is full, credentials that only read.
        key = f"check-{trigger_name(configuration)}"
        version = records.create(key, b"")
        stored = records.get(key)
        if not (stored and records.delete(key, version or stored.version)):
            raise ResultStoreUnavailable(f"{records.url} does not keep what is written")
    finally:
        records.close()


def _check_claims(configuration: TriggerConfiguration, settings: RegistrySettings) -> None:
    claims = open_claims(configuration.claims, settings)
    if claims is not None:
        claims.redeem(claims.deposit(b"", ""))


def _check_router(configuration: TriggerConfiguration, settings: RegistrySettings) -> PartCheck:
    """An empty message: the router's refusal shows that it answers; an unknown model shows as such."""
    route = RouterRoute(configuration.router, open_trust(settings))
    try:
        reply = route.call(Message(b"", "check"))
    finally:
        route.close()
    answers = reply.outcome in (Outcome.DONE, Outcome.BUSY, Outcome.REFUSED) and reply.document.get("type") != "Missing"
    hint = "" if answers else "start the functions on this machine with `isthmus up`, or see router.url"
    return PartCheck("router", configuration.router.url, "" if answers else reply.reason, hint)
