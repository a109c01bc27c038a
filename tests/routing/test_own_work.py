"""The router's own work: CPU time beside what other estimates know, at the speed of the process."""

from __future__ import annotations

import threading
import time

import pytest

from isthmus.routing import own_work
from isthmus.routing.own_work import OwnWork


class Cpu(threading.local):
    """CPU time of each thread, as the test has it pass."""

    now = 0.0

    def thread_time(self) -> float:
        return self.now


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Cpu:
    clock = Cpu()
    monkeypatch.setattr(own_work, "time", clock)
    return clock


def request(cpu: Cpu, work: OwnWork, cpu_s: float, named_s: float = 0.0, answers: int = 1) -> None:
    began = cpu.now
    work.begin()
    cpu.now += cpu_s + named_s
    work.named(named_s)
    work.end(began, answers)


def test_named_work_is_not_the_routers_own(cpu: Cpu) -> None:
    work = OwnWork()
    assert work.seconds == 0
    request(cpu, work, 0.01, named_s=0.03)
    assert work.seconds == pytest.approx(0.01)


def test_a_wait_is_no_work() -> None:
    work = OwnWork()
    began = time.thread_time()
    work.begin()
    time.sleep(0.05)
    work.end(began, 1)
    assert work.seconds < 0.02


def test_a_batch_counts_by_its_answers(cpu: Cpu) -> None:
    work = OwnWork()
    request(cpu, work, 0.04, answers=4)
    assert work.seconds == pytest.approx(0.01)


def test_a_slow_process_takes_longer_for_its_own_work_too(cpu: Cpu) -> None:
    work = OwnWork()
    request(cpu, work, 0.01)
    alone = work.seconds
    for _ in range(20):
        work.ran(0.08, 0.02)  # a quarter of a CPU
        work.ran(0.5, 0.0)  # in the thread of another request
    assert work.seconds == pytest.approx(4 * alone, rel=0.01)
    for _ in range(200):
        work.ran(0.02, 0.021)  # no slower than its CPU time
    assert work.seconds == pytest.approx(alone, rel=0.05)


def test_requests_of_other_threads_are_apart(cpu: Cpu) -> None:
    work = OwnWork()
    work.begin()
    other = threading.Thread(target=request, args=(cpu, work, 0.03, 0.02))
    other.start()
    other.join()
    assert work.seconds == pytest.approx(0.03)
    cpu.now += 0.01
    work.end(0.0, 1)
    # A twentieth of the way to this thread's 10 ms, of which the other's named work is no part.
    assert work.seconds == pytest.approx(0.03 - 0.05 * 0.02)
