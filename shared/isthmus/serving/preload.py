"""What a function opens and loads at start: the segments of the setting `preload`, sessions, a draft model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.context import Deadline
from isthmus.errors import SettingsError
from isthmus.pipeline import Hop, exit_branch
from isthmus.registry import Registry, open_cache
from isthmus.settings import RouterSettings, SegmentSettings

if TYPE_CHECKING:  # a router with remote hops alone never loads onnxruntime
    from isthmus.runtime.session_store import SessionStore
    from isthmus.runtime.store import SegmentStore
    from isthmus.serving.drafts import Drafts

# Bound on loading a segment; a slow link to the registry takes minutes for a large model.
MAX_LOAD_S = 600.0
_ENDS = ("head", "tail")


def load_deadline() -> Deadline:
    """The deadline of loading a segment at start, from now."""
    return Deadline.after(MAX_LOAD_S)


def parse_entry(entry: str) -> tuple[str, str]:
    """A preload entry's model reference and segment: `m:3@head` is (`m:3`, `head`); without a segment, the whole model.

    Raises:
        SettingsError: no model stands before the `@`, or no segment's id, head or tail after it.
    """
    reference, at, segment = entry.partition("@")
    try:
        if not reference:
            raise ValueError("it names no model")
        if segment in _ENDS:
            return reference, segment
        return reference, SegmentId.parse(segment) if at else WHOLE
    except ValueError as e:
        raise SettingsError(
            f"the setting preload holds {entry!r}; an entry is NAME[:VERSION][@SEGMENT]: {e}",
            variable="preload",
            value=entry,
        ) from e


def segment_id(bundle: Bundle, segment: str) -> SegmentId:
    """The id that `segment` means in `bundle`: `head` and `tail` are the ends of its default partition.

    Raises:
        Missing: the bundle lacks the segment.
    """
    if segment in _ENDS:
        return bundle.partition()[0 if segment == "head" else -1].id
    return bundle.segment(segment).id


def open_sessions(settings: SegmentSettings, registry: Registry) -> SessionStore:
    """The store of a hop in the router's own process."""
    from isthmus.runtime.session_store import open_store

    return open_store(open_cache(settings, registry), settings)


def open_drafts(settings: RouterSettings, registry: Registry, hop: Hop) -> Drafts | None:
    """The draft model of the settings, if they name one, on `hop`."""
    if not settings.draft:
        return None
    from isthmus.serving.drafts import Drafts  # routers without drafts need none of its imports

    return Drafts(settings.draft, registry, hop)


def preload(entries: tuple[str, ...], registry: Registry, store: SegmentStore) -> None:
    """Load every entry, a head with its exit; an entry in memory takes no time.

    Raises:
        RegistryError, SegmentError: the first that cannot be loaded.
    """
    for reference, segment in map(parse_entry, entries):
        resolved = registry.resolve(reference)
        wanted = segment_id(resolved.bundle, segment)
        store.runner(resolved.digest, wanted, load_deadline())
        if (branch := exit_branch(resolved.bundle, wanted.stop)) is not None and not wanted.start:
            store.runner(resolved.digest, branch.segment.id, load_deadline())
