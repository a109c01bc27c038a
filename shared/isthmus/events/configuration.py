"""A trigger's configuration: a TOML file, read and checked once at start.

Source: docs/reference/trigger.md. Credentials are names of secrets (files in `secrets_dir`), never values.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from isthmus.artifacts.constraints import matching
from isthmus.errors import ConfigurationMalformed
from isthmus.http.pool import is_url
from isthmus.units import parse_duration, parse_size

# A configuration is a page; a larger file is a wrong path.
_MAX_BYTES = 256 * 2**10
DEFAULT_FILE = "trigger.toml"
MIN_SPOOL_BYTES = 2**20
_NATS_NAME = re.compile(r"[^\s.*>/\\]+")
_NATS_NAME_RULE = "has a space, a dot, a slash or a wildcard, which NATS refuses in names"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
Text = Annotated[str, Meta(min_length=1, max_length=1024)]
Count = Annotated[int, Meta(ge=1, le=100_000)]


class Seconds(float):
    """A duration, written as a text: 30s, 10m or 1d."""


class Bytes(int):
    """A size, written as a text: 256MiB."""


class _Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """A table of the file; `kind` names the struct; unknown keys are refused by name."""


class NatsPlace(_Table, frozen=True, kw_only=True, tag="nats"):
    """A JetStream stream: `subject` to read (wildcards allowed) or to write; an absent `stream` is created.

    `durable` is the consumer's name: consumers of the same name share its messages. Unacknowledged messages come
    again after `ack_wait`.
    """

    url: Text = "nats://127.0.0.1:4222"
    subject: Text
    stream: str = ""
    durable: Text = "isthmus"
    ack_wait: Seconds = Seconds(30)
    credentials_secret: str = ""
    """Name of a secret with a NATS credentials file (.creds), or `user:password`, or a token."""


class MqttPlace(_Table, frozen=True, kw_only=True, tag="mqtt"):
    """An MQTT topic (filters with + and # to read), QoS 1, `version` "3.1.1" or "5".

    `client_id` names the persistent session: the broker keeps its messages while the trigger is away. `group` makes a
    shared subscription ($share/GROUP/TOPIC) with a session for each trigger.
    """

    url: Text = "mqtt://127.0.0.1:1883"
    topic: Text
    version: Annotated[str, matching(r"(3\.1\.1|5)")] = "5"
    client_id: str = ""
    group: str = ""
    user: str = ""
    password_secret: str = ""
    # MQTT brokers do not count deliveries or name messages: these are read from the payload's transport.
    max_bytes: Bytes = Bytes(256 * 2**20)


class SqsPlace(_Table, frozen=True, kw_only=True, tag="sqs"):
    """An SQS queue, standard or FIFO; credentials from boto3's chain. `endpoint` is for other servers than AWS's."""

    queue_url: Text
    endpoint: str = ""
    region: str = ""
    visibility: Seconds = Seconds(30)


class RedisPlace(_Table, frozen=True, kw_only=True, tag="redis"):
    """A Redis or Valkey stream and a consumer `group` on it; `max_length` trims the stream on writes."""

    url: Text = "redis://127.0.0.1:6379/0"
    stream: Text
    group: Text = "isthmus"
    claim_after: Seconds = Seconds(30)
    """Entries unacknowledged for this long go to another consumer."""
    max_length: Count | None = None
    password_secret: str = ""


class CallbackPlace(_Table, frozen=True, kw_only=True, tag="callback"):
    """An HTTP URL that gets each result by POST, signed where `signing_secret` names a secret.

    Addresses of private networks are refused unless `allow` lists their network, for example 10.0.0.0/8.
    """

    url: Text
    signing_secret: str = ""
    allow: tuple[str, ...] = ()


class ObjectPlace(_Table, frozen=True, kw_only=True, tag="objects"):
    """A folder, or objects at s3://, gs://, az:// or hdfs://; each result is an object, named by the message's id."""

    url: Text


Broker = NatsPlace | MqttPlace | SqsPlace | RedisPlace
Place = NatsPlace | MqttPlace | SqsPlace | RedisPlace | CallbackPlace | ObjectPlace


class RouterTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The router that serves the messages: at most `concurrency` at a time, each within `timeout`.

    `key_secret` is the name of a secret with the API key or token for it; without that secret none is sent.
    """

    url: Text = "http://127.0.0.1:8080/function/router"
    model: str = ""
    concurrency: Annotated[int, Meta(ge=1, le=1024)] = 8
    timeout: Seconds = Seconds(30)
    key_secret: str = "router-key"  # noqa: S105


class RecordsTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where states and results of calls are kept for `keep`: sqlite:PATH, nats://HOST:PORT/BUCKET, or objects at s3://,
    gs://, az:// or hdfs://.

    Triggers that share a consumer share records too: SQLite is for a single machine.
    """

    url: Text = "sqlite:.isthmus/trigger/records.sqlite"
    keep: Seconds = Seconds(86_400)
    credentials_secret: str = ""
    """As of a NATS place."""


class ClaimsTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The object store for bodies beyond a transport's limit: a folder, or an address at s3://, gs://, az:// or hdfs://.

    A body of more than `max_bytes` is refused; an object is removed `keep` after its write.
    """

    url: Text
    max_bytes: Bytes = Bytes(256 * 2**20)
    keep: Seconds = Seconds(86_400)


class SpoolTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The folder of requests that wait for an unreachable cloud, within `max_bytes`.

    `full` is the policy beyond: `refuse` leaves messages with their broker, `drop-oldest` gives up the oldest. The
    router tries to reach the tail for `wait` (in whole seconds). With `messages` whole messages wait too, where the
    router has no continuation for them.
    """

    folder: Text = ".isthmus/trigger/spool"
    max_bytes: Bytes = Bytes(2**30)
    full: Annotated[str, matching("(refuse|drop-oldest)")] = "refuse"
    wait: Seconds = Seconds(5)
    messages: bool = False


class TriggerConfiguration(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file.

    `order_by`, empty for no order, is `source`, `key` (the broker's own key of a message) or `header:NAME`: messages
    with an equal value are processed one after the other, as they came. After `max_attempts` failed attempts a message
    goes to `dead_letters`.
    """

    name: Annotated[str, matching("[a-z0-9-]{0,40}")] = ""
    """The trigger's name in records and headers; triggers of a name share their work. By default the source's."""
    source: Broker
    results: Annotated[tuple[Place, ...], Meta(max_length=16)] = ()
    dead_letters: Place | None = None
    router: RouterTable = RouterTable()
    records: RecordsTable = RecordsTable()
    claims: ClaimsTable | None = None
    spool: SpoolTable | None = None
    order_by: str = ""
    max_attempts: Annotated[int, Meta(ge=1, le=1000)] = 5
    retry_after: Seconds = Seconds(2)
    """The pause before a second attempt, doubled for each further attempt up to a minute."""
    max_work_bytes: Bytes = Bytes(256 * 2**20)
    """Bodies of messages in work at a time; a larger message is processed alone."""


def has_configuration(given: str, folder: Path) -> bool:
    """Whether a function in `folder` is configured; a file of another name than the default has to exist."""
    return given != DEFAULT_FILE or (folder / given).is_file()


def given_configuration(given: str, folder: Path, environment: dict[str, str]) -> TriggerConfiguration:
    """The configuration of the setting `trigger_config`: a path relative to `folder`, or the text itself.

    Raises:
        ConfigurationMalformed: as `read_configuration`.
    """
    # Every configuration assigns something, and no path of a file does.
    is_text = "=" in given
    if is_text:
        return parse_configuration(given, environment, "trigger_config")
    return read_configuration(folder / given, environment)


def read_configuration(path: Path | str, environment: dict[str, str]) -> TriggerConfiguration:
    """Read the file; `${NAME}` and `${NAME:-default}` in it are filled from `environment`.

    Raises:
        ConfigurationMalformed: absent, not TOML, an unknown or missing key, a value out of range, or a loop.
    """
    try:
        with Path(path).open("rb") as f:
            data = f.read(_MAX_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigurationMalformed(f"{path} cannot be read: {e}", where=str(path)) from e
    if len(data) > _MAX_BYTES:
        raise ConfigurationMalformed(f"{path} has more than {_MAX_BYTES} bytes", where=str(path))
    return parse_configuration(text, environment, str(path))


def parse_configuration(text: str, environment: dict[str, str], name: str = "trigger.toml") -> TriggerConfiguration:
    """As `read_configuration`, from the file's text.

    Raises:
        ConfigurationMalformed: as `read_configuration`.
    """
    try:
        configuration = msgspec.toml.decode(
            fill_variables(text, environment, name), type=TriggerConfiguration, dec_hook=decode_unit
        )
    except msgspec.DecodeError as e:  # of the syntax, or of a field, with its path
        raise ConfigurationMalformed(f"{name}: {e}", where=name, hint="see docs/reference/trigger.md") from e
    _check(configuration, name)
    return configuration


def fill_variables(text: str, environment: dict[str, str], name: str) -> str:
    """The text of the file `name` with the values of its `${VARIABLE}` and `${VARIABLE:-DEFAULT}`, except in comments.

    Raises:
        ConfigurationMalformed: a variable without a default is not set.
    """

    def value(match: re.Match[str]) -> str:
        found = environment.get(match[1]) or match[2]
        if found is None:
            raise ConfigurationMalformed(
                f"{name} takes ${{{match[1]}}} from the environment, where it is not set", where=match[1]
            )
        return found

    # Comments may show the syntax.
    lines = (line if line.lstrip().startswith("#") else _VARIABLE.sub(value, line) for line in text.splitlines())
    return "\n".join(lines)


def _check(configuration: TriggerConfiguration, name: str) -> None:
    """Rules between fields and in texts."""
    order_by, spool, router = configuration.order_by, configuration.spool, configuration.router
    rules = [
        (is_url(router.url), "router.url", "is no http URL"),
        (
            order_by in ("", "source", "key") or (order_by.startswith("header:") and order_by != "header:"),
            "order_by",
            "is none of `source`, `key` and `header:NAME`",
        ),
        (configuration.records.keep >= 1, "records.keep", "is less than 1s"),
        *_broker_rules("source", configuration.source),
        *(rule for i, place in enumerate(configuration.results) for rule in _broker_rules(f"results[{i}]", place)),
        *_broker_rules("dead_letters", configuration.dead_letters),
    ]
    if spool is not None:
        is_long = 1 <= spool.wait <= router.timeout
        rules += [
            (spool.max_bytes >= MIN_SPOOL_BYTES, "spool.max_bytes", "is less than 1MiB"),
            (is_long, "spool.wait", f"is not between 1s and router.timeout, {router.timeout:g}s"),
        ]
    for holds, where, fault in rules:
        if not holds:
            hint = f"see {where.rpartition('.')[2]} in docs/reference/trigger.md"
            raise ConfigurationMalformed(f"{name}: {where} {fault}", where=where, hint=hint)


def _broker_rules(table: str, place: Any) -> list[tuple[bool, str, str]]:
    """Whether a rule holds, the key, and what is wrong where it does not; clients would say less, or later."""
    match place:
        case NatsPlace():
            is_subject = all(re.fullmatch(r"[^\s*>]+|\*|>", token) for token in place.subject.split("."))
            is_last = ">" not in place.subject[:-1]
            return [
                (_are_urls(place.url, ("nats", "tls")), f"{table}.url", "is not nats://HOST:PORT or tls://HOST:PORT"),
                (is_subject and is_last, f"{table}.subject", "is no subject of NATS, such as photos.* or photos.>"),
                (bool(_NATS_NAME.fullmatch(place.durable)), f"{table}.durable", _NATS_NAME_RULE),
                (bool(_NATS_NAME.fullmatch(place.stream or "-")), f"{table}.stream", _NATS_NAME_RULE),
                (place.ack_wait >= 1, f"{table}.ack_wait", "is less than 1s"),
            ]
        case MqttPlace():
            return [
                (
                    _are_urls(place.url, ("mqtt", "mqtts")),
                    f"{table}.url",
                    "is not mqtt://HOST:PORT or mqtts://HOST:PORT",
                ),
                (bool(place.user or not place.password_secret), f"{table}.user", "is missing beside password_secret"),
            ]
        case RedisPlace():
            return [
                (
                    place.url.startswith("unix://") or _are_urls(place.url, ("redis", "rediss")),
                    f"{table}.url",
                    "is not redis://HOST:PORT/DATABASE or rediss://HOST:PORT/DATABASE",
                ),
                # redis-py takes these from a URL, where nobody looks for them.
                (
                    not re.search(r"[?&]ssl_(cert_reqs|check_hostname)=", place.url),
                    f"{table}.url",
                    "turns the verification of certificates off or changes it; give the CA by SSL_CERT_FILE",
                ),
                (place.claim_after >= 1, f"{table}.claim_after", "is less than 1s"),
            ]
        case SqsPlace():
            is_queue = is_url(place.queue_url) and place.queue_url.count("/") >= 4
            return [
                (is_queue, f"{table}.queue_url", "is not https://SERVER/ACCOUNT/QUEUE, as SQS states a queue's URL"),
                (is_url(place.endpoint or place.queue_url), f"{table}.endpoint", "is no http URL"),
                (place.visibility >= 1, f"{table}.visibility", "is less than 1s"),
            ]
    return []


def _are_urls(text: str, schemes: tuple[str, ...]) -> bool:
    """Whether `text` is a URL with one of these schemes, a host and a valid port, or several with commas."""
    try:
        parts = [urlsplit(url.strip()) for url in text.split(",")]
        return all(part.scheme in schemes and part.hostname and part.port != 0 for part in parts)
    except ValueError:  # of a port
        return False


def decode_unit(kind: type[Any], text: Any) -> Any:
    """A `Seconds` or `Bytes` from its text; msgspec turns the ValueError into its own, with the field's path."""
    if not isinstance(text, str):
        raise ValueError('it is a text with a unit, such as "30s" or "256MiB"')
    if kind is Bytes:
        return Bytes(parse_size(text))
    days = text.removesuffix("d")
    if days != text and days.isascii() and days.isdigit() and len(days) <= 4:
        return Seconds(86_400 * int(days))
    return Seconds(parse_duration(text))


def where_of(place: Any) -> str:
    """The place in messages to people: the kind and its address, without credentials."""
    document = msgspec.to_builtins(place, enc_hook=str)
    address = document.get("queue_url") or document.get("url", "")
    name = document.get("subject") or document.get("topic") or document.get("stream") or ""
    return f"{document['kind']} {re.sub('//[^/@]*@', '//', address)} {name}".rstrip()
