"""The state machine of a call: one record for each message id, changed by compare-and-set alone.

```
(absent) ── queue ──▶ queued ── begin ──▶ running ── finish ──▶ done      a result, published place by place
                        ▲                   │  │
                        └──── release ──────┘  └─── fail ─────▶ failed    an error document in place of a result
```

`begin` takes a lease. After it expires, as after the death of its owner, another owner takes the call over; each
`begin` counts as an attempt. The first result stays: `finish` gives a slower owner the first result and
drops the second. So a message has a single result, however often a broker delivers the message.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import msgspec
from msgspec.structs import replace

from isthmus.errors import CallUnknown, MessageTooLarge, ResultStoreUnavailable
from isthmus.events.call import (
    MAX_PLACE,
    MAX_REASON,
    Call,
    CallLease,
    CallResult,
    State,
    decode_call,
    encode_call,
)
from isthmus.events.message import storable
from isthmus.events.records import MAX_RECORD_BYTES, RecordStore

MAX_INLINE_BYTES = MAX_RECORD_BYTES - 64 * 2**10
"""A larger result goes to the object store; the rest of a record is for its other fields."""
# Contention is between two or three owners of a message: more failures in a row are a defect of the store.
_MAX_CONFLICTS = 32
# A process sees its own results at once and other results within this time, longer after a while without changes.
_FIRST_POLL_S, _MAX_POLL_S = 0.05, 1.0

Written = TypeVar("Written")


class ResultObjects(Protocol):
    """An object store for results that are too large for a record."""

    def put(self, body: bytes, content_type: str) -> str:
        """Store the body; a reference to it."""
        ...

    def get(self, reference: str) -> bytes:
        """The body.

        Raises:
            ClaimExpired: the object is gone.
        """
        ...


class Calls:
    """Calls in `records`, each kept `keep_s` seconds after its last change. Any thread may call.

    `scope` is the name of the trigger: the result of a trigger may be the message of another, with the same id.

    Every method raises ResultStoreUnavailable where the store does not answer.
    """

    def __init__(
        self,
        records: RecordStore,
        *,
        keep_s: float,
        scope: str = "",
        objects: ResultObjects | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._records, self._keep_s, self._scope = records, keep_s, scope
        self._objects, self._clock = objects, clock
        self._changes = _ChangeSignals()

    def queue(self, call_id: str, source: str = "") -> Call:
        """Create a queued call; an existing record stays unchanged."""

        def step() -> Call | None:
            if (stored := self._read(call_id)) is not None:
                return stored.call
            written = self._write(self._new(call_id, source), "", durable=True)
            return None if written is None else written.call

        return _until_written(call_id, step)

    def begin(self, call_id: str, owner: str, lease_s: float, source: str = "", *, deaths: int = 0) -> CallLease | Call:
        """Take the lease; the call itself where the call is over, or in work (`lease_until` says until when).

        `owner` names a delivery rather than a process: of two deliveries to a process, the first has the lease. An
        owner that asks again, as after a lost response of the store, has the lease already.

        With more `deaths` than the call's, its dead letter was sent again: a failed call begins again, its attempts
        counted from none, and places that refused the result lack the result again.
        """

        def step() -> CallLease | Call | None:
            # Most messages come once: no read before the first write.
            first = self._begun(self._new(call_id, source, deaths), owner, lease_s)
            if (lease := self._write(first, "", durable=False)) or (stored := self._read(call_id)) is None:
                return lease
            call = stored.call
            if call.is_over and deaths > call.deaths:
                if call.state == "done":
                    reopened = replace(call, refused=(), deaths=deaths, **self._times())
                    written = self._write(reopened, stored.version, durable=False)
                    return None if written is None else written.call
                call = self._new(call_id, source, deaths)
            elif call.is_over or call.lease_until > self._clock():
                return stored if call.owner == owner and not call.is_over else call
            # An attempt that is lost with the machine has done no harm.
            return self._write(self._begun(call, owner, lease_s), stored.version, durable=False)

        # mypy joins the two types to object.
        return cast(CallLease | Call, _until_written(call_id, step))

    def renew(self, lease: CallLease, lease_s: float) -> bool:
        """Make the lease last from now on; False where another owner has it."""

        def step() -> bool | None:
            stored = self._read(lease.call.id)
            if stored is None or stored.call.owner != lease.call.owner:
                return False
            longer = replace(stored.call, lease_until=self._clock() + lease_s, **self._times())
            return True if self._write(longer, stored.version, durable=False) else None

        return _until_written(lease.call.id, step)

    def release(self, lease: CallLease, reason: str, *, blame: bool) -> None:
        """End an attempt without a result, uncounted without `blame`. No-op where another owner has the lease.

        A call that is over stays so: its places may be served by another owner.
        """

        def step() -> bool | None:
            stored = self._read(lease.call.id)
            if stored is None or stored.call.owner != lease.call.owner:
                return False
            call = stored.call
            if not call.is_over:
                attempts = call.attempts if blame else max(0, call.attempts - 1)
                call = replace(call, state="queued", attempts=attempts, reason=reason[:MAX_REASON])
            call = replace(call, lease_until=0.0, **self._times())
            return True if self._write(call, stored.version, durable=False) else None

        _until_written(lease.call.id, step)

    def finish(
        self, lease: CallLease, status: int, content_type: str, body: bytes, *, durable: bool = True
    ) -> CallLease:
        """Record a result; the result of an earlier owner stays and is returned.

        Raises:
            MessageTooLarge: the body is too large for a record and there is no object store.
        """
        result = self._result(status, content_type, body)
        return self._end(lease, result, "done", "", durable)

    def fail(self, lease: CallLease, status: int, reason: str, document: Mapping[str, Any] | None = None) -> CallLease:
        """Record the final error: the router's document, by default `reason` as a document. As `finish` otherwise."""
        body = json.dumps(document or {"error": reason}, ensure_ascii=False).encode(errors="replace")
        if len(body) > MAX_INLINE_BYTES:
            body = json.dumps({"error": reason[:MAX_REASON]}).encode()
        result = CallResult(status, "application/json", len(body), body)
        return self._end(lease, result, "failed", reason[:MAX_REASON], True)

    def publish(self, lease: CallLease, place: str, *, durable: bool = True, is_refusal: bool = False) -> CallLease:
        """Note that `place` has or refuses the result, so that no trigger publishes there again.

        A record that has gone with the data of its store is written again.
        """
        latest = lease

        def step() -> CallLease | None:
            nonlocal latest
            call = latest.call
            places = call.refused if is_refusal else call.published
            if place not in places:
                call = replace(call, **{"refused" if is_refusal else "published": (*places, place)})
            if written := self._write(replace(call, **self._times()), latest.version, durable):
                return written
            if (stored := self._read(call.id)) is not None and stored.call.created != call.created:
                # Its dead letter was sent again meanwhile: another result is to come.
                return latest
            latest = CallLease(call, "") if stored is None else stored
            return None

        return _until_written(lease.call.id, step)

    def take_over(self, call: Call, owner: str, lease_s: float) -> CallLease | None:
        """The lease of a call that is over, for the remaining places; None while another lease is in force."""
        stored, now = self._read(call.id), self._clock()
        if stored is None or not stored.call.is_over:
            return None
        if stored.call.lease_until > now:
            return stored if stored.call.owner == owner else None
        leased = replace(stored.call, owner=owner, lease_until=now + lease_s, **self._times())
        return self._write(leased, stored.version, durable=False)

    def get(self, call_id: str) -> Call:
        """The call.

        Raises:
            CallUnknown: no such call, or an expired call.
        """
        if (stored := self._read(call_id)) is None:
            raise CallUnknown(
                f"there is no call {call_id}", call=call_id, hint=f"results are kept for {self._keep_s:g} s"
            )
        return stored.call

    def wait(self, call_id: str, timeout_s: float, since: Call | None = None) -> Call:
        """The finished call, or its state after `timeout_s`; with `since`, also a call of other progress.

        Raises:
            CallUnknown: as `get`.
        """
        until, pause_s = time.monotonic() + timeout_s, _FIRST_POLL_S
        with self._changes.of(call_id) as changed:
            while True:
                # Before the read: a change between the two ends the wait below at once.
                changed.clear()
                call, left_s = self.get(call_id), until - time.monotonic()
                if call.is_over or left_s <= 0 or (since is not None and call.progress != since.progress):
                    return call
                changed.wait(min(pause_s, left_s))
                pause_s = min(_MAX_POLL_S, pause_s * 2)

    def body(self, result: CallResult) -> bytes:
        """The body of a result, inline or from the object store.

        Raises:
            ClaimExpired: its object is gone.
        """
        if not result.reference:
            return result.body
        if self._objects is None:
            raise ResultStoreUnavailable(f"the result is the object {result.reference}, and no [claims] are configured")
        return self._objects.get(result.reference)

    def sweep(self) -> int:
        """Remove calls past their time; their number."""
        return self._records.sweep(self._keep_s)

    def _end(self, lease: CallLease, result: CallResult, state: State, reason: str, durable: bool) -> CallLease:
        latest = lease

        def step() -> CallLease | None:
            nonlocal latest
            # The owner keeps the lease while publishing, from now on: the work may have taken longer than a lease.
            times = self._times()
            until = times["updated"] + max(0.0, lease.call.lease_until - lease.call.updated)
            ended = replace(lease.call, state=state, result=result, reason=reason, lease_until=until, **times)
            if written := self._write(ended, latest.version, durable):
                return written
            stored = self._read(lease.call.id)
            if stored is not None and stored.call.is_over:
                return stored
            latest = CallLease(lease.call, "") if stored is None else stored
            return None

        return _until_written(lease.call.id, step)

    def _result(self, status: int, content_type: str, body: bytes) -> CallResult:
        media = content_type[:256]
        if len(body) <= MAX_INLINE_BYTES:
            return CallResult(status, media, len(body), bytes(body))
        if self._objects is None:
            raise MessageTooLarge(
                f"a result of {len(body)} bytes exceeds a record's {MAX_INLINE_BYTES} bytes",
                bytes=len(body),
                limit=MAX_INLINE_BYTES,
                hint="configure an object store for large results: [claims] of the trigger's configuration",
            )
        return CallResult(status, media, len(body), b"", self._objects.put(body, media))

    def _begun(self, call: Call, owner: str, lease_s: float) -> Call:
        until, attempts = self._clock() + lease_s, call.attempts + 1
        return replace(
            call, state="running", owner=owner, lease_until=until, attempts=attempts, result=None, **self._times()
        )

    def _new(self, call_id: str, source: str, deaths: int = 0) -> Call:
        now = self._clock()
        return Call(call_id, "queued", now, now, now + self._keep_s, source[:MAX_PLACE], deaths=deaths)

    def _times(self) -> dict[str, Any]:
        now = self._clock()
        return {"updated": now, "expires": now + self._keep_s}

    def _read(self, call_id: str) -> CallLease | None:
        """The call and its version; None where absent. An expired call is removed, so that its id is new again."""
        if (stored := self._records.get(self._key(call_id))) is None:
            return None
        try:
            call = decode_call(stored.value)
        except msgspec.DecodeError as e:
            raise ResultStoreUnavailable(
                f"{self._records.url}: the record {call_id} is no call: {e}", store=self._records.url
            ) from e
        if call.expires < self._clock():
            self._records.delete(self._key(call_id), stored.version)
            return None
        return CallLease(call, stored.version)

    def _key(self, call_id: str) -> str:
        return storable(f"{self._scope}.{call_id}") if self._scope else call_id

    def _write(self, call: Call, version: str, durable: bool) -> CallLease | None:
        """Write over `version`, a new record where `version` is empty; None after a conflicting write."""
        value = encode_call(call)
        new = (
            self._records.update(self._key(call.id), value, version, durable=durable)
            if version
            else self._records.create(self._key(call.id), value, durable=durable)
        )
        if new is None:
            return None
        self._changes.notify(call.id)
        return CallLease(call, new)


class _ChangeSignals:
    """Wakes the threads that wait for a given call alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: defaultdict[str, list[threading.Event]] = defaultdict(list)

    @contextmanager
    def of(self, call_id: str) -> Iterator[threading.Event]:
        """An event that is set at each change of the call, for the block."""
        event = threading.Event()
        with self._lock:
            self._events[call_id].append(event)
        try:
            yield event
        finally:
            with self._lock:
                events = self._events[call_id]
                events.remove(event)
                if not events:
                    del self._events[call_id]

    def notify(self, call_id: str) -> None:
        """Tell the threads that wait for this call."""
        with self._lock:
            for event in self._events.get(call_id, ()):
                event.set()


def _until_written(call_id: str, step: Callable[[], Written | None]) -> Written:
    """Compare-and-set: `step` reads and writes, and gives None where another write was between the two.

    Raises:
        ResultStoreUnavailable: every write met another.
    """
    for _ in range(_MAX_CONFLICTS):
        if (written := step()) is not None:
            return written
    raise ResultStoreUnavailable(f"the record of call {call_id} changed {_MAX_CONFLICTS} times while it was written")
