"""Files that are written aside before they are renamed into place; what a killed process left of them is swept."""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from isthmus.errors import RegistryUnavailable


class Staging:
    """A folder of files that are being written, each under an exclusive flock(2) of its writer.

    The lock ends with its process, however that ends: a file that nobody locks was left behind. The first file of each
    Staging is preceded by a sweep. Where locks do not reach other machines, a sweep may take another machine's file,
    which costs that publisher a retry.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._swept = False
        self._lock = threading.Lock()

    @contextmanager
    def file(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new empty file, open; its name is removed at the block's end, unless it was renamed.

        Raises:
            RegistryUnavailable: it was taken away before the block's end, which a retry mends.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep_once()
        path, f = self._create()
        try:
            yield path, f
        except FileNotFoundError as e:
            if os.fstat(f.fileno()).st_nlink:
                raise
            raise RegistryUnavailable(f"{path} was swept while it was written", registry=str(self._folder)) from e
        finally:
            # The lock is held until the name is gone: a sweep in between would find nothing of ours.
            path.unlink(missing_ok=True)
            f.close()

    def _create(self) -> tuple[Path, BinaryIO]:
        while True:
            descriptor, name = tempfile.mkstemp(dir=self._folder)
            f = open(descriptor, "wb")  # noqa: SIM115 - closed by its user, with the lock
            with suppress(OSError):  # some shares have no locks; there nothing is swept either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return Path(name), f
            f.close()  # another process swept it before it was locked

    def _sweep_once(self) -> None:
        with self._lock:
            swept, self._swept = self._swept, True
        if swept:
            return
        for path in self._folder.iterdir():
            # Someone else's file that may not be opened, or one that is gone by now, is none of ours.
            with suppress(OSError):
                _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == path.stat(follow_symlinks=False).st_ino:
            path.unlink()
    finally:
        os.close(descriptor)
