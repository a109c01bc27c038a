"""Slots and their queue: who is worked on, who waits, who is refused, in threads as a server's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from isthmus.admission import Slots, describe_work, slot_released
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, HopBusy, Overloaded, RequestMalformed
from support.patience import LONG_S, eventually


class Clock:
    """A clock that tests move; deadlines are on the process's own, so it starts there."""

    def __init__(self) -> None:
        self.now = Deadline.after(0.0).at

    def __call__(self) -> float:
        return self.now


class Requests:
    """Requests in threads of their own, which work until they are let go."""

    def __init__(self, slots: Slots, pool: ThreadPoolExecutor) -> None:
        self.slots, self._pool = slots, pool
        self.order: list[str] = []
        self._gates: dict[str, threading.Event] = {}

    def start(self, name: str, *, caller: str | None = None, seconds: float = LONG_S) -> Future[float]:
        """Begin a request; returns once it is in work, in the queue or refused."""
        self._gates[name] = threading.Event()
        before = (self.slots.queued, self.slots.working, sum(self.slots.refused().values()))
        future = self._pool.submit(self._run, name, caller, seconds)
        eventually(lambda: (self.slots.queued, self.slots.working, sum(self.slots.refused().values())) != before)
        return future

    def end(self, *names: str) -> None:
        for name in names:
            eventually(lambda name=name: name in self.order)  # type: ignore[misc]
            self._gates[name].set()

    def _run(self, name: str, caller: str | None, seconds: float) -> float:
        with self.slots.admitted(Deadline.after(seconds), caller=caller, work="w") as waited_s:
            self.order.append(name)
            assert self._gates[name].wait(LONG_S)
            return waited_s


@contextmanager
def requests(slots: Slots) -> Iterator[Requests]:
    with ThreadPoolExecutor(64) as pool:
        yield Requests(slots, pool)
    assert (slots.working, slots.queued) == (0, 0)


def taught(slots: Slots, clock: Clock, seconds: float, times: int = 30) -> None:
    """Let the slots learn that requests take `seconds`."""
    for _ in range(times):
        with slots.admitted(Deadline.after(LONG_S), work="w"):
            clock.now += seconds
    clock.now = Deadline.after(0.0).at


def test_a_request_waits_for_a_slot_and_gets_it() -> None:
    slots = Slots(1, max_queued=1)
    with requests(slots) as all_of_them:
        first, second = all_of_them.start("first"), all_of_them.start("second")
        assert (slots.working, slots.queued) == (1, 1)
        all_of_them.end("first", "second")
        assert first.result(LONG_S) == 0.0
        assert second.result(LONG_S) > 0.0
    assert slots.refused() == {"full": 0, "share": 0, "deadline": 0, "late": 0}


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    clock = Clock()
    slots = Slots(2, max_queued=3, clock=clock)
    taught(slots, clock, 4.0)
    with requests(slots) as all_of_them:
        names = [f"{i}" for i in range(5)]
        for name in names:
            all_of_them.start(name)
        with pytest.raises(Overloaded) as e, slots.admitted(Deadline.after(LONG_S), work="w"):
            pass
        # Three requests of 4 s over two slots.
        assert e.value.facts["retry_after_s"] == 6
        all_of_them.end(*names)
    assert slots.refused()["full"] == 1


def test_a_request_that_would_miss_its_deadline_is_refused_at_once() -> None:
    clock = Clock()
    slots = Slots(1, max_queued=8, clock=clock)
    taught(slots, clock, 1.0)
    with requests(slots) as all_of_them:
        all_of_them.start("first")
        with pytest.raises(Overloaded, match="before its deadline") as e, slots.admitted(Deadline.after(1.5), work="w"):
            pass
        assert e.value.facts["retry_after_s"] == 1
        patient = all_of_them.start("patient")
        all_of_them.end("first", "patient")
        patient.result(LONG_S)
    assert slots.refused()["deadline"] == 1


def test_estimates_refuse_nobody_while_a_slot_is_free() -> None:
    """They may be of an earlier time; only a request that runs can show that."""
    clock = Clock()
    slots = Slots(1, max_queued=8, clock=clock)
    taught(slots, clock, 100.0)
    with slots.admitted(Deadline.after(0.5), work="w"):
        pass


def test_a_request_leaves_the_queue_when_its_deadline_can_no_longer_be_met() -> None:
    slots = Slots(1, max_queued=8)
    with requests(slots) as all_of_them:
        all_of_them.start("first")
        waiting = all_of_them.start("waiting", seconds=0.1)
        with pytest.raises(DeadlineExceeded, match="waited"):
            waiting.result(LONG_S)
        assert slots.queued == 0
        all_of_them.end("first")
    assert all_of_them.order == ["first"], "work on a request past its deadline is not begun"
    assert slots.refused()["late"] == 1


