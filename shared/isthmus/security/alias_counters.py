"""The highest counter of each signed alias, remembered over restarts: an older document is refused as a rollback.

TUF calls this the rollback attack (specification, 1.5.2): an old document has a good signature, and only its reader's
memory tells that it is old. A function with an empty folder has no memory; there the expiry of a document is the bound.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from isthmus.artifacts.constraints import Count, Digest, Text
from isthmus.artifacts.json_documents import DocumentKind, builtins, canonical
from isthmus.errors import SettingsError, Untrusted
from isthmus.files import write_whole

# Only signed aliases enter, so that nobody without a key can displace an entry; the oldest leave first.
MAX_ALIASES = 4096
_MAX_FILE_BYTES = 4 * 2**20
FILE = "alias-counters.json"
"""In the cache folder itself: its subfolders hold what evictions remove."""


class SeenAlias(Struct, frozen=True, forbid_unknown_fields=True):
    """The counter of a document, and the digest of its bytes: two documents of one counter are a forked history."""

    counter: Count
    digest: Digest


class CountersDocument(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="isthmus.counters/1"):
    """The latest documents by registry, model and alias; the least recently moved first."""

    aliases: Annotated[dict[Text, SeenAlias], Meta(max_length=MAX_ALIASES)] = {}


COUNTERS = DocumentKind(CountersDocument, "counters", _MAX_FILE_BYTES, SettingsError)


class AliasCounters:
    """The counters in a folder; thread-safe, and processes may share the folder.

    Raises:
        SettingsError: the folder is not writable, or its file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._lock = folder / FILE, threading.Lock()
        self._seen: dict[str, SeenAlias] = {}
        # A read-only folder must stop the start: without memory an old alias would be taken.
        with self._exclusive():
            self._seen = self._read()

    def accept(self, place: str, counter: int, digest: str) -> None:
        """Take a document of the alias at `place`, and remember it.

        Raises:
            Untrusted: a later document, or another one of the same counter, was taken before; reason `rolled_back`.
            SettingsError: as the constructor.
        """
        with self._lock:
            seen = SeenAlias(counter, digest)
            if self._seen.get(place) == seen:
                return
            with self._exclusive():
                # Another process may have seen a later document.
                self._seen = self._read()
                self._refuse_earlier(place, seen)
                self._seen.pop(place, None)
                self._seen[place] = seen
                for oldest in list(self._seen)[:-MAX_ALIASES]:
                    del self._seen[oldest]
                self._write()

    def _refuse_earlier(self, place: str, document: SeenAlias) -> None:
        latest = self._seen.get(place)
        if latest is None or latest.counter < document.counter or latest == document:
            return
        forked = latest.counter == document.counter
        raise Untrusted(
            f"the alias {place} has the counter {document.counter}, and "
            + ("another document" if forked else f"a document of the counter {latest.counter}")
            + " was taken before",
            reason="rolled_back",
            alias=place,
            counter=document.counter,
            latest=latest.counter,
            hint="somebody put an old alias back: move it again, signed (isthmus promote). If the registry itself was"
            f" set up anew, remove {self._path}",
        )

    def _read(self) -> dict[str, SeenAlias]:
        try:
            with self._path.open("rb") as f:
                return dict(COUNTERS.decode(f.read(_MAX_FILE_BYTES + 1)).aliases)
        except FileNotFoundError:
            return {}
        except SettingsError as e:
            # Not begun anew: whoever damages the file would have old aliases taken.
            raise SettingsError(
                f"{self._path}, the memory of signed aliases, is damaged: {e.message}",
                variable="cache_dir",
                value=str(self._path.parent),
                hint=f"remove {self._path} if no older alias than today's may be in the registry",
            ) from e

    def _write(self) -> None:
        write_whole(self._path, canonical(builtins(CountersDocument(self._seen))))

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.with_suffix(".lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as e:
            raise SettingsError(
                f"the setting cache_dir is {str(self._path.parent)!r}, where the counters of signed aliases cannot be"
                f" kept: {e.strerror}",
                variable="cache_dir",
                value=str(self._path.parent),
                hint="set cache_dir to a folder that this process's user may write to",
            ) from e
