"""The versions that an alias meant earlier, oldest first: the targets of rollbacks."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.registry.blobs import BlobStore
from isthmus.registry.retry_policy import RetryPolicy

MAX_MOVES = 50
"""Entries kept of one alias; older ones are removed."""
_MAX_BYTES = 64


@dataclass(frozen=True)
class EarlierVersion:
    """A version that an alias meant, and its place in the history."""

    place: int
    version: str


class AliasHistory:
    """The histories of a registry's aliases: a key for each move, which holds the version meant before it."""

    def __init__(self, store: BlobStore, retry_policy: RetryPolicy) -> None:
        self._store, self._retry = store, retry_policy

    def add(self, name: str, alias: str, version: str) -> None:
        """Note that the alias meant `version` until now."""
        places = self._places(name, alias)
        place = places[-1] + 1 if places else 1
        # Two moves at the same time get a place each.
        while not self._store.put_if_absent(_key(name, alias, place), version.encode()):
            place += 1
        for old in places[:-MAX_MOVES]:
            self._delete(name, alias, old)

    def earlier(self, name: str, alias: str) -> list[EarlierVersion]:
        """The versions that the alias meant, oldest first."""
        return [EarlierVersion(place, self._version(name, alias, place)) for place in self._places(name, alias)]

    def forget_from(self, name: str, alias: str, place: int) -> None:
        """Remove the entries from `place` on: they have been undone."""
        for later in self._places(name, alias):
            if later >= place:
                self._delete(name, alias, later)

    def _places(self, name: str, alias: str) -> list[int]:
        prefix = f"models/{name}/moves/{alias}/"
        texts = [key.removeprefix(prefix) for key in self._store.list(prefix)]
        return sorted(int(text) for text in texts if text.isascii() and text.isdecimal())

    def _version(self, name: str, alias: str, place: int) -> str:
        data = self._retry(lambda: self._store.get(_key(name, alias, place), max_bytes=_MAX_BYTES))
        return data.decode("ascii", "replace").strip()

    def _delete(self, name: str, alias: str, place: int) -> None:
        self._retry(lambda: self._store.delete(_key(name, alias, place)))


def _key(name: str, alias: str, place: int) -> str:
    return f"models/{name}/moves/{alias}/{place}"