def test_a_request_past_its_deadline_is_not_begun_with_a_free_slot() -> None:
    slots = Slots(1)
    with pytest.raises(DeadlineExceeded), slots.admitted(Deadline.after(0.0)):
        pass
    assert slots.working == 0


def test_the_earliest_deadline_goes_first() -> None:
    slots = Slots(1, max_queued=8)
    with requests(slots) as all_of_them:
        all_of_them.start("first")
        all_of_them.start("late", seconds=LONG_S)
        all_of_them.start("soon", seconds=LONG_S / 2)
        all_of_them.end("first", "soon", "late")
    assert all_of_them.order == ["first", "soon", "late"]


def test_a_greedy_caller_does_not_starve_a_modest_one() -> None:
    slots = Slots(1, max_queued=16)
    with requests(slots) as all_of_them:
        greedy = [f"greedy {i}" for i in range(9)]
        for name in greedy:
            all_of_them.start(name, caller="greedy")
        refused = all_of_them.start("greedy too many", caller="greedy")
        with pytest.raises(Overloaded, match="share"):
            refused.result(LONG_S)
        all_of_them.start("modest", caller="modest")
        all_of_them.end("greedy 0")
        eventually(lambda: len(all_of_them.order) >= 2)
        all_of_them.end(all_of_them.order[1])
        eventually(lambda: "modest" in all_of_them.order)
        all_of_them.end("modest", *greedy)
    assert all_of_them.order.index("modest") <= 2
    assert slots.refused()["share"] == 1


def test_a_request_back_from_the_registry_goes_before_the_queue() -> None:
    slots = Slots(2, max_queued=4, adaptive=True)
    with requests(slots) as all_of_them, slots.admitted(Deadline.after(LONG_S)):
        all_of_them.start("other")
        with slot_released():
            all_of_them.start("next")
            assert slots.working == 2
            all_of_them.end("other")
            eventually(lambda: slots.working == 1)
        assert slots.working == 2
        all_of_them.end("next")


def test_waits_for_the_registry_are_no_service_time() -> None:
    clock = Clock()
    slots = Slots(1, max_queued=8, clock=clock)
    taught(slots, clock, 1.0)
    for _ in range(50):
        with slots.admitted(Deadline.after(LONG_S), work="w"), slot_released():
            clock.now += 1000.0
    assert slots._services["w"].mean_s == pytest.approx(1.0)


def test_the_limit_learns_from_kinds_of_work_and_from_refusals_of_others() -> None:
    clock = Clock()
    slots = Slots(64, max_queued=8, adaptive=True, clock=clock)
    assert slots._adaptive is not None

    def one(detail: str, seconds: float, error: Exception | None) -> None:
        clock.now += 0.01
        with slots.admitted(Deadline.after(1e6), work="w"):
            describe_work(detail)
            clock.now += seconds
            if error is not None:
                raise error

    for _ in range(100):
        one("a", 0.1, None)
    assert slots._adaptive.baseline("w a") == pytest.approx(0.1)
    assert slots._adaptive.baseline("w b") is None
    before = slots.limit
    for _ in range(100):
        with pytest.raises(RequestMalformed):
            one("a", 1.0, RequestMalformed("the caller's mistake"))
    assert slots.limit == before
    for _ in range(100):
        with pytest.raises(HopBusy):
            one("a", 1.0, HopBusy("busy", hop="h"))
    assert slots.limit < before


def test_a_request_that_took_two_routes_is_of_a_kind_of_its_own() -> None:
    clock = Clock()
    slots = Slots(64, adaptive=True, clock=clock)
    assert slots._adaptive is not None
    for details, seconds in ((["a"], 0.1), (["b"], 0.2), (["a", "b"], 1.2), (["b", "b"], 0.2)):
        with slots.admitted(Deadline.after(LONG_S), work="w"):
            for detail in details:
                describe_work(detail)
            clock.now += seconds
    assert slots._adaptive.baseline("w b") == pytest.approx(0.2)
    assert slots._adaptive.baseline("w a b") == pytest.approx(1.2)


def test_names_of_work_are_bounded() -> None:
    slots = Slots(1)
    for i in range(1000):
        with slots.admitted(Deadline.after(LONG_S), work=f"w{i}"):
            pass
    assert len(slots._services) == 256


def test_a_hundred_callers_lose_no_slot() -> None:
    slots = Slots(3, max_queued=50, adaptive=True)
    done, refused = list[float](), list[Exception]()

    def one(i: int) -> None:
        try:
            with slots.admitted(Deadline.after(0.05 if i % 3 else LONG_S), caller=str(i % 5), work="w") as waited_s:
                if i % 7 == 0:
                    raise RequestMalformed("no")
                done.append(waited_s)
        except (Overloaded, DeadlineExceeded, RequestMalformed) as e:
            refused.append(e)

    with ThreadPoolExecutor(60) as pool:
        list(pool.map(one, range(2000)))
    assert len(done) + len(refused) == 2000
    assert (slots.working, slots.queued, slots._queue.cost_s) == (0, 0, 0.0)
