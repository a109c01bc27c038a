"""The spool on a real disk: order, bounds, a full disk, a kill, a damaged file."""

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

from isthmus.errors import ConfigurationMalformed, SpoolFull
from isthmus.events.configuration import MIN_SPOOL_BYTES as MIN_BYTES
from isthmus.events.message import CONTINUATION, Message
from isthmus.events.spool import EventSpool
from isthmus.pipeline import continuation
from support.patience import LONG_S

BODY = b"x" * 10_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def spool(folder: Path) -> Iterator[EventSpool]:
    opened = EventSpool(folder, MIN_BYTES)
    yield opened
    opened.close()


def ids(spool: EventSpool, after: int = 0) -> list[str]:
    return [entry.message.id for entry in spool.after(after, 1000, 2**30)]


def fill(spool: EventSpool) -> int:
    """Add entries until the bound; their number."""
    for number in range(10_000):
        try:
            spool.add(Message(BODY, f"f{number}"))
        except SpoolFull:
            return number
    raise AssertionError("the spool has no bound")


def disk_bytes(folder: Path) -> int:
    return (folder / "spool.sqlite").stat().st_size


def test_entries_come_back_whole_and_in_order(folder: Path, spool: EventSpool) -> None:
    message = Message(b"\0photo", "m0", "photos/ä", {"content-type": CONTINUATION, "x": "ü"}, "camera 1", 12.5)
    spool.add(message, "lane")
    spool.add(Message(b"", "m1"))
    spool.close()
    again = EventSpool(folder, MIN_BYTES)
    first, second = again.after(0, 10, 2**20)
    assert (first.message, first.lane, first.spooled_at > 0) == (message, "lane", True)
    assert (second.message, second.lane) == (Message(b"", "m1"), None)
    again.close()


def test_the_media_type_is_that_of_continuations() -> None:
    assert CONTINUATION == continuation.CONTENT_TYPE


def test_an_id_waits_once(spool: EventSpool) -> None:
    assert spool.add(Message(b"1", "m"))
    assert not spool.add(Message(b"2", "m"))
    assert [entry.message.body for entry in spool.after(0, 10, 2**20)] == [b"1"]
    assert len(spool) == 1


def test_ids_and_lanes_are_known_while_entries_wait(spool: EventSpool) -> None:
    spool.add(Message(b"", "m"), "a")
    assert (spool.contains("m"), spool.contains("n")) == (True, False)
    assert (spool.has_lane("a"), spool.has_lane("b")) == (True, False)
    assert spool.remove("m")
    assert not spool.remove("m")
    assert not spool.contains("m")
    assert not spool.has_lane("a")
    assert len(spool) == 0


def test_entries_are_read_behind_a_number_within_bounds(spool: EventSpool) -> None:
    for i in range(6):
        spool.add(Message(bytes(100), f"m{i}"))
    first = spool.after(0, 2, 2**20)
    assert [entry.message.id for entry in first] == ["m0", "m1"]
    assert [entry.message.id for entry in spool.after(first[-1].seq, 10, 250)] == ["m2", "m3"]
    assert [entry.message.id for entry in spool.after(first[-1].seq, 10, 50)] == ["m2"]


def test_numbers_never_come_back(spool: EventSpool) -> None:
    spool.add(Message(b"", "m"))
    (first,) = spool.after(0, 1, 1)
    spool.remove("m")
    spool.add(Message(b"", "n"))
    assert ids(spool, first.seq) == ["n"]


def test_of_many_threads_each_adds_its_own(spool: EventSpool) -> None:
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda i: spool.add(Message(b"", f"m{i % 40}")), range(80)))
    assert sum(added) == len(spool) == len(ids(spool)) == 40


def test_the_bound_is_of_the_file_and_nothing_is_lost_beyond(folder: Path, spool: EventSpool) -> None:
    count = fill(spool)
    assert ids(spool) == [f"f{i}" for i in range(count)]
    # Most of the bound is bodies: what an entry takes beside its body is known too closely to waste much.
    assert count * len(BODY) > 0.7 * MIN_BYTES
    assert spool.status().bytes <= MIN_BYTES
    spool.close()
    assert disk_bytes(folder) <= MIN_BYTES


def test_small_entries_keep_within_the_bound_too(folder: Path, spool: EventSpool) -> None:
    def fill_up() -> None:
        for i in range(100_000):
            spool.add(Message(b"y" * 100, f"{i:0100d}"), f"lane {i}")

    with pytest.raises(SpoolFull):
        fill_up()
    spool.close()
    assert disk_bytes(folder) <= MIN_BYTES


def test_a_removed_entry_makes_room(spool: EventSpool) -> None:
    count = fill(spool)
    spool.remove("f0")
    assert spool.add(Message(BODY, "new"))
    assert ids(spool) == [*(f"f{i}" for i in range(1, count)), "new"]


