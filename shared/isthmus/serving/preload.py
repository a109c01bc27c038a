"""Loading at start what the settings name: NAME[:VERSION][@SEGMENT]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.artifacts.bundle import WHOLE, Bundle
from isthmus.context import Deadline
from isthmus.errors import SettingsError
from isthmus.registry import Registry

if TYPE_CHECKING:  # a router whose hops are all remote never loads onnxruntime
    from isthmus.runtime.store import SegmentStore

MAX_LOAD_S = 600.0


def parse(entry: str) -> tuple[str, str]:
    """A preload entry's model reference and segment: `m:3@head` is (`m:3`, `head`); without one, the whole model.

    Raises:
        SettingsError: names nothing on one side of the `@`.
    """
    reference, at, segment = entry.partition("@")
    if not reference or (at and not segment):
        raise SettingsError(
            f"the setting preload holds {entry!r}; an entry is NAME[:VERSION][@SEGMENT]",
            variable="preload",
            value=entry,
        )
    return reference, segment or WHOLE


def segment_id(bundle: Bundle, segment: str) -> str:
    """The id that `segment` means in `bundle`: `head` and `tail` are the ends of its default partition.

    Raises:
        Missing: the bundle has no such segment.
    """
    if segment in ("head", "tail"):
        return bundle.partition()[0 if segment == "head" else -1].id
    return bundle.segment(segment).id


def preload(entries: tuple[str, ...], registry: Registry, store: SegmentStore) -> None:
    """Load every entry; what is loaded already costs nothing.

    Raises:
        RegistryError, SegmentError: the first that cannot be loaded.
    """
    for reference, segment in map(parse, entries):
        found = registry.resolve(reference)
        store.runner(found.digest, segment_id(found.bundle, segment), Deadline.after(MAX_LOAD_S))
