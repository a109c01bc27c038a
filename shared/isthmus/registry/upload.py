"""Content on its way up, sent once and read back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import Missing
from isthmus.registry.blobs import BlobStore
from isthmus.registry.content import blob_key, corrupt, file_digest
from isthmus.registry.patience import Patience

_READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Upload:
    """Puts content under its digest.

    Not every server notices a bit that flipped on the way, and content of the right length is never sent again: so what
    arrived is read once and hashed.
    """

    store: BlobStore
    patience: Patience

    def file(self, digest: str, path: Path | None) -> None:
        """Store a file, unless content of its length is there under its digest.

        Raises:
            Missing: there is no file, and the store has no such content.
            Corrupt: the file does not hash to `digest`, or does not arrive as it is.
        """
        there = self.patience(lambda: self.store.size(blob_key(digest)))
        if path is None or not path.is_file():
            if there is None:
                raise Missing(
                    f"content {digest} is neither given nor in {self.store.url}", kind="blob", name=digest, exists=[]
                )
            return
        # Content of another length is what an interrupted copy left behind.
        if there == path.stat().st_size:
            return
        if file_digest(path) != digest:
            raise corrupt(str(path), digest)
        self.patience(lambda: self._send(digest, path))

    def data(self, digest: str, data: bytes) -> None:
        """Store bytes.

        Raises:
            Corrupt: they do not arrive as they are.
        """

        def one_try() -> None:
            self.store.put(blob_key(digest), data)
            if self.store.get(blob_key(digest), max_bytes=len(data)) != data:
                raise corrupt(self.store.url, digest)

        self.patience(one_try)

    def _send(self, digest: str, path: Path) -> None:
        key, size, found = blob_key(digest), path.stat().st_size, hashlib.sha256()
        self.store.put_file(key, path)
        for start in range(0, size, _READ_BYTES):
            found.update(self.store.read(key, start, min(start + _READ_BYTES, size)))
        if f"sha256:{found.hexdigest()}" != digest:
            self.store.delete(key)
            raise corrupt(self.store.url, digest)
