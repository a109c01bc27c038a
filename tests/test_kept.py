"""What a function keeps to be refined: bounded in bytes and time, the newest, whoever asks at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from isthmus.codecs.layers import Held
from isthmus.codecs.refining import Known
from isthmus.kept import LONGEST_S, Kept


def held(number: int, size: int = 1000) -> Held:
    return Held(number.to_bytes(16, "little"), b"", Known(0, np.full(size, number % 100, np.int8)))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_was_kept_is_found_and_nothing_else() -> None:
    kept = Kept()
    kept.keep(held(1))
    one = held(2)._replace(key=held(1).key)
    kept.keep(one)
    assert kept.find(one.key) is one
    for key in (held(2).key, b"", held(1).key[:15], held(1).key + b"\0"):
        assert kept.find(key) is None


def test_the_newest_stay_and_no_more_bytes_than_allowed() -> None:
    kept = Kept(max_bytes=10_000)
    for i in range(100):
        kept.keep(held(i))
        assert kept.nbytes <= 10_000
        assert kept.find(held(i).key) is not None
    found = [i for i in range(100) if kept.find(held(i).key) is not None]
    assert found == list(range(94, 100))


def test_what_is_kept_again_is_new_and_counts_once() -> None:
    kept = Kept(max_bytes=10_000)
    for i in (1, 2, 3, 4, 5, 6, 1):
        kept.keep(held(i))
    size = kept.nbytes
    kept.keep(held(1))
    assert kept.nbytes == size
    kept.keep(held(7))
    assert [i for i in range(1, 8) if kept.find(held(i).key) is not None] == [1, 3, 4, 5, 6, 7]


def test_what_alone_is_too_much_is_not_kept_and_drives_nothing_out() -> None:
    kept = Kept(max_bytes=10_000)
    kept.keep(held(1))
    kept.keep(held(2, 10_000))
    assert kept.find(held(1).key) is not None
    assert kept.find(held(2).key) is None
    kept.keep(held(1, 20_000))
    assert kept.find(held(1).key) is None
    assert kept.nbytes == 0


def test_many_small_ones_are_bounded_too() -> None:
    kept = Kept(max_bytes=100_000)
    for i in range(2000):
        kept.keep(held(i, 1))
    assert sum(kept.find(held(i).key) is not None for i in range(2000)) < 200


def test_nothing_is_kept_for_longer_than_said(clock: Clock) -> None:
    kept = Kept(longest_s=60.0, clock=clock)
    kept.keep(held(1))
    clock.now = 30.0
    kept.keep(held(2))
    clock.now = 60.0
    assert kept.find(held(1).key) is not None, "finding does not make it newer"
    clock.now = 60.1
    assert kept.find(held(1).key) is None
    assert kept.find(held(2).key) is not None
    clock.now = 90.1
    kept.keep(held(3))
    assert kept.nbytes == 1000 + 512
    assert LONGEST_S == 60.0


def test_many_threads_at_once_find_what_they_kept_and_count_right() -> None:
    kept, roomy = Kept(max_bytes=400_000), Kept(max_bytes=16 * 300 * 1512)
    missed: list[int] = []

    def work(start: int) -> None:
        for i in range(start, start + 300):
            kept.keep(held(i))
            roomy.keep(held(i))
            found = roomy.find(held(i).key)
            if found is None or found.known.numbers[0] != i % 100:
                missed.append(i)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not missed
    assert roomy.nbytes == 16 * 300 * 1512
    left = [i for n in range(16) for i in range(1000 * n, 1000 * n + 300) if kept.find(held(i).key) is not None]
    assert kept.nbytes == len(left) * (1000 + 512) <= 400_000
