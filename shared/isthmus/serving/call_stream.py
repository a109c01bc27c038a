"""The states of a call as server-sent events, until it is over or the deadline passes.

Source: HTML Living Standard, 9.2 "Server-sent events"; docs/reference/calls.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from isthmus.context import Deadline
from isthmus.errors import EventError
from isthmus.events.call import Call
from isthmus.events.calls import Calls

# Shorter than the idle timeouts of proxies; a client that has gone is seen at the next of these.
HEARTBEAT_S = 5.0
# A browser whose stream ended at the deadline comes again after this time.
_RECONNECT_MS = 1000


class CallStream:
    """Events `state`, each with the call's document, and `error` where the call or its store is gone."""

    def __init__(
        self, calls: Calls, call: Call, deadline: Deadline, error: Callable[[EventError], dict[str, Any]]
    ) -> None:
        self._calls, self._call, self._deadline, self._error = calls, call, deadline, error

    def is_read(self, last_event_id: str) -> bool:
        """Whether the reader has the last event of a call that is over."""
        return self._call.is_over and last_event_id == _event_id(self._call)

    def events(self) -> Iterator[bytes]:
        """The stream, from the state at its begin."""
        call = self._call
        yield f"retry: {_RECONNECT_MS}\n\n".encode() + _event("state", call.document(), _event_id(call))
        try:
            while not call.is_over and (left_s := self._deadline.remaining()) > 0:
                latest = self._calls.wait(call.id, min(HEARTBEAT_S, left_s), since=call)
                if latest.progress == call.progress:
                    yield b": waiting\n\n"
                else:
                    yield _event("state", latest.document(), _event_id(latest))
                call = latest
        except EventError as e:
            yield _event("error", self._error(e))


def _event(name: str, document: dict[str, Any], event_id: str = "") -> bytes:
    # JSON has no line breaks, which would end the field.
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {name}\ndata: {json.dumps(document)}\n\n".encode()


def _event_id(call: Call) -> str:
    return f"{call.state}-{call.attempts}"
