"""What a runner asks for: a segment's files on this machine, held for as long as they are mapped."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from isthmus.artifacts.bundle import Blob, Bundle, Segment

Progress = Callable[[int, int], None]
"""Called with the bytes fetched so far and those to fetch in all."""


class Located:
    """A segment on this machine: `path` is its .onnx file, with its weights beside it.

    The files stay until `release`, the end of a `with` block, the end of this object or of the process.
    """

    def __init__(self, path: Path, segment: Segment, bundle: Bundle, pin: int | None = None) -> None:
        self.path = path
        self.segment = segment
        self.bundle = bundle
        self._release = weakref.finalize(self, os.close, pin) if pin is not None else None

    def release(self) -> None:
        """Let the files go, once nothing maps them; a second call does nothing."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class SegmentSource(Protocol):
    """Where segments come from: a cache before a registry, or a folder baked into the image."""

    def bundle(self, digest: str) -> Bundle:
        """The bundle of that digest.

        Raises:
            RegistryError: Missing, or any other reason why it cannot be had.
        """
        ...

    def blob(self, blob: Blob) -> bytes:
        """A small blob's bytes, such as a codec's table, verified.

        Raises:
            RegistryError: Missing, or any other reason why it cannot be had.
        """
        ...

    def locate(self, bundle_digest: str, segment_id: str) -> Located:
        """The segment's files, complete and verified.

        Raises:
            RegistryError: Missing, or any other reason why they cannot be had.
        """
        ...
