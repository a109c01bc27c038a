"""Content on its way up: each step sent and read back by itself, so that one that fails costs that step alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import Corrupt, Missing
from isthmus.registry.blobs import BlobStore
from isthmus.registry.content import blob_key, corrupt, file_digest
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.retries import RetryBudget

_READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Upload:
    """Puts content under its digest; all steps of one publish share a retry budget.

    Not every server notices a bit that flipped on the way, and content of the right length is never sent again: so what
    arrived is read once and compared.
    """

    store: BlobStore
    patience: RetryPolicy
    budget: RetryBudget

    def file(self, digest: str, path: Path | None) -> None:
        """Store a file, unless content of its length is there under its digest.

        Raises:
            Missing: there is no file, and the store has no such content.
            Corrupt: the file does not hash to `digest`, or does not arrive as it is.
            RegistryUnavailable: a step failed as often as it may, or the steps together.
        """
        there = self.patience(lambda: self.store.size(blob_key(digest)), self.budget)
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
        key = blob_key(digest)
        self._until_right(
            digest, lambda: self.store.put_file(key, path, self.budget), lambda: self._compare(digest, path)
        )

    def data(self, digest: str, data: bytes) -> None:
        """Store bytes.

        Raises:
            Corrupt: they do not arrive as they are.
        """

        key = blob_key(digest)
        self._until_right(
            digest,
            lambda: self.patience(lambda: self.store.put(key, data), self.budget),
            lambda: self._compare_step(digest, lambda: self.store.get(key, max_bytes=len(data)), data),
        )

    def _until_right(self, digest: str, send: Callable[[], None], compare: Callable[[], None]) -> None:
        """Send and compare; what arrived wrong cannot be mended in place, so that alone sends all of it again."""
        for left in reversed(range(max(1, self.patience.attempts))):
            send()
            try:
                compare()
            except Corrupt:
                self.patience(lambda: self.store.delete(blob_key(digest)), self.budget)
                if not left:
                    raise
            else:
                return

    def _compare(self, digest: str, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as f:
            for start in range(0, size, _READ_BYTES):
                self._compare_range(digest, start, f.read(_READ_BYTES))

    def _compare_range(self, digest: str, start: int, sent: bytes) -> None:
        stop = start + len(sent)
        self._compare_step(digest, lambda: self.store.read(blob_key(digest), start, stop), sent)

    def _compare_step(self, digest: str, read: Callable[[], bytes], sent: bytes) -> None:
        def one_try() -> None:
            if read() != sent:
                raise corrupt(self.store.url, digest)

        self.patience(one_try, self.budget)