@pytest.mark.parametrize(("size", "of"), [(MIN_BYTES - 50_000, "bound"), (MIN_BYTES, "entry")])
def test_what_never_fits_is_told_from_what_does_not_fit_now(spool: EventSpool, size: int, of: str) -> None:
    fill(spool)
    with pytest.raises(SpoolFull) as e:
        spool.add(Message(bytes(size), "m"))
    assert (e.value.facts["of"], e.value.facts["limit"]) == (of, MIN_BYTES)


def test_an_emptied_spool_gives_its_disk_back(folder: Path) -> None:
    spool = EventSpool(folder, 8 * MIN_BYTES)
    count = fill(spool)
    for i in range(count):
        spool.remove(f"f{i}")
    assert disk_bytes(folder) + (folder / "spool.sqlite-wal").stat().st_size < 3 * 2**20
    assert spool.status().bytes < 2**16
    spool.close()


def test_a_full_disk_refuses_and_keeps_what_was_added(folder: Path) -> None:
    spool = EventSpool(folder, 2**30)
    spool.add(Message(b"1", "m0"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (disk_bytes(folder) + 2**20, limits[1]))
    try:
        for i in range(1, 10):
            spool.add(Message(os.urandom(50_000), f"m{i}"))
        with pytest.raises(SpoolFull, match="the disk of the spool is full"):
            spool.add(Message(os.urandom(2**20), "large"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ids(spool) == [f"m{i}" for i in range(10)]
    assert spool.add(Message(b"", "new"))
    spool.close()


def test_a_killed_process_leaves_every_entry_that_it_reported(folder: Path) -> None:
    script = """
import itertools, sys
from isthmus.events.message import Message
from isthmus.events.spool import EventSpool
spool = EventSpool(sys.argv[1], 2**30)
for i in itertools.count():
    spool.add(Message(b"x" * 1000, f"m{i}"))
    print(i, flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    for _ in range(30):
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    with writer.stdout:
        reported = [last, *(int(line) for line in writer.stdout.read().split("\n")[:-1])]
    writer.wait(LONG_S)
    spool = EventSpool(folder, 2**30)
    assert ids(spool)[: reported[-1] + 1] == [f"m{i}" for i in range(reported[-1] + 1)]
    assert len(spool) == len(ids(spool))
    spool.close()


def test_two_triggers_do_not_share_a_spool(folder: Path, spool: EventSpool) -> None:
    with pytest.raises(ConfigurationMalformed, match="another running trigger's"):
        EventSpool(folder, MIN_BYTES)
    spool.add(Message(b"", "m"))
    spool.close()
    again = EventSpool(folder, MIN_BYTES)
    assert ids(again) == ["m"]
    again.close()


def test_what_can_be_read_of_a_damaged_file_is_taken_over(
    folder: Path, spool: EventSpool, caplog: pytest.LogCaptureFixture
) -> None:
    count = fill(spool)
    spool.close()
    file = folder / "spool.sqlite"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = os.urandom(20_000)
    file.write_bytes(data)
    again = EventSpool(folder, 2 * MIN_BYTES)
    assert "the spool is damaged" in caplog.text
    assert next(path.name for path in folder.glob("damaged-*.sqlite")) in caplog.text
    assert 0.5 * count < len(again) == len(ids(again)) < count
    assert again.add(Message(b"", "new"))
    again.close()


def test_a_file_that_is_no_database_is_moved_aside(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    (folder / "spool.sqlite").write_bytes(b"no database" * 1000)
    spool = EventSpool(folder, MIN_BYTES)
    assert len(spool) == 0
    (aside,) = folder.glob("damaged-*.sqlite")
    assert aside.read_bytes().startswith(b"no database")
    assert "0 entries are taken over" in caplog.text
    spool.close()


def test_a_spool_of_a_newer_release_is_refused_and_left_alone(folder: Path, spool: EventSpool) -> None:
    spool.close()
    with sqlite3.connect(folder / "spool.sqlite") as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(ConfigurationMalformed, match="schema 99"):
        EventSpool(folder, MIN_BYTES)
    # The lock of the refused one is free again.
    with pytest.raises(ConfigurationMalformed, match="schema 99"):
        EventSpool(folder, MIN_BYTES)


def test_the_age_is_that_of_the_oldest_entry(folder: Path) -> None:
    now = 1000.0
    spool = EventSpool(folder, MIN_BYTES, clock=lambda: now)
    assert spool.status().oldest_s == 0
    spool.add(Message(b"", "m0"))
    now = 1010.0
    spool.add(Message(b"", "m1"))
    assert (spool.status().entries, spool.status().oldest_s) == (2, 10.0)
    spool.remove("m0")
    assert spool.status().oldest_s == 0
    spool.close()


def test_the_file_is_for_its_owner_alone(folder: Path, spool: EventSpool) -> None:
    assert (folder / "spool.sqlite").stat().st_mode & 0o777 == 0o600
