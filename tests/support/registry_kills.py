"""Publishers, promoters and collectors that are killed at any moment, and what must hold of the registry then."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from isthmus.artifacts.alias import Alias
from isthmus.artifacts.bundle import Blob
from isthmus.errors import RegistryError, RegistryMissing, RegistryUnavailable
from isthmus.registry import FolderStore, Registry, RetryPolicy
from isthmus.registry.blob_copies import verify_blob, version_content
from isthmus.registry.collection import collect
from isthmus.security.audit import AuditLog
from support.fake_bundles import Fake, make_bundle, variant
from support.paths import ROOT
from support.patience import LONG_S
from support.s3_server import store_at

# Longer than a publish of these small bundles takes on a busy machine: leases and content of this age are abandoned.
ABANDONED_S = 3.0
_RETRIES = RetryPolicy(attempts=4, timeout_s=LONG_S)
ALL = ("publish", "promote", "gc")


@dataclass(frozen=True)
class Place:
    """A registry: a folder, or a prefix at the endpoint of an S3 server."""

    folder: str = ""
    endpoint: str = ""
    prefix: str = ""

    def open(self) -> Registry:
        store = (
            store_at(self.endpoint, self.prefix, retry_policy=_RETRIES) if self.endpoint else FolderStore(self.folder)
        )
        return Registry(store, _RETRIES)


@dataclass(frozen=True)
class Job:
    """What a process does until it is killed or has done `turns` changes; acknowledged changes are lines of `log`."""

    place: Place
    files: str
    log: str
    seed: int
    kinds: Sequence[str] = ALL
    turns: int = 10**6

    def run(self) -> None:
        registry, chance = self.place.open(), random.Random(self.seed)
        fake = make_bundle(Path(self.files) / str(self.seed), lengths=(3000, 50, 0, 9000))
        for turn in range(self.turns):
            with suppress(RegistryUnavailable):  # a collection while others publish, and the other way round
                self._change(registry, fake, chance, turn)

    def _change(self, registry: Registry, fake: Fake, chance: random.Random, turn: int) -> None:
        kind = chance.choice(self.kinds)
        if kind == "publish" or not is_there(registry):
            # A manifest of its own, for collections to find where the publish is killed.
            version = registry.publish(variant(fake, f"{self.seed}-{turn}").bundle, fake.files)
            self._acknowledge(f"version {version.version} {version.digest}")
        elif kind == "promote":
            version = chance.choice(registry.versions("fake"))
            move = registry.move_alias("fake", "live", version.version, moved_by=f"{self.seed}-{turn}")
            if move.moved:
                self._acknowledge(f"move {move.after.counter} {move.after.number}")
        else:
            collect(registry, ABANDONED_S)

    def _acknowledge(self, line: str) -> None:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)


class Nursery:
    """A process that has imported everything and forks one for each job: a start takes milliseconds."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.registry_kills"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def start(self, job: Job) -> int:
        """Begin a job; returns its process's id."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({**asdict(job), "place": asdict(job.place)}), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


def nursery() -> None:
    """Fork a process for each line of standard input, a job; print its id."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended children leave at once
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                document = json.loads(line)
                Job(**{**document, "place": Place(**document["place"])}).run()
                status = 0
            finally:
                os._exit(status)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def is_alive(pid: int) -> bool:
    """Whether a process has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(pids: Sequence[int]) -> None:
    """Wait until the processes have ended."""
    while any(map(is_alive, pids)):
        time.sleep(0.002)


@dataclass
class Killer:
    """Rounds of two processes each over one registry, killed after a random time; every round is checked."""

    nursery: Nursery
    place: Place
    files: str
    log: str
    seed: int = 0
    rounds: int = 0
    killed: int = 0
    problems: list[str] = field(default_factory=list)

    def round(self, longest_s: float) -> None:
        """Two jobs; the end of either comes at any moment of its work."""
        self.rounds += 1
        chance = random.Random(f"{self.seed} {self.rounds}")
        seeds = [1000 * self.rounds + self.seed, 1000 * self.rounds + self.seed + 500]
        pids = [self.nursery.start(Job(self.place, self.files, self.log, seed)) for seed in seeds]
        time.sleep(chance.uniform(0.02, longest_s))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.killed += 1
        wait_for(pids)
        self.problems += [f"round {self.rounds}: {problem}" for problem in problems(self.place.open(), self.log)]


def problems(registry: Registry, log: str) -> list[str]:
    """What is wrong with a registry after kills; nothing, if all is as promised."""
    acknowledged = [line.split() for line in Path(log).read_text().splitlines()] if Path(log).exists() else []
    if not is_there(registry):
        return ["the acknowledged model is gone"] if acknowledged else []
    versions = {version.version: version.digest for version in registry.versions("fake")}
    found = [f"version {n} is incomplete: {e}" for n, d in versions.items() if (e := _damage(registry, d))]
    if len(set(versions.values())) != len(versions):
        found.append("one bundle has two numbers")
    for alias in registry.aliases("fake"):
        found += _alias_problems(registry, alias, versions)
    for kind, first, second in acknowledged:
        if kind == "version" and versions.get(first) != second:
            found.append(f"the acknowledged version {first} is lost")
        if kind == "move" and _document(registry, int(first)) != second:
            found.append(f"the acknowledged move {first} is lost")
    return found


def audit_problems(registry: Registry) -> list[str]:
    """Changes without exactly one entry in the audit log, once lost entries are recovered, and breaks of the chain."""
    if not is_there(registry):
        return []
    documents = [each for each in registry.alias_documents("fake") if each.counter]
    versions = [(v.name, v.version, v.digest) for v in registry.versions("fake")]
    registry.changes.recover(versions, documents, settled_s=0)
    log = AuditLog(registry.store, registry.retry_policy)
    entries = [(e.what, e.facts) for e in log.entries()]
    moves = sorted((str(f["alias"]), int(f["counter"])) for what, f in entries if what in ("promote", "rollback"))
    numbers = sorted(str(f["version"]) for what, f in entries if what == "publish")
    found = []
    if moves != sorted((each.alias, each.counter) for each in documents):
        found.append(f"moves in the audit log: {moves}")
    if numbers != sorted(number for _, number, _ in versions):
        found.append(f"publications in the audit log: {numbers}")
    if (check := log.verify()).broken is not None:
        found.append(f"the audit log breaks: {check.broken}")
    return found


def is_there(registry: Registry) -> bool:
    """Whether any version was numbered before the kills."""
    try:
        return "fake" in registry.models()
    except RegistryMissing:
        return False


def _alias_problems(registry: Registry, alias: str, versions: dict[str, str]) -> list[str]:
    present, history = registry.alias("fake", alias), registry.alias_history("fake", alias)
    documents = [present, *history]
    found = []
    if [each.counter for each in documents] != list(range(present.counter, 0, -1)):
        found.append(f"{alias} has a gap: {[each.counter for each in documents]}")
    found += [f"{alias} meant {each.number}" for each in documents if versions.get(each.number) != each.digest]
    return found


def _document(registry: Registry, counter: int) -> str:
    documents: list[Alias] = [registry.alias("fake", "live"), *registry.alias_history("fake", "live")]
    return next((each.number for each in documents if each.counter == counter), "")


def _damage(registry: Registry, digest: str) -> str:
    try:
        for blob in version_content(registry, digest).values():
            verify_blob(registry, Blob(blob.digest, blob.size))
    except RegistryError as e:
        return e.message
    return ""


if __name__ == "__main__":
    # Imported once, before the forks.
    import boto3  # noqa: F401

    nursery()
