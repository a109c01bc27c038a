"""The fair queue: callers take turns, of one caller the earliest deadline goes first, and memory is bounded."""

from __future__ import annotations

import itertools

from isthmus.admission.queue import MAX_CALLERS, FairQueue, Waiter

NUMBERS = itertools.count()


def add(queue: FairQueue, caller: str | None, latest_start: float = 10.0, cost_s: float = 1.0) -> Waiter:
    waiter = Waiter(latest_start, next(NUMBERS), caller, cost_s)
    queue.add(waiter)
    return waiter


def order(queue: FairQueue) -> list[str | None]:
    callers = []
    while (waiter := queue.next()) is not None:
        callers.append(waiter.caller)
    return callers


def test_a_modest_caller_waits_for_one_turn_of_a_greedy_one() -> None:
    queue = FairQueue(100)
    for _ in range(20):
        add(queue, "greedy")
    add(queue, "modest")
    assert order(queue).index("modest") <= 1


def test_turns_are_by_work_and_not_by_number() -> None:
    queue = FairQueue(100)
    for _ in range(10):
        add(queue, "long", cost_s=4.0)
        add(queue, "short", cost_s=1.0)
    first = order(queue)[:10]
    assert first.count("short") == 8


def test_a_caller_that_was_away_has_saved_up_no_turns() -> None:
    queue = FairQueue(1000)
    for _ in range(100):
        add(queue, "busy")
    for _ in range(50):
        queue.next()
    for _ in range(20):
        add(queue, "back")
    assert 4 <= order(queue)[:10].count("busy") <= 6


def test_a_caller_that_leaves_for_a_moment_is_remembered() -> None:
    queue = FairQueue(100)
    add(queue, "other")
    for _ in range(5):
        add(queue, "busy")
    assert order(queue)[-1] == "busy"
    add(queue, "busy")
    add(queue, "other")
    assert order(queue) == ["other", "busy"]


def test_of_one_caller_the_earliest_deadline_goes_first() -> None:
    queue = FairQueue(100)
    late, soon, tie = (add(queue, None, at) for at in (9.0, 1.0, 9.0))
    assert [queue.next(), queue.next(), queue.next(), queue.next()] == [soon, late, tie, None]


def test_the_work_ahead_is_what_is_begun_before() -> None:
    queue = FairQueue(100)
    for _ in range(10):
        add(queue, "greedy", 5.0)
    assert queue.ahead_s("modest", 99.0) == 1.0
    assert queue.ahead_s("greedy", 99.0) == 10.0
    assert queue.ahead_s("greedy", 1.0) == 0.0
    assert queue.cost_s == 10.0


def test_a_caller_gets_as_many_places_as_are_free() -> None:
    queue = FairQueue(32)
    for _ in range(32):
        if queue.has_room("greedy"):
            add(queue, "greedy")
    assert len(queue) == 16
    for i in range(8):
        assert queue.has_room(f"modest {i}")
        add(queue, f"modest {i}")
    assert not queue.has_room("greedy")


def test_callers_that_are_not_told_apart_get_all_places() -> None:
    queue = FairQueue(3)
    for _ in range(3):
        assert queue.has_room(None)
        add(queue, None)
    assert not queue.has_room(None)
    assert not FairQueue(0).has_room(None)


def test_a_ticket_out_of_turn_leaves_nothing_behind() -> None:
    queue = FairQueue(3)
    waiter = add(queue, "a", cost_s=0.1)
    queue.remove(waiter)
    assert (len(queue), queue.cost_s, queue.next()) == (0, 0.0, None)


def test_names_of_callers_are_forgotten() -> None:
    """A caller that names itself anew with each request fills no memory."""
    queue = FairQueue(4)
    for i in range(3 * MAX_CALLERS):
        add(queue, f"caller {i}")
        queue.next()
    assert len(queue._remembered) == MAX_CALLERS
    assert not queue._waiting
