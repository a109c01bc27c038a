"""Log lines of requests: each has the call id and the trace id of its request, however deep the code that logs.

Lines hold shapes, sizes, names and errors, never bodies or tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from isthmus.context import CURRENT, Context


class RequestIdentity(logging.Filter):
    """Adds the ids of the thread's request to a record's facts; facts of the same name stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`; True."""
        if (context := CURRENT.get()) is not None:
            record.facts = {**identity(context), **getattr(record, "facts", {})}
        return True


_IDENTITY = RequestIdentity()


def identify_requests() -> None:
    """Let the handlers of this process add the ids of requests to their lines.

    On handlers, not on a logger: a logger's filters do not see the records of loggers below it, nor of libraries.
    """
    for handler in logging.getLogger().handlers:
        handler.addFilter(_IDENTITY)


def identity(context: Context) -> dict[str, str]:
    """The ids of a request as facts, and its caller where that was authenticated."""
    caller = {"caller": context.caller} if context.caller else {}
    return {"call_id": context.call_id, "trace_id": context.trace_id, **caller}


def log_request(log: logging.Logger, context: Context, status: int, facts: Mapping[str, object]) -> None:
    """The line of a response; at INFO for errors alone, since the watchdog writes a line for every request already."""
    level = logging.DEBUG if status < 400 else logging.INFO
    if log.isEnabledFor(level):
        known = {name: value for name, value in facts.items() if value not in (None, "")}
        log.log(level, "request", extra={"facts": {"status": status, **known, **identity(context)}})
