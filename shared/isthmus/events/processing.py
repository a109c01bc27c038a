"""One message through its stages: deduplicate, call the router, record, publish, acknowledge.

A stage that finds its counterpart away waits in its thread, and so takes no further message; a failure of the message
itself ends the attempt. An acknowledgement comes after the record of the result and the response of every place.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Protocol, cast

from isthmus.context import Context, working_on
from isthmus.errors import (
    ClaimExpired,
    EventMalformed,
    IsthmusError,
    MessageTooLarge,
    ResultStoreUnavailable,
    SpoolFull,
    http_status,
)
from isthmus.events.broker import Delivery
from isthmus.events.call import Call, CallLease
from isthmus.events.calls import Calls
from isthmus.events.claims import ClaimStore, looks_like_claim, parse_claim
from isthmus.events.deferral import Deferral
from isthmus.events.limits import Availability, RouteLimit, Value
from isthmus.events.message import CONTENT_TYPE, Message
from isthmus.events.publishing import MAX_HEADER, MAX_PATH, PATH, Publishing
from isthmus.events.route import Outcome, RouterReply
from isthmus.events.spool import EventSpool
from isthmus.retries import jittered

LEASE_S = 10.0
"""Renewed while work lasts; after the death of a trigger its messages wait this long."""
_MAX_BACKOFF_S = 60.0
# A refused request waits as long as the router asks, and at least this long.
_MIN_BUSY_S, _MAX_BUSY_S = 0.05, 30.0
_STORE = (ResultStoreUnavailable,)
_SPOOLING = (SpoolFull, ResultStoreUnavailable)
# Between looks whether earlier messages of the lane have left the spool.
_LANE_LOOK_S = 0.2
# Entries of the spool that are in work are passed over where the oldest is to be dropped.
_MAX_PASSED = 64
_WAITS, _DROPPED = "waits for the cloud", "dropped: the spool was full"
_log = logging.getLogger(__name__)


class MessageHandler(Protocol):
    """Serves a message; every failure is a reply."""

    def call(self, message: Message, wait_s: int | None = None) -> RouterReply:
        """The router's reply; with `wait_s`, as `RouterRoute.call`, perhaps a continuation."""
        ...


@dataclass
class MessageCounts:
    """Messages by outcome since the start.

    `received` counts deliveries, `duplicates` deliveries of finished messages, `retried` failed attempts that are made
    again, `deferred` requests that the router was too busy for or away, `refused` results that a place refused.
    `spooled` messages wait for the cloud on this machine's disk, `drained` messages are done after that, and `dropped`
    ones have failed as the spool was full.
    """

    received: int = 0
    done: int = 0
    failed: int = 0
    duplicates: int = 0
    retried: int = 0
    deferred: int = 0
    dead_letters: int = 0
    refused: int = 0
    spooled: int = 0
    drained: int = 0
    dropped: int = 0


@dataclass(eq=False)
class Job:
    """A delivery in this process. `successes` is the route's count at the fetch.

    `lane` is that of its order, None without; `is_deferred` tells an entry of the spool from a broker's message.
    """

    delivery: Delivery
    successes: int = 0
    extended_at: float = 0.0
    lane: str | None = None
    is_deferred: bool = False
    lease: CallLease | None = None
    leased_at: float = 0.0

    @cached_property
    def context(self) -> Context:
        """The ids of the message: of all attempts in this process, in log lines and in the calls of the router."""
        message = self.delivery.message
        traced = {name: message.headers.get(name, "") for name in ("traceparent", "tracestate")}
        return replace(Context.from_headers(traced, longest_s=0.0), call_id=message.id)

    def take(self, lease: CallLease) -> CallLease:
        """Note the lease, to be renewed."""
        self.lease, self.leased_at = lease, time.monotonic()
        return lease


