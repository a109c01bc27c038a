"""Every test ends what it started: threads, processes, sockets and temporary files of its own.

What outlives its test runs into the next one: a thread that draws from the global `random` while Hypothesis makes its
examples, a server that holds a port, a child that takes the processor. A test that shares a fixture with others of its
module (an engine that starts replicas, an app that loads a segment on its first request) is looked at with its module,
once the module's fixtures have ended; every other test by itself.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from isthmus.registry import S3Store
from isthmus.registry.cloud import CloudStore
from isthmus.registry.hdfs import HdfsStore
from isthmus.registry.lookups import Lookups
from isthmus.routing.catalog import ModelCatalog
from isthmus.routing.guard import Guard
from isthmus.runtime.store import SegmentStore
from isthmus.serving.app import FunctionApp

GRACE_S = 20.0
"""How long what was told to end may take; nothing waits where nothing is left."""

_COLLECT_AFTER_S = 0.2
"""Most of what is left at first is about to end; a collection takes up to two seconds."""

LIBRARY_PORTS: set[int] = set()
"""Ports of servers to which a library keeps connections for the process, and has no call that closes them."""

_WIDE: set[str] = set()
"""Names of the fixtures of a wider scope than a test."""
_OURS = frozenset({"nothing_left_by_the_module", "tmp_path_factory", "torch_cache"})


class _Children:
    """This process's children, looked up only after something was started: reading all of /proc takes 10 ms."""

    def __init__(self) -> None:
        self._started = 0
        self._looked_up_at, self._found = -1, frozenset[str]()
        sys.addaudithook(self._count)

    def now(self) -> set[str]:
        """The children and theirs, each with its command."""
        if not self._found and self._started == self._looked_up_at:
            return set()
        self._looked_up_at = self._started
        found = set()
        for child in psutil.Process().children(recursive=True):
            try:
                command = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if "multiprocessing.resource_tracker" not in command:  # Python's own; it ends with this process
                found.add(f"{child.pid} {command[:200]}")
        self._found = frozenset(found)
        return found

    def _count(self, event: str, _: tuple[Any, ...]) -> None:
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
            self._started += 1


_CHILDREN = _Children()


class _Closables:
    """The apps and stores that were made and not closed yet: tests make hundreds, each with threads or connections."""

    def __init__(self, *kinds: type[Any]) -> None:
        self._made: list[Any] = []
        for kind in kinds:
            kind.__init__ = self._noting(kind.__init__)

    def mark(self) -> int:
        """How many there are now."""
        return len(self._made)

    def close_since(self, mark: int) -> None:
        """Close those that were made after that mark."""
        while len(self._made) > mark:
            self._made.pop().close()

    def _noting(self, init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def noting(made: Any, *arguments: Any, **options: Any) -> None:
            init(made, *arguments, **options)
            self._made.append(made)

        return noting


_CLOSABLES = _Closables(CloudStore, FunctionApp, Guard, HdfsStore, Lookups, ModelCatalog, S3Store, SegmentStore)


class _Held:
    """What this process holds at one moment, to be compared with later ones."""

    _of_the_session: tuple[set[Any], ...] = (set(), set(), set())

    def __init__(self) -> None:
        self._before = self._now()

    def more(self) -> dict[str, list[str]]:
        """What is held now, was not then, and belongs to no fixture of the session; after some grace."""
        start, collected = time.monotonic(), False
        while True:
            sets = zip(self._now(), self._before, self._of_the_session, strict=True)
            found = [sorted(map(str, now - before - lasting)) for now, before, lasting in sets]
            left = {kind: each for kind, each in zip(("threads", "processes", "sockets"), found, strict=True) if each}
            waited_s = time.monotonic() - start
            if not left or (collected and waited_s > GRACE_S):
                return left
            if not collected and waited_s >= _COLLECT_AFTER_S:  # what only a cycle holds ends with it
                gc.collect()
                collected = True
            time.sleep(0.02)

    def belongs_to_the_session(self) -> None:
        """Nobody need end what has come since then before the session does."""
        for lasting, now, before in zip(self._of_the_session, self._now(), self._before, strict=True):
            lasting |= now - before

    @staticmethod
    def _now() -> tuple[set[Any], ...]:
        # tqdm, which torch's export shows progress with, keeps one thread for the process.
        threads = {t for t in threading.enumerate() if t.name != "tqdm_monitor"}
        return threads, _CHILDREN.now(), _sockets()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
    if fixturedef.scope == "function":
        return (yield)
    _WIDE.add(fixturedef.argname)
    held = _Held()
    result = yield
    if fixturedef.scope == "session":
        held.belongs_to_the_session()
    return result


@pytest.fixture(scope="session", autouse=True)
def torch_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give torch a cache folder of the session.

    torch makes it at some import or export of the process, by default in the temporary folder, so any test could be
    the one that leaves it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("torchinductor")))
        yield


@pytest.fixture(scope="module", autouse=True)
def nothing_left_by_the_module() -> Iterator[None]:
    """Fail a module whose fixtures and tests leave a thread, a process or a socket behind."""
    held, mark = _Held(), _CLOSABLES.mark()
    yield
    _CLOSABLES.close_since(mark)
    if left := held.more():
        pytest.fail(f"this module's tests left behind: {left}")


@pytest.fixture(autouse=True)
def nothing_left_over(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fail a test that leaves a temporary file behind or, by itself, a thread, a process or a socket."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    held, mark = None if _WIDE.intersection(request.fixturenames) - _OURS else _Held(), _CLOSABLES.mark()
    yield
    _CLOSABLES.close_since(mark)
    left = held.more() if held is not None else {}
    if files := _after_grace(lambda: sorted(p.name for p in folder.iterdir())):
        left["temporary files"] = files
    if left:
        pytest.fail(f"this test left behind: {left}")


def _after_grace(look: Callable[[], list[str]]) -> list[str]:
    """What is still there once the grace is over, or once nothing is."""
    end = time.monotonic() + GRACE_S
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def _sockets() -> set[str]:
    """The sockets that this process has open, by inode; without those that a library caches for the process."""
    peers = ((each.fd, each.raddr) for each in psutil.Process().net_connections()) if LIBRARY_PORTS else ()
    cached = {descriptor for descriptor, peer in peers if peer and peer[1] in LIBRARY_PORTS}
    found = set()
    for name in os.listdir("/proc/self/fd"):
        if int(name) in cached:
            continue
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found
