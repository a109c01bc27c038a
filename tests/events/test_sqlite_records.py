"""Records in an SQLite file: several threads and processes, a full disk, a locked file, files of others."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isthmus.errors import ConfigurationMalformed, ResultStoreUnavailable, StoreDamaged
from isthmus.events.stores import sqlite, sqlite_file
from isthmus.events.stores.sqlite import SCHEMA_VERSION, SqliteRecords
from support.patience import LONG_S


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "records.sqlite"


@pytest.fixture
def records(path: Path) -> Iterator[SqliteRecords]:
    store = SqliteRecords(path)
    yield store
    store.close()


def test_a_value_is_written_only_over_the_version_that_was_read(records: SqliteRecords) -> None:
    first = records.create("a", b"1")
    assert first
    assert records.create("a", b"2") is None
    second = records.update("a", b"2", first)
    assert second
    assert records.update("a", b"3", first) is None
    assert records.get("a") == (b"2", second)
    assert not records.delete("a", first)
    assert records.delete("a", second)
    assert records.get("a") is None


def test_a_version_never_comes_back_with_a_key(records: SqliteRecords) -> None:
    first = records.create("a", b"1")
    assert first
    assert records.delete("a", first)
    assert records.create("a", b"1") != first


def test_records_and_versions_outlive_the_process(path: Path, records: SqliteRecords) -> None:
    version = records.create("a", b"1", durable=False)
    again = SqliteRecords(path)
    assert again.get("a") == (b"1", version)
    again.close()


def test_of_many_threads_that_create_a_key_one_does(records: SqliteRecords) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda i: (i % 50, records.create(f"k{i % 50}", b"x")), range(400)))
    assert sorted(key for key, version in made if version) == list(range(50))
    assert sorted(records.keys()) == sorted(f"k{i}" for i in range(50))


def test_two_processes_count_together_without_losing_a_step(path: Path, records: SqliteRecords) -> None:
    records.create("n", b"0")
    script = """
import sys
from isthmus.events.stores.sqlite import SqliteRecords
records, left = SqliteRecords(sys.argv[1]), 100
while left:
    value, version = records.get("n")
    left -= records.update("n", str(int(value) + 1).encode(), version, durable=False) is not None
"""
    running = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(2)]
    assert [p.wait(LONG_S) for p in running] == [0, 0]
    stored = records.get("n")
    assert stored
    assert stored.value == b"200"


def test_keys_are_read_in_pages(records: SqliteRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_KEYS_PER_READ", 3)
    names = [f"k{i}" for i in range(7)]
    for name in names:
        records.create(name, b"", durable=False)
    assert list(records.keys()) == names


def test_a_sweep_removes_what_was_written_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_SWEEP_ROWS", 2)
    now = 1000.0
    records = SqliteRecords(path, clock=lambda: now)
    for i in range(5):
        records.create(f"old{i}", b"")
    version = records.create("renewed", b"")
    assert version
    now = 1100.0
    records.update("renewed", b"1", version)
    records.create("new", b"")
    assert records.sweep(50) == 5
    assert sorted(records.keys()) == ["new", "renewed"]
    records.close()


def test_a_full_disk_is_an_error_and_leaves_the_records_as_they_were(path: Path, records: SqliteRecords) -> None:
    version = records.create("a", b"1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name(path.name + "-wal").stat().st_size, limits[1]))
    try:
        with pytest.raises(ResultStoreUnavailable, match="disk"):
            records.create("b", os.urandom(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert records.get("a") == (b"1", version)
    assert records.get("b") is None
    assert records.create("b", b"2")


def test_a_file_that_another_program_locks_is_an_error(
    path: Path, records: SqliteRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(sqlite_file, "_BUSY_S", 0.05)
    with pytest.raises(ResultStoreUnavailable, match="locked"):
        SqliteRecords(path)
    other.execute("ROLLBACK")
    other.close()
    assert records.create("a", b"1")


def test_the_file_is_for_its_owner_alone(path: Path, records: SqliteRecords) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE photos (id)")
    other.close()
    with pytest.raises(ConfigurationMalformed, match=f"schema 0; this release reads {SCHEMA_VERSION}"):
        SqliteRecords(path)


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpeg"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(StoreDamaged, match="not a database"):
        SqliteRecords(path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResultStoreUnavailable, match="file"):
        SqliteRecords(tmp_path / "file" / "records.sqlite")


def test_a_killed_writer_leaves_every_record_that_it_reported(path: Path, records: SqliteRecords) -> None:
    script = """
import itertools, sys
from isthmus.events.stores.sqlite import SqliteRecords
records = SqliteRecords(sys.argv[1])
for i in itertools.count():
    records.create(f"k{i}", b"x" * 1000, durable=False)
    print(i, flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    for _ in range(50):
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    with writer.stdout:
        reported = [last, *(int(line) for line in writer.stdout.read().split("\n")[:-1])]
    writer.wait(LONG_S)
    assert all(records.get(f"k{i}") for i in range(reported[-1] + 1))
