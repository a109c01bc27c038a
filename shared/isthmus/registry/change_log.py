"""Changes of a registry in its audit log: publications, moves of aliases, removals, collections.

An entry follows its change, so that no entry tells of a change that failed. A writer killed in between leaves a change
without an entry, which the next collection appends: versions and aliases' documents name all that happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from isthmus.artifacts.alias import Alias
from isthmus.registry.blobs import BlobStore
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.security.audit import AuditEntry, AuditLog, local_user

PUBLISH, PROMOTE, ROLLBACK, REMOVE_ALIAS, REMOVE, COLLECT = "publish", "promote", "rollback", "rm alias", "rm", "gc"
SETTLED_S = 60.0
"""An entry follows its move within milliseconds; this is longer than any retry of the append."""
_MOVES = (PROMOTE, ROLLBACK, REMOVE_ALIAS)


class ChangeLog:
    """The audit log of the registry in `store`; an empty `who` is the user of this process."""

    def __init__(self, store: BlobStore, retry_policy: RetryPolicy) -> None:
        self._log = AuditLog(store, retry_policy)

    def published(self, who: str, name: str, version: str, digest: str) -> None:
        """A bundle got a number."""
        self._append(who, PUBLISH, {"model": name, "version": version, "digest": digest})

    def moved(self, document: Alias, before: str) -> None:
        """An alias was moved to what `document` says; `before` is the version that it meant, empty for none."""
        self._append(document.moved_by, _kind(document), {**_facts(document), "before": before})

    def removed(self, who: str, name: str, version: str, digest: str) -> None:
        """A version was removed."""
        self._append(who, REMOVE, {"model": name, "version": version, "digest": digest})

    def collected(self, who: str, blobs: int, size: int) -> None:
        """Content that nothing reaches was removed; units: `size` in bytes."""
        self._append(who, COLLECT, {"blobs": blobs, "bytes": size})

    def recover(
        self, versions: Iterable[tuple[str, str, str]], documents: Iterable[Alias], settled_s: float = SETTLED_S
    ) -> int:
        """Append the entries that killed writers left out; returns their count.

        `versions` are models' names, numbers and digests, `documents` those of all aliases and their histories; moves
        of the last `settled_s` seconds are left to their writers.
        """
        before = datetime.now(UTC) - timedelta(seconds=settled_s)
        published, moved = set[tuple[str, str]](), set[tuple[str, str, str]]()
        for entry in self._log.entries():
            facts = entry.facts
            if entry.what == PUBLISH:
                published.add((str(facts.get("model")), str(facts.get("version"))))
            elif entry.what in _MOVES:
                moved.add((str(facts.get("model")), str(facts.get("alias")), str(facts.get("counter"))))
        count = 0
        for name, version, digest in versions:
            if (name, version) not in published:
                facts = {"model": name, "version": version, "digest": digest, "recovered": True}
                count += self._recovered("", PUBLISH, facts, ("model", "version"))
        for document in documents:
            settled = document.moved_at is not None and document.moved_at <= before
            if settled and (document.name, document.alias, str(document.counter)) not in moved:
                facts = {**_facts(document), "recovered": True}
                count += self._recovered(document.moved_by, _kind(document), facts, ("model", "alias", "counter"))
        return count

    def _recovered(self, who: str, what: str, facts: dict[str, Any], names: Sequence[str]) -> bool:
        """Whether this call appended the entry: collections at the same time recover it once."""

        def same(entry: AuditEntry) -> bool:
            return entry.what == what and all(entry.facts.get(name) == facts[name] for name in names)

        return self._log.append_once(who or local_user(), what, facts, same) is not None

    def _append(self, who: str, what: str, facts: dict[str, Any]) -> None:
        self._log.append(who or local_user(), what, facts)


def _kind(document: Alias) -> str:
    if document.version is None:
        return REMOVE_ALIAS
    return PROMOTE if document.restores is None else ROLLBACK


def _facts(document: Alias) -> dict[str, Any]:
    facts = {
        "model": document.name,
        "alias": document.alias,
        "version": document.number,
        "digest": document.digest or "",
        "counter": document.counter,
    }
    if document.canary is not None:
        facts |= {"canary": str(document.canary.version), "share": document.canary.share}
    return facts
