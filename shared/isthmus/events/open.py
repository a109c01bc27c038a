"""Opens what a configuration names: consumers, publishers, stores. A client is imported where its kind is named.

Each broker's consumer and publisher takes its table and the text of the secret that the table names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec

from isthmus.errors import ConfigurationMalformed, SettingsError
from isthmus.events.broker import Consumer, Publisher
from isthmus.events.calls import Calls
from isthmus.events.claims import ClaimStore
from isthmus.events.configuration import (
    Broker,
    CallbackPlace,
    ClaimsTable,
    NatsPlace,
    ObjectPlace,
    Place,
    RecordsTable,
    TriggerConfiguration,
    where_of,
)
from isthmus.events.loops import check_loops
from isthmus.events.processing import ResultPlace
from isthmus.events.records import RecordStore
from isthmus.events.route import RouterRoute
from isthmus.events.trigger import Trigger, TriggerParts
from isthmus.registry import BlobStore, FolderStore, S3Store, open_blob_store, parse_address
from isthmus.settings import RegistrySettings

# A NATS credentials file holds a token and a seed.
_MAX_SECRET_BYTES = 64 * 2**10


def open_trigger(configuration: TriggerConfiguration, settings: RegistrySettings) -> Trigger:
    """Open everything that the configuration names; the trigger closes it.

    `settings` have the folder of secrets and the S3 server; their registry is not read.

    Raises:
        ConfigurationMalformed: a loop, a missing package or secret, or an address that is none.
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
        name, route = trigger_name(configuration), RouterRoute(configuration.router)
        consumer = open_consumer(configuration.source, settings)
        parts = TriggerParts(
            consumer=consumer,
            results=results,
            dead_letters=dead_letters,
            claims=claims,
            calls=Calls(records, keep_s=float(configuration.records.keep), scope=name, objects=claims),
            route=route,
            closers=(route.close, records.close),
        )
        trigger = Trigger(configuration, parts, name)
        opened.pop_all()
    return trigger


def trigger_name(configuration: TriggerConfiguration) -> str:
    """The configured name, or one of the source: triggers that share a source share records."""
    if configuration.name:
        return configuration.name
    source = msgspec.json.encode(configuration.source, enc_hook=float, order="sorted")
    kind = msgspec.to_builtins(configuration.source, enc_hook=float)["kind"]
    return f"{kind}-{hashlib.sha256(source).hexdigest()[:8]}"


def open_consumer(place: Broker, settings: RegistrySettings) -> Consumer:
    """The consumer of a source.

    Raises:
        As `open_trigger`.
    """
    with _extra():
        match place:
            case NatsPlace():
                from isthmus.events.brokers.nats import NatsConsumer

                return NatsConsumer(place, _secret(place.credentials_secret, settings))
    raise ConfigurationMalformed(f"no consumer for {where_of(place)}", where="source")


def open_publisher(place: Place, settings: RegistrySettings) -> Publisher:
    """The publisher of a place of results or dead letters.

    Raises:
        As `open_trigger`.
    """
    with _extra():
        match place:
            case NatsPlace():
                from isthmus.events.brokers.nats import NatsPublisher

                return NatsPublisher(place, _secret(place.credentials_secret, settings))
            case CallbackPlace():
                from isthmus.events.places.callback import CallbackPublisher

                return CallbackPublisher(place, _secret(place.signing_secret, settings))
            case ObjectPlace():
                from isthmus.events.places.objects import ObjectPublisher

                return ObjectPublisher(_blob_store(place.url, settings, "results"))
    raise ConfigurationMalformed(f"no publisher for {where_of(place)}", where="results")


def open_records(table: RecordsTable, settings: RegistrySettings) -> RecordStore:
    """The store of calls: sqlite:PATH, nats://HOST:PORT/BUCKET or s3://BUCKET/PREFIX.

    Raises:
        ConfigurationMalformed: another URL. Others as `open_trigger`.
    """
    with _extra():
        if table.url.startswith("sqlite:"):
            from isthmus.events.stores.sqlite import SqliteRecords

            return SqliteRecords(Path(table.url.removeprefix("sqlite:")))
        if table.url.startswith(("nats://", "tls://")):
            from isthmus.events.stores.jetstream import JetStreamRecords

            return JetStreamRecords(table.url, float(table.keep), _secret(table.credentials_secret, settings))
        if table.url.startswith("s3://"):
            from isthmus.events.stores.s3 import S3Records

            store = _blob_store(table.url, settings, "records")
            if isinstance(store, S3Store):
                return S3Records(store)
    raise ConfigurationMalformed(
        f"records.url is {table.url!r}; it is sqlite:PATH, nats://HOST:PORT/BUCKET or s3://BUCKET/PREFIX",
        where="records.url",
    )


def open_claims(table: ClaimsTable | None, settings: RegistrySettings) -> ClaimStore | None:
    """The object store for large bodies; None where none is configured.

    Raises:
        ConfigurationMalformed: the URL is no store's.
    """
    if table is None:
        return None
    store = _blob_store(table.url, settings, "claims")
    return ClaimStore(store, max_bytes=table.max_bytes, keep_s=float(table.keep))


def _blob_store(url: str, settings: RegistrySettings, where: str) -> BlobStore:
    """The store at a URL; a folder is made where it is absent."""
    try:
        store = open_blob_store(url, replace(settings, registry=url))
        if isinstance(store, FolderStore):
            Path(parse_address(url).folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    except (SettingsError, OSError) as e:
        raise ConfigurationMalformed(f"{where}: {url!r} cannot be used: {e}", where=where) from e
    return store


def _secret(name: str, settings: RegistrySettings) -> str:
    """The text of a secret; empty without a name.

    Raises:
        ConfigurationMalformed: no such secret, or no text.
    """
    if not name:
        return ""
    path = Path(settings.secrets_dir) / name
    try:
        with path.open("rb") as f:
            data = f.read(_MAX_SECRET_BYTES + 1)
        text = data.decode().strip()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is no text"
        raise ConfigurationMalformed(
            f"the secret {name} in {settings.secrets_dir} cannot be read: {reason}",
            where=name,
            hint=f"create it: faas-cli secret create {name} --from-file=…, or the file itself; secrets_dir names"
            " the folder",
        ) from e
    if not text or len(data) > _MAX_SECRET_BYTES:
        raise ConfigurationMalformed(f"the secret {name} in {settings.secrets_dir} is empty or too long", where=name)
    return text


@contextmanager
def _extra() -> Iterator[None]:
    """A missing client as advice.

    Raises:
        ConfigurationMalformed: a package that this kind needs is not installed. Facts: `package`.
    """
    try:
        yield
    except ModuleNotFoundError as e:
        raise ConfigurationMalformed(
            f"the package {e.name} is not installed, which this kind of place needs",
            where="kind",
            package=e.name,
            hint='pip install "isthmus[events]"',
        ) from e
