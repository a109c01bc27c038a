"""States of asynchronous calls, for GET /calls/ID: an SQLite file beside the queue's store."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from isthmus.errors import CallUnknown, ResultStoreUnavailable
from isthmus.events.call import CallLease
from isthmus.events.calls import Calls
from isthmus.events.message import storable
from isthmus.events.stores.sqlite import SqliteRecords
from isthmus_tools.engine.call_runner import CallOutcome
from isthmus_tools.engine.telemetry import Event, OnEvent

KEEP_S = 86_400.0
T = TypeVar("T")


class CallStates:
    """State and status of each call; the result itself goes to the callback alone.

    A failure to record is reported and ends no call; the state is then old.
    """

    def __init__(self, file: Path, executor: Executor, on_event: OnEvent) -> None:
        self._records = SqliteRecords(file)
        self._calls = Calls(self._records, keep_s=KEEP_S)
        self._executor, self._on_event = executor, on_event

    async def sweep(self) -> None:
        """Remove expired states."""
        await self._recorded(partial(self._records.sweep, KEEP_S))

    async def queue(self, call_id: str, function: str) -> None:
        """Note an accepted call."""
        await self._recorded(partial(self._calls.queue, storable(call_id), function))

    async def begin(self, call_id: str, function: str, lease_s: float) -> RunningState:
        """Note that the call runs."""
        # A name for each run: two deliveries of a call to this engine are two.
        owner = secrets.token_hex(8)
        begun = await self._recorded(partial(self._calls.begin, storable(call_id), owner, lease_s, function))
        return RunningState(self, begun if isinstance(begun, CallLease) else None, lease_s)

    async def renew(self, lease: CallLease, lease_s: float) -> None:
        """Note that the call still runs."""
        await self._recorded(partial(self._calls.renew, lease, lease_s))

    async def end(self, lease: CallLease, outcome: CallOutcome) -> None:
        """Note the function's response, the reason of a failure, and the delivery of the callback."""

        def write() -> None:
            if outcome.failure:
                self._calls.fail(lease, outcome.status, outcome.failure)
                return
            finished = self._calls.finish(lease, outcome.status, outcome.content_type, b"", durable=False)
            if outcome.called_back:
                self._calls.publish(finished, "callback", durable=False)

        await self._recorded(write)

    async def document(self, call_id: str) -> dict[str, Any]:
        """The state as JSON.

        Raises:
            CallUnknown: the call is unknown, or longer ago than KEEP_S.
        """
        read = partial(self._calls.get, storable(call_id))
        call = await asyncio.get_running_loop().run_in_executor(self._executor, read)
        document = call.document()
        if document["result"] is not None:
            # The body is not here, so its size and place would say nothing.
            document["result"] = {name: document["result"][name] for name in ("status", "content_type")}
        return document

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    async def _recorded(self, write: Callable[[], T]) -> T | None:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, write)
        except (ResultStoreUnavailable, CallUnknown) as e:
            self._on_event(Event("failed", f"the state of a call is not recorded: {e.message}"))
            return None


class RunningState:
    """The state of a call that runs; nothing is recorded where the state is over, or another engine's."""

    def __init__(self, states: CallStates, lease: CallLease | None, lease_s: float) -> None:
        self._states, self._lease, self._lease_s = states, lease, lease_s

    async def renew(self) -> None:
        """Note that the call still runs."""
        if self._lease is not None:
            await self._states.renew(self._lease, self._lease_s)

    async def end(self, outcome: CallOutcome) -> None:
        """Note the outcome of the call."""
        if self._lease is not None:
            await self._states.end(self._lease, outcome)
