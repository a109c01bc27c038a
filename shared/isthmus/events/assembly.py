"""Assembles a trigger from its configuration: loops are refused, all parts opened, and closed after a failure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack

from isthmus.events.calls import Calls
from isthmus.events.configuration import (
    MqttPlace,
    NatsPlace,
    RedisPlace,
    SqsPlace,
    TriggerConfiguration,
    where_of,
)
from isthmus.events.loops import check_loops
from isthmus.events.open import open_consumer, open_publisher
from isthmus.events.processing import MessageHandler
from isthmus.events.publishing import ResultPlace
from isthmus.events.route import RouterRoute
from isthmus.events.spool import EventSpool
from isthmus.events.stores.open import open_claims, open_records
from isthmus.events.trigger import Trigger, TriggerParts
from isthmus.http.tls import open_trust
from isthmus.settings import RegistrySettings, read_secret


def open_trigger(
    configuration: TriggerConfiguration,
    settings: RegistrySettings,
    around: Callable[[MessageHandler], MessageHandler] | None = None,
) -> Trigger:
    """Open everything that the configuration names; the trigger closes it.

    `around` wraps the calls of the router, to trace them.
    `settings` have the folder of secrets and the S3 server; their registry is not read.

    Raises:
        ConfigurationMalformed: a loop, a missing package or secret, or a malformed address.
        BrokerRefused: the broker refuses credentials, subject or topic.
        BrokerUnavailable, ResultStoreUnavailable: no answer.
    """
    check_loops(configuration)
    with ExitStack() as opened:
        claims = open_claims(configuration.claims, settings)
        records = open_records(configuration.records, settings)
        opened.callback(records.close)
        results = [ResultPlace(where_of(place), open_publisher(place, settings)) for place in configuration.results]
        dead = configuration.dead_letters
        dead_letters = None if dead is None else ResultPlace(where_of(dead), open_publisher(dead, settings))
        for place in (*results, *filter(None, [dead_letters])):
            opened.callback(place.publisher.close)
        table = configuration.spool
        spool = None if table is None else EventSpool(table.folder, table.max_bytes)
        if spool is not None:
            opened.callback(spool.close)
        router = configuration.router
        key = read_secret(settings.secrets_dir, router.key_secret) if router.key_secret else ""
        name, route = trigger_name(configuration), RouterRoute(router, open_trust(settings), key)
        consumer = open_consumer(configuration.source, settings)
        parts = TriggerParts(
            consumer=consumer,
            results=results,
            dead_letters=dead_letters,
            claims=claims,
            calls=Calls(records, keep_s=float(configuration.records.keep), scope=name, objects=claims),
            route=route if around is None else around(route),
            spool=spool,
            closers=(route.close, records.close),
        )
        trigger = Trigger(configuration, parts, name)
        opened.pop_all()
    return trigger


def trigger_name(configuration: TriggerConfiguration) -> str:
    """The configured name, by default a digest of the source: triggers that share messages share records.

    Waiting times, credentials and the name of one session in a group change no digest.
    """
    if configuration.name:
        return configuration.name
    match source := configuration.source:
        case NatsPlace():
            reader = source.durable
        case MqttPlace():
            reader = source.group or source.client_id
        case RedisPlace():
            reader = source.group
        case SqsPlace():
            reader = ""
    where = where_of(source)
    return f"{where.partition(' ')[0]}-{hashlib.sha256(f'{where} {reader}'.encode()).hexdigest()[:8]}"
