"""Start of a function: preloading in the background, and readiness until it is done."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.context import Deadline
from isthmus.errors import IsthmusError, NotReady, SettingsError
from isthmus.registry import Registry

if TYPE_CHECKING:  # a router whose hops are all remote never loads onnxruntime
    from isthmus.runtime.store import SegmentStore

MAX_LOAD_S = 600.0
_ENDS = ("head", "tail")
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 15.0


class Readiness:
    """Runs `prepare` in a thread until it succeeds once; before that, `check` refuses.

    The process does not end where the registry is down or a model is not published yet, since the platform would
    restart it into the same. Failures are logged, stated in the 503 responses, and tried again.
    """

    def __init__(self, prepare: Callable[[], None], log: logging.Logger) -> None:
        self._prepare = prepare
        self._log = log
        self._ready, self._closed = threading.Event(), threading.Event()
        self._reason, self._hint = "loading", ""

    def start(self) -> None:
        """Start the thread; called once, after everything that `prepare` uses was created."""
        threading.Thread(target=self._run, name="prepare", daemon=True).start()

    def close(self) -> None:
        """Stop trying; an attempt under way goes on to its end."""
        self._closed.set()

    @property
    def ready(self) -> bool:
        """Whether everything that the settings preload is loaded."""
        return self._ready.is_set()

    def check(self) -> None:
        """Refuse requests until the function is ready.

        Raises:
            NotReady: with the reason and the time to ask again.
        """
        if not self._ready.is_set():
            raise NotReady(f"not ready: {self._reason}", retry_after_s=1, hint=self._hint)

    def _run(self) -> None:
        wait_s = _FIRST_WAIT_S
        while not self._closed.is_set():
            try:
                self._prepare()
            except IsthmusError as e:
                self._reason, self._hint = e.message, e.hint
                facts = {"error": e.message, "again_in_s": wait_s} | ({"hint": e.hint} if e.hint else {})
                self._log.warning("not ready", extra={"facts": facts})
            except Exception as e:
                self._reason, self._hint = "an unexpected error; the log has it", ""
                self._log.error("not ready: %s", type(e).__name__, exc_info=True)
            else:
                self._ready.set()
                self._log.info("ready")
                return
            self._closed.wait(wait_s)
            wait_s = min(_MAX_WAIT_S, wait_s * 2)


def parse_entry(entry: str) -> tuple[str, str]:
    """A preload entry's model reference and segment: `m:3@head` is (`m:3`, `head`); without one, the whole model.

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
        Missing: the bundle has no such segment.
    """
    if segment in _ENDS:
        return bundle.partition()[0 if segment == "head" else -1].id
    return bundle.segment(segment).id


def preload(entries: tuple[str, ...], registry: Registry, store: SegmentStore) -> None:
    """Load every entry; what is loaded already costs nothing.

    Raises:
        RegistryError, SegmentError: the first that cannot be loaded.
    """
    for reference, segment in map(parse_entry, entries):
        found = registry.resolve(reference)
        store.runner(found.digest, segment_id(found.bundle, segment), Deadline.after(MAX_LOAD_S))
