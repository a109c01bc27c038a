"""Results as objects in a folder or a bucket, each named by its message's id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.errors import (
    BrokerRefused,
    BrokerUnavailable,
    Corrupt,
    RegistryError,
    RegistryUnavailable,
)
from isthmus.events.broker import check_size
from isthmus.events.message import REASON, Message
from isthmus.registry import BlobStore

MAX_BODY_BYTES = 2**30
"""S3 takes up to 5 GB in one request, whose body is in memory."""
_SUFFIXES = {"application/json": ".json", "text/plain": ".txt", "image/jpeg": ".jpg", "image/png": ".png"}


class ObjectPublisher:
    """Writes each message once: a repetition finds the object of its id and changes nothing.

    The body is the object, and the content type shows in the name's suffix. Headers of a dead letter, with its reason,
    are a second object, NAME.headers.json; headers of results are not stored.
    """

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def max_bytes(self) -> int:
        return MAX_BODY_BYTES

    def check(self) -> None:
        """See `isthmus.events.broker.Reachable.check`."""
        with _translated(self.url):
            self._store.exists("check")

    def publish(self, message: Message) -> None:
        """Write the object; the store's own retries apply.

        Raises:
            MessageTooLarge: beyond MAX_BODY_BYTES.
            BrokerUnavailable: the store does not answer, or its disk is full.
            BrokerRefused: the store refuses credentials, or there is no such bucket.
        """
        check_size(message, MAX_BODY_BYTES)
        key = object_key(message)
        with _translated(self.url):
            # The headers first, so that no dead letter is without its reason.
            if REASON in message.headers:
                self._store.put_if_absent(f"{key}.headers.json", json.dumps(dict(message.headers)).encode())
            self._store.put_if_absent(key, message.body)

    def close(self) -> None:
        """No-op: the store belongs to its opener."""


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Errors of a store as a broker's."""
    try:
        yield
    except (RegistryUnavailable, Corrupt) as e:
        raise BrokerUnavailable(e.message, broker=url) from e
    except RegistryError as e:
        raise BrokerRefused(e.message, broker=url, hint=e.hint) from e


def object_key(message: Message) -> str:
    """The key of a message's object: its id, and a suffix for the content types of results."""
    # A key of a store starts with a letter, a digit or an underscore, an id may start with a hyphen.
    name = f"_{message.id}" if message.id.startswith("-") else message.id
    is_json = message.content_type.endswith("+json")
    return name + _SUFFIXES.get("application/json" if is_json else message.content_type, ".bin")
