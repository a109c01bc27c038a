"""The request that a thread works on: its deadline and slot, its waits for the registry, and its kind of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from isthmus.admission.memory import RETRY_AFTER_S
from isthmus.context import Deadline
from isthmus.errors import Overloaded

if TYPE_CHECKING:
    from isthmus.admission.slots import Slots

# Characters of a description: digest and name of a few routes.
_MAX_DETAIL = 600


class AdmittedRequest:
    """A request's deadline and slot, and the kind of its work."""

    def __init__(self, slots: Slots, deadline: Deadline, work: str, *, needs_slot: bool) -> None:
        self.slots, self.deadline, self.work = slots, deadline, work
        self.needs_slot, self.has_slot, self.is_whole = needs_slot, False, True
        self.detail = ""
        self.is_load_sample = True
        self.began, self.in_work = 0.0, 0


_CURRENT: ContextVar[AdmittedRequest | None] = ContextVar("request", default=None)


@contextmanager
def as_current(request: AdmittedRequest) -> Iterator[None]:
    """Make `request` this thread's request for the block, and return its slot afterwards."""
    token = _CURRENT.set(request)
    error: BaseException | None = None
    try:
        yield
    except BaseException as e:
        error = e
        raise
    finally:
        _CURRENT.reset(token)
        if request.has_slot:
            request.slots.give_back(request, error)


def current_deadline() -> Deadline | None:
    """The deadline of this thread's request; None outside of requests."""
    return None if (request := _CURRENT.get()) is None else request.deadline


def describe_work(detail: str) -> None:
    """Describe the work of this thread's request further: model, route or segment; no-op outside of requests.

    The adaptive limit compares the seconds of requests with the same descriptions only: a request that took a second
    route because the first gave no response is of a kind of its own, and no sign of load.
    """
    if (request := _CURRENT.get()) is not None and detail not in request.detail:
        request.detail = f"{request.detail} {detail}"[:_MAX_DETAIL]


def describe_varying_work() -> None:
    """State that the seconds of this thread's request depend on what it asks for; no-op outside of requests.

    The adaptive limit leaves such requests out: a long generation after short ones is no sign of load.
    """
    if (request := _CURRENT.get()) is not None:
        request.is_load_sample = False


@contextmanager
def slot_released(*, refuse: bool = True) -> Iterator[None]:
    """Release this thread's slot while the block waits for the registry, and take a slot again afterwards.

    If too many requests wait already and `refuse` is false, the request waits in its slot, in up to half of all slots.
    No-op outside of requests. After an exception in the block the request has no slot: the request is about to end.

    Raises:
        Overloaded: too many requests wait already, or no slot is free after the block.
    """
    if (request := _CURRENT.get()) is None:
        yield
        return
    slots = request.slots
    # Seconds of a wait for the registry are no service time.
    request.is_whole = False
    if slots.waiting.enter():
        if request.has_slot:
            slots.give_back(request)
        try:
            yield
        finally:
            slots.waiting.leave()
        if request.needs_slot and not request.has_slot:
            slots.take_again(request)
        return
    if refuse or not slots.waiting_in_slot.enter():
        raise Overloaded(
            f"{slots.waiting.limit} requests wait for the registry; that is the limit", retry_after_s=RETRY_AFTER_S
        )
    try:
        yield
    finally:
        slots.waiting_in_slot.leave()
