"""Deferral of messages while the cloud is away: the choice of messages to spool, and probes for the cloud's return."""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import replace

from isthmus.errors import ResultStoreUnavailable, SpoolFull
from isthmus.events.configuration import SpoolTable
from isthmus.events.limits import RouteLimit
from isthmus.events.message import CONTENT_TYPE, CONTINUATION, Message
from isthmus.events.route import Outcome, RouterReply
from isthmus.events.spool import EventSpool, SpoolStatus

# Between requests that find out whether the cloud is back.
FIRST_PROBE_S, MAX_PROBE_S = 1.0, 15.0
# Headers of a body that the continuation replaces.
_OF_THE_BODY = frozenset((CONTENT_TYPE, "content-encoding", "inference-header-content-length"))
_log = logging.getLogger(__name__)


class Deferral:
    """The spool and the state of the cloud behind it; any thread may call.

    `cloud` has the slots of requests that finish spooled ones.
    """

    def __init__(self, table: SpoolTable, spool: EventSpool, concurrency: int) -> None:
        self.spool, self._table = spool, table
        self.cloud = RouteLimit(concurrency, first_pause_s=FIRST_PROBE_S, max_pause_s=MAX_PROBE_S)
        self._reason, self._lock = "", threading.Lock()
        self._is_whole = False
        self._latest = spool.status()

    @property
    def wait_s(self) -> int:
        """How long the router may wait for the tail: no longer than a link takes, once that is known to be away."""
        return 0 if self.cloud.is_away else math.ceil(self._table.wait)

    @property
    def status(self) -> SpoolStatus:
        """The state at this moment; the latest known state after an error of the disk, or after the end."""
        try:
            self._latest = self.spool.status(self._reason)
        except ResultStoreUnavailable as e:
            _log.debug("not observed: %s", e.message)
        return self._latest

    def note(self, reply: RouterReply) -> None:
        """Learn from the response to a spooled request."""
        self.cloud.note(reply.outcome, reply.retry_after_s)
        self._tell(reply.reason if reply.outcome in (Outcome.AWAY, Outcome.UNCLEAR) else "")

    def note_message(self, reply: RouterReply) -> None:
        """Learn from the response to a message."""
        if reply.outcome is Outcome.DONE:
            # Perhaps by the head alone: a spooled request finds out.
            self.cloud.try_soon()
        elif self.takes(reply) and not self.cloud.is_away:
            self.cloud.note(Outcome.AWAY)
            self._tell(reply.reason)
        if self.takes(reply):
            self._is_whole = reply.outcome is not Outcome.DEFERRED

    def takes(self, reply: RouterReply) -> bool:
        """Whether a message with this response waits in the spool."""
        if reply.outcome is Outcome.DEFERRED:
            return True
        return self._table.messages and reply.outcome in (Outcome.AWAY, Outcome.UNCLEAR)

    def takes_unasked(self) -> bool:
        """Whether to spool messages without a call of the router, as the latest message had no continuation."""
        return self._table.messages and self._is_whole and self.cloud.is_away and len(self.spool) > 0

    def add(self, message: Message, lane: str | None, reply: RouterReply) -> None:
        """Spool the continuation that the reply is, or the message.

        Raises:
            SpoolFull, ResultStoreUnavailable: as `EventSpool.add`.
        """
        if reply.outcome is Outcome.DEFERRED:
            headers = {name: text for name, text in message.headers.items() if name not in _OF_THE_BODY}
            message = replace(message, body=reply.body, headers={**headers, CONTENT_TYPE: CONTINUATION})
        self.spool.add(message, lane)

    def drops_for(self, error: SpoolFull) -> bool:
        """Whether the oldest entries make room: by configuration, and where there is anything to gain."""
        return self._table.full == "drop-oldest" and error.facts.get("of") == "bound"

    def _tell(self, reason: str) -> None:
        with self._lock:
            changed = bool(reason) != bool(self._reason)
            self._reason = reason
        if changed and reason:
            _log.warning("the cloud is away, and requests are spooled: %s", reason)
        elif changed:
            _log.info("the cloud answers again; %d spooled requests are to be finished", len(self.spool))
