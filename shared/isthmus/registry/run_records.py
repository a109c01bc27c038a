"""Records that segments were loaded and run: what an alias may mean by a command.

A record names a segment's content, its weights file and its graph, so that a version with the same segments needs no
further run.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.json_documents import canonical
from isthmus.errors import RegistryMissing
from isthmus.registry.registry import Registry
from isthmus.security.audit import local_user


def never_run(store: Registry, bundle: Bundle) -> list[Segment]:
    """The segments, exit branches and variants without a record of a run."""
    try:
        recorded = set(store.store.list(_folder(bundle)))
    except RegistryMissing:  # the first publish makes a registry's folder
        recorded = set()
    return [segment for segment in bundle.runnable.values() if _key(bundle, segment) not in recorded]


def record_runs(store: Registry, bundle: Bundle, segments: Iterable[Segment]) -> None:
    """Record that these segments were loaded and run."""
    data = canonical({"at": datetime.now(UTC).isoformat(), "by": local_user()})
    for segment in segments:
        key = _key(bundle, segment)
        store.retry_policy(lambda key=key: store.store.put(key, data))  # type: ignore[misc]


def _folder(bundle: Bundle) -> str:
    return f"runs/{_hex(bundle.weights.blob.digest)}/"


def _key(bundle: Bundle, segment: Segment) -> str:
    return f"{_folder(bundle)}{_hex(segment.graph.digest)}"


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