@dataclass(frozen=True)
class SpoolDelivery:
    """An entry of the spool as a delivery, kept until the acknowledgement."""

    message: Message
    remove: Callable[[str], object]
    attempt = 1

    def ack(self) -> None:
        """See `Delivery`."""
        self.remove(self.message.id)

    def retry(self, after_s: float) -> None:
        """See `Delivery`."""

    def extend(self) -> None:
        """See `Delivery`."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Takes jobs through their stages; any thread may call. `name` is the trigger's, `owner` this process's."""

    name: str
    owner: str
    calls: Calls
    route: MessageHandler
    limit: RouteLimit
    availability: Availability
    publishing: Publishing
    claims: ClaimStore | None
    deferral: Deferral | None = None
    max_attempts: int
    retry_after_s: float
    count: MessageCounting
    clock: Callable[[], float] = time.time

    def process(self, job: Job) -> float | None:
        """Work on a job; None where the job is over, else the seconds until another attempt.

        Raises:
            Stopping: the trigger ends; the job is as before.
        """
        with working_on(job.context):
            return self._process(job)

    def _process(self, job: Job) -> float | None:
        message = job.delivery.message
        text = message.headers.get(PATH, "")
        path = text.split(",")
        if self.name in path or len(path) > MAX_PATH or len(text) > MAX_HEADER:
            self._refuse_loop(job)
            return None
        begun = self._begin(message)
        if isinstance(begun, CallLease):
            return self._run(job, job.take(begun))
        return self._repeated(job, begun)

    def give_back(self, job: Job) -> None:
        """Return a job's message to its broker, and its lease to other triggers."""
        # Without a lease first: it must not be renewed afterwards.
        lease, job.lease = job.lease, None
        if lease is not None:
            try:
                self.calls.release(lease, "the trigger stopped", blame=False)
            except ResultStoreUnavailable as e:
                _log.warning("a lease stays until it expires: %s", e.message)
        job.delivery.retry(0.0)

    def _run(self, job: Job, lease: CallLease) -> float | None:
        attempts, deferral = lease.call.attempts, None if job.is_deferred else self.deferral
        if deferral is not None and self._spool(lambda spool: spool.contains(lease.call.id)):
            self._release(job, lease, lease.call.reason)
            self.count("duplicates")
            job.delivery.ack()
            return None
        if deferral is not None and not deferral.cloud.is_away and self._is_behind(job):
            return self._wait_behind(job, lease)
        if attempts > self.max_attempts and not job.is_deferred:
            # The attempts before ended with their triggers. Spooled requests are in work all the time that the cloud is
            # away, whenever a trigger ends.
            reply = RouterReply(Outcome.FAILED, 500, reason=f"{attempts - 1} attempts ended without an outcome")
            return self._fail(job, lease, reply)
        try:
            message = self._redeemed(job.delivery.message)
        except (ClaimExpired, EventMalformed, MessageTooLarge) as e:
            return self._fail(job, lease, _refusal(e))
        reply = self._call(job, message)
        if deferral is not None and deferral.takes(reply):
            self._defer(job, lease, reply, deferral)
            return None
        if reply.outcome is Outcome.DONE:
            return self._wait_behind(job, lease) if self._is_behind(job) else self._finish(job, lease, reply)
        if reply.outcome is Outcome.REFUSED:
            return self._fail(job, lease, reply)
        blame = self._blames(job, reply)
        if blame and attempts >= self.max_attempts:
            return self._fail(job, lease, reply)
        waits = job.is_deferred and not blame
        self._release(job, lease, f"{_WAITS}: {reply.reason}" if waits else reply.reason, blame=blame)
        if not waits:
            self.count("retried")
        tries = attempts if blame else job.delivery.attempt
        return jittered(min(_MAX_BACKOFF_S, self.retry_after_s * 2.0 ** min(tries - 1, 10)), self.retry_after_s / 10)

    def _blames(self, job: Job, reply: RouterReply) -> bool:
        """Whether the outcome is the message's fault: by itself, or because other messages succeeded meanwhile."""
        counts = self.count.counts
        if reply.outcome is Outcome.UNCLEAR and job.is_deferred:
            # When the link breaks, requests under way beside this one have just ended well.
            return counts.drained > job.successes + self.limit.max_limit
        return reply.outcome is Outcome.FAILED or (reply.outcome is Outcome.UNCLEAR and counts.done > job.successes)

    def _is_behind(self, job: Job) -> bool:
        """Whether earlier messages of its lane are in the spool; their results come first."""
        lane = job.lane
        if self.deferral is None or job.is_deferred or lane is None:
            return False
        return self._spool(lambda spool: spool.has_lane(lane))

    def _wait_behind(self, job: Job, lease: CallLease) -> float:
        self._release(job, lease, "waits for earlier messages of its key")
        return jittered(_LANE_LOOK_S, _LANE_LOOK_S / 4)

    def _defer(self, job: Job, lease: CallLease, reply: RouterReply, deferral: Deferral) -> None:
        """Spool the message, and acknowledge; waits while there is no room, so that the broker keeps the message."""

        def add() -> None:
            while True:
                try:
                    deferral.add(job.delivery.message, job.lane, reply)
                    return
                except SpoolFull as e:
                    if not deferral.drops_for(e) or not self._drop_oldest(deferral):
                        raise

        self.availability.until("spool", add, _SPOOLING)
        self._release(job, lease, f"{_WAITS}: {reply.reason}")
        self.count("spooled")
        job.delivery.ack()

    def _drop_oldest(self, deferral: Deferral) -> bool:
        """Let the oldest entry that is not in work fail; False where there is none."""
        seq = 0
        for _ in range(_MAX_PASSED):
            entries = deferral.spool.after(seq, 1, 0)
            if not entries:
                return False
            seq, message = entries[0].seq, entries[0].message
            begun = self._begin(message)
            if isinstance(begun, CallLease):
                job = Job(SpoolDelivery(message, deferral.spool.remove), lane=entries[0].lane, is_deferred=True)
                self.count("dropped")
                self._fail(job, job.take(begun), RouterReply(Outcome.REFUSED, 507, reason=_DROPPED))
                return True
        return False

    def _release(self, job: Job, lease: CallLease, reason: str, *, blame: bool = False) -> None:
        # Without a lease first: it must not be renewed afterwards.
        job.lease = None
        self._stored(lambda: self.calls.release(lease, reason, blame=blame))

    def _begin(self, message: Message) -> CallLease | Call:
        owner = self._new_owner()
        return self._stored(lambda: self.calls.begin(message.id, owner, LEASE_S, message.source, deaths=message.deaths))

    def _new_owner(self) -> str:
        """A name for a delivery: two deliveries to this process have two leases."""
        return f"{self.owner}.{secrets.token_hex(6)}"

    def _spool(self, operation: Callable[[EventSpool], Value]) -> Value:
        """The result of an operation on the existing spool."""
        spool = cast(Deferral, self.deferral).spool
        return self.availability.until("spool", lambda: operation(spool), _STORE)

    def _redeemed(self, message: Message) -> Message:
        """The message, a claim replaced by the body of its reference."""
        claims = self.claims
        if claims is None or not looks_like_claim(message.body):
            return message
        claim = parse_claim(message.body)
        body = self.availability.until("claims", lambda: claims.redeem(claim), _STORE)
        headers = {**message.headers, CONTENT_TYPE: claim.content_type}
        return replace(message, body=body, headers={name: text for name, text in headers.items() if text})

    def _call(self, job: Job, message: Message) -> RouterReply:
        """The router's reply to this message, once accepted; of an entry of the spool any reply."""
        deferral = self.deferral
        message = replace(message, headers={**message.headers, "traceparent": job.context.traceparent})
        while True:
            if deferral is not None and not job.is_deferred and deferral.takes_unasked():
                return RouterReply(Outcome.AWAY, reason="the cloud is away, as for the messages before")
            with self.limit.slot():
                reply = self.route.call(message, None if deferral is None or job.is_deferred else deferral.wait_s)
            if deferral is not None and job.is_deferred:
                deferral.note(reply)
                # Of the hops behind the router, not needed by every message.
                if reply.outcome not in (Outcome.AWAY, Outcome.UNCLEAR):
                    self.limit.note(reply.outcome, reply.retry_after_s)
                return reply
            self.limit.note(reply.outcome, reply.retry_after_s)
            if deferral is not None:
                deferral.note_message(reply)
            is_away = reply.outcome in (Outcome.AWAY, Outcome.UNCLEAR)
            self.availability.note("router", reply.reason if is_away else "")
            if reply.outcome not in (Outcome.BUSY, Outcome.AWAY) or (deferral is not None and deferral.takes(reply)):
                return reply
            self.count("deferred")
            if reply.outcome is Outcome.BUSY:
                after_s = min(_MAX_BUSY_S, max(_MIN_BUSY_S, reply.retry_after_s or 0.0))
                self.availability.pause(jittered(after_s, after_s / 4))

    def _finish(self, job: Job, lease: CallLease, reply: RouterReply) -> float | None:
        # The last write before the acknowledgement waits for the disk, and takes all earlier writes along.
        durable = not self.publishing.results

        def finish() -> CallLease:
            return self.calls.finish(lease, reply.status, reply.content_type, reply.body, durable=durable)

        try:
            ended = self._stored(finish)
        except MessageTooLarge as e:
            return self._fail(job, lease, _refusal(e))
        return self._over(job, ended)

    def _fail(self, job: Job, lease: CallLease, reply: RouterReply) -> float | None:
        _log.warning("message %s failed: %s", lease.call.id, reply.reason)
        status = reply.status or 502
        return self._over(job, self._stored(lambda: self.calls.fail(lease, status, reply.reason, reply.document)))

    def _over(self, job: Job, ended: CallLease) -> float | None:
        """Publish the result of a call that was just recorded, if by this job, and acknowledge."""
        if job.lease is None or ended.call.owner != job.lease.call.owner:
            return self._repeated(job, ended.call)
        self.publishing.publish(job.delivery.message, ended)
        self._count_end(job, ended.call)
        job.delivery.ack()
        return None

    def _repeated(self, job: Job, call: Call) -> float | None:
        """A message whose call exists: in work elsewhere, over, or over with places that lack the result."""
        if call.is_over and not self.publishing.missing(call):
            self.count("duplicates")
            job.delivery.ack()
            return None
        owner = self._new_owner()
        lease = self._stored(lambda: self.calls.take_over(call, owner, LEASE_S)) if call.is_over else None
        if lease is None:
            if call.owner.startswith(f"{self.owner}."):
                # Two deliveries in this process; the other is about to end.
                return jittered(self.retry_after_s, self.retry_after_s / 4)
            # A little longer than the lease, so that a single further look suffices.
            return jittered(max(0.1, call.lease_until - self.clock()), 0.1)
        job.take(lease)
        self.publishing.publish(job.delivery.message, lease)
        self._count_end(job, call)
        job.delivery.ack()
        return None

    def _count_end(self, job: Job, call: Call) -> None:
        self.count("done" if call.state == "done" else "failed")
        if job.is_deferred and call.state == "done":
            self.count("drained")

    def _refuse_loop(self, job: Job) -> None:
        """A result of this trigger came back as a message."""
        message, now = job.delivery.message, self.clock()
        reason = f"a loop: the message has come through {message.headers[PATH][:200]}"
        _log.error("message %s is refused, %s", message.id, reason)
        self.publishing.bury(message, Call(message.id, "failed", now, now, now), reason)
        self.count("failed")
        job.delivery.ack()

    def _stored(self, operation: Callable[[], Value]) -> Value:
        return self.availability.until("records", operation, _STORE)


class MessageCounting:
    """Adds to the counts from several threads."""

    def __init__(self) -> None:
        self.counts = MessageCounts()
        self._lock = threading.Lock()

    def __call__(self, name: str, number: int = 1) -> None:
        with self._lock:
            setattr(self.counts, name, getattr(self.counts, name) + number)

    def snapshot(self) -> Mapping[str, int]:
        """The counts by name."""
        with self._lock:
            return {f.name: getattr(self.counts, f.name) for f in fields(self.counts)}


def _refusal(error: IsthmusError) -> RouterReply:
    """The reply for a message that cannot be served, in the router's words."""
    document = {"error": error.message, "type": type(error).__name__, "facts": dict(error.facts), "hint": error.hint}
    return RouterReply(Outcome.REFUSED, http_status(error), reason=error.message, document=document)
