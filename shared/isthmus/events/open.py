"""Opens what a configuration names: consumers, publishers, stores. A client is imported where its kind is named.

Each broker's consumer and publisher takes its table and the text of the secret that the table names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from isthmus.errors import ConfigurationMalformed, SettingsError
from isthmus.events.broker import Consumer, Publisher
from isthmus.events.configuration import (
    Broker,
    CallbackPlace,
    MqttPlace,
    NatsPlace,
    ObjectPlace,
    Place,
    RedisPlace,
    SqsPlace,
    where_of,
)
from isthmus.registry import FolderStore, RemoteStore, open_blob_store, parse_address
from isthmus.settings import RegistrySettings

# A NATS credentials file holds a token and a seed.
_MAX_SECRET_BYTES = 64 * 2**10


def open_consumer(place: Broker, settings: RegistrySettings) -> Consumer:
    """The consumer of a source.

    Raises:
        ConfigurationMalformed, BrokerRefused, BrokerUnavailable: as `isthmus.events.assembly.open_trigger`.
    """
    with client_installed():
        match place:
            case NatsPlace():
                from isthmus.events.brokers.nats import NatsConsumer

                return NatsConsumer(place, secret_text(place.credentials_secret, settings))
            case MqttPlace():
                from isthmus.events.brokers.mqtt import MqttConsumer

                return MqttConsumer(place, secret_text(place.password_secret, settings))
            case RedisPlace():
                from isthmus.events.brokers.redis import RedisConsumer

                return RedisConsumer(place, secret_text(place.password_secret, settings))
            case SqsPlace():
                from isthmus.events.brokers.sqs import SqsConsumer

                return SqsConsumer(place)
    raise ConfigurationMalformed(f"no consumer for {where_of(place)}", where="source")


def open_publisher(place: Place, settings: RegistrySettings, *, read_by: Broker | None = None) -> Publisher:
    """The publisher of a place of results or dead letters, or of a place that the source `read_by` reads.

    Raises:
        ConfigurationMalformed, BrokerRefused, BrokerUnavailable: as `isthmus.events.assembly.open_trigger`.
    """
    with client_installed():
        match place:
            case NatsPlace():
                from isthmus.events.brokers.nats import NatsPublisher

                source = read_by if isinstance(read_by, NatsPlace) else None
                return NatsPublisher(place, secret_text(place.credentials_secret, settings), read_by=source)
            case MqttPlace():
                from isthmus.events.brokers.mqtt import MqttPublisher

                return MqttPublisher(place, secret_text(place.password_secret, settings))
            case RedisPlace():
                from isthmus.events.brokers.redis import RedisPublisher

                return RedisPublisher(place, secret_text(place.password_secret, settings))
            case SqsPlace():
                from isthmus.events.brokers.sqs import SqsPublisher

                return SqsPublisher(place)
            case CallbackPlace():
                from isthmus.events.places.callback import CallbackPublisher

                return CallbackPublisher(place, secret_text(place.signing_secret, settings))
            case ObjectPlace():
                from isthmus.events.places.objects import ObjectPublisher

                return ObjectPublisher(blob_store(place.url, settings, "results"))
    raise ConfigurationMalformed(f"no publisher for {where_of(place)}", where="results")


def blob_store(url: str, settings: RegistrySettings, where: str) -> FolderStore | RemoteStore:
    """The store at a URL; a folder is made where it is absent."""
    try:
        store = open_blob_store(url, replace(settings, registry=url))
        if isinstance(store, FolderStore):
            Path(parse_address(url).folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    except (SettingsError, OSError) as e:
        raise ConfigurationMalformed(f"{where}: {url!r} cannot be used: {e}", where=where) from e
    return store


def secret_text(name: str, settings: RegistrySettings) -> str:
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
def client_installed() -> Iterator[None]:
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
