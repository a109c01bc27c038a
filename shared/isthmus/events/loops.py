"""Loops: places of results that the trigger's own source reads."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from isthmus.errors import ConfigurationMalformed
from isthmus.events.configuration import (
    Broker,
    MqttPlace,
    NatsPlace,
    Place,
    RedisPlace,
    SqsPlace,
    TriggerConfiguration,
    where_of,
)
from isthmus.http.sockets import resolve

_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
_RESOLVE_S = 2.0
_PORTS = {
    "http": 80,
    "https": 443,
    "nats": 4222,
    "tls": 4222,
    "mqtt": 1883,
    "mqtts": 8883,
    "redis": 6379,
    "rediss": 6379,
}


def check_loops(configuration: TriggerConfiguration) -> None:
    """Refuse places that the source reads, and two places that are the same.

    Raises:
        ConfigurationMalformed: a loop, or a repeated place. Facts: `where`.
    """
    source, places = configuration.source, configuration.results
    named = [*((f"results[{i}]", place) for i, place in enumerate(places))]
    if configuration.dead_letters is not None:
        named.append(("dead_letters", configuration.dead_letters))
    names: dict[str, str] = {}
    for where, place in named:
        if reads(source, place):
            raise ConfigurationMalformed(
                f"{where} is a loop: {where_of(source)} reads what goes to {where_of(place)}",
                where=where,
                hint="send results where the source does not read",
            )
        # Records note places by name: the second of two equal places would never be served.
        if (other := names.setdefault(where_of(place), where)) != where:
            raise ConfigurationMalformed(f"{where} is the same place as {other}: {where_of(place)}", where=where)


def reads(source: Broker, place: Place) -> bool:
    """Whether a message sent to `place` reaches `source`, as far as the two addresses show."""
    match source, place:
        case NatsPlace(), NatsPlace():
            pattern, subject = source.subject.split("."), place.subject.split(".")
            return _matches(pattern, subject, "*", ">") and _share_server(source.url, place.url)
        case MqttPlace(), MqttPlace():
            pattern, topic = topic_filter(source.topic).split("/"), place.topic.split("/")
            return _matches_topic(pattern, topic) and _share_server(source.url, place.url)
        case SqsPlace(), SqsPlace():
            is_same_path = _path(source.queue_url) == _path(place.queue_url)
            return is_same_path and _share_server(
                source.endpoint or source.queue_url, place.endpoint or place.queue_url
            )
        case RedisPlace(), RedisPlace():
            is_same = source.stream == place.stream and (_path(source.url) or "0") == (_path(place.url) or "0")
            return is_same and _share_server(source.url, place.url)
    return False


def _matches(pattern: Sequence[str], levels: Sequence[str], one: str, rest: str) -> bool:
    """Whether levels match a pattern, where `one` stands for a single level and `rest` for the last levels."""
    for i, part in enumerate(pattern):
        if part == rest:
            return len(levels) > i
        if i >= len(levels) or part not in (one, levels[i]):
            return False
    return len(pattern) == len(levels)


def _matches_topic(pattern: Sequence[str], levels: Sequence[str]) -> bool:
    """As `_matches`. `a/#` has `a` too, and wildcards never begin with the server's own $ topics (MQTT 4.7)."""
    if levels[0].startswith("$") and pattern[0] in ("+", "#"):
        return False
    return _matches(pattern, levels, "+", "#") or (pattern[-1] == "#" and _matches(pattern[:-1], levels, "+", "#"))


def topic_filter(topic: str) -> str:
    """The filter of a shared subscription, `$share/GROUP/FILTER`, or the topic itself."""
    return topic.split("/", 2)[2] if topic.startswith("$share/") and topic.count("/") >= 2 else topic


def _share_server(one: str, other: str) -> bool:
    """Whether two URLs, each of a server or of several with commas, have a server in common."""
    servers = [{_server(url.strip()) for url in urls.split(",")} for urls in (one, other)]
    if servers[0] & servers[1]:
        return True
    # Two names of a host, or a name and an address; of equal ports alone, as each may take a look-up.
    shared = {port for _, port in servers[0]} & {port for _, port in servers[1]}
    resolved = [
        {(a, port) for host, port in some if port in shared for a in _addresses(host, port)} for some in servers
    ]
    return bool(resolved[0] & resolved[1])


def _server(url: str) -> tuple[str, int]:
    """Host and port; names of this machine are equal."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    try:
        port = parts.port
    except ValueError:
        port = None
    host = (parts.hostname or "").lower().removesuffix(".")
    return "localhost" if host in _LOOPBACK else host, port or _PORTS.get(parts.scheme, 80)


def _addresses(host: str, port: int) -> set[str]:
    """The addresses of a host, this machine's as `localhost`; none where the name is unknown."""
    try:
        addresses = {str(entry[4][0]) for entry in resolve(host, port, timeout_s=_RESOLVE_S)}
    except (OSError, ValueError):  # includes TimeoutError, UnicodeError
        return set()
    return {"localhost" if _is_own(address) else address for address in addresses}


def _is_own(address: str) -> bool:
    """Whether this machine has the address, as a socket can be bound there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.bind((address, 0))
    except OSError:
        return False
    return True


def _path(url: str) -> str:
    return urlsplit(url).path.strip("/")
