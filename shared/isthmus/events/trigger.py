"""The trigger: threads that fetch messages, work on messages and keep leases, until a stop.

One thread fetches, no more than the router and the bound on bytes allow; twice as many threads as the router takes
requests work, so that records are written while another thread waits for its response; a thread extends deliveries, and
another renews leases, independent of slow brokers.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from isthmus.errors import BrokerRefused, BrokerUnavailable, EventError, ResultStoreUnavailable, StoreDamaged
from isthmus.events.broker import Backlog, Consumer, Delivery
from isthmus.events.calls import Calls
from isthmus.events.claims import ClaimStore
from isthmus.events.configuration import TriggerConfiguration
from isthmus.events.deferral import Deferral
from isthmus.events.draining import Drainer
from isthmus.events.lanes import Lanes
from isthmus.events.limits import Availability, RouteLimit, Stopping
from isthmus.events.message import Message
from isthmus.events.processing import LEASE_S, Job, MessageCounting, MessageHandler, Processor
from isthmus.events.publishing import Publishing, ResultPlace
from isthmus.events.spool import EventSpool, SpoolStatus

# Messages in memory beyond the messages in work: behind another of their lane, or waiting for another attempt.
MAX_JOBS = 1024
STOP_S = 25.0
"""Work in flight may take this long after the stop; Kubernetes and faasd kill after 30 s."""
# Threads for each request that the router takes at a time, and messages fetched for each: none of the three stages
# before, at and after the router waits for another.
_WORKERS_PER_REQUEST, _MESSAGES_PER_REQUEST = 2, 3
# A fetch waits this long for a message, and so does a stop for the fetch.
_FETCH_S = 1.0
_BACKLOG_EVERY_S = 2.0
# A sweep of records lists all records, and removes a twenty-fourth part of a lifetime.
_MIN_SWEEP_S, _MAX_SWEEP_S, _SWEEPS_PER_LIFETIME = 60.0, 3600.0, 24
# Objects expire at whole hours.
_SWEEP_CLAIMS_EVERY_S = 3600.0
_MIN_TICK_S = 0.05
# A counterpart that comes and goes, such as a disk that is nearly full, would fill the log.
_MAX_TOLD, _TOLD_WITHIN_S = 20, 60.0
# For counterparts that hang in their last calls; the rest ends with the process.
_CLOSE_S = 3.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TriggerStatus:
    """What a trigger did and has. `away` has the reason of each counterpart that does not answer.

    Units: bytes of the bodies in memory.
    """

    counts: Mapping[str, int]
    in_work: int
    waiting: int
    work_bytes: int
    limit: int
    backlog: Backlog
    away: Mapping[str, str]
    spool: SpoolStatus | None = None

    @property
    def is_ready(self) -> bool:
        """Whether source, records, router and places answer, as far as is known."""
        return not self.away


@dataclass(frozen=True, kw_only=True)
class TriggerParts:
    """The opened counterparts of a trigger, closed by the trigger. `spool` is opened by the configuration's table."""

    consumer: Consumer
    results: Sequence[ResultPlace]
    dead_letters: ResultPlace | None
    claims: ClaimStore | None = None
    calls: Calls
    route: MessageHandler
    spool: EventSpool | None = None
    closers: Sequence[Callable[[], None]] = field(default=())


class Trigger:
    """Runs from `start` to `stop`, including the closing of `parts`; triggers that share their work share `name`."""

    def __init__(self, configuration: TriggerConfiguration, parts: TriggerParts, name: str) -> None:
        self.name, self.parts, self._configuration = name, parts, configuration
        self._stop, self._ended = threading.Event(), threading.Event()
        self._draining = threading.Lock()
        self._lanes: Lanes[Job] = Lanes()
        self._limit = RouteLimit(configuration.router.concurrency)
        self._counts = MessageCounting()
        self._availability = Availability(self._stop, self._tell)
        self._told: defaultdict[str, deque[float]] = defaultdict(partial(deque, maxlen=_MAX_TOLD))
        table, concurrency = configuration.spool, configuration.router.concurrency
        self._deferral = None if table is None or parts.spool is None else Deferral(table, parts.spool, concurrency)
        self._processor = Processor(
            name=name,
            # Unlike a name of the process, never given again after a restart.
            owner=f"{socket.gethostname()[:64]}-{secrets.token_hex(8)}",
            calls=parts.calls,
            route=parts.route,
            limit=self._limit,
            availability=self._availability,
            publishing=Publishing(
                name=name,
                calls=parts.calls,
                availability=self._availability,
                results=parts.results,
                dead_letters=parts.dead_letters,
                claims=parts.claims,
                max_attempts=configuration.max_attempts,
                retry_after_s=float(configuration.retry_after),
                count=self._counts,
            ),
            claims=parts.claims,
            deferral=self._deferral,
            max_attempts=configuration.max_attempts,
            retry_after_s=float(configuration.retry_after),
            count=self._counts,
        )
        self._backlog = Backlog()
        self._empty_fetches = 0
        self._largest = 0
        self._failure: BaseException | None = None
        self._fetcher = self._thread("fetch", self._fetch_all)
        self._workers = [self._thread(f"work-{i}", self._work) for i in range(_WORKERS_PER_REQUEST * concurrency)]
        self._drainer: Drainer | None = None
        if self._deferral is not None:
            self._drainer = Drainer(self._deferral, self._processor, self._availability)
            self._workers += [self._thread(f"drain-{i}", self._drainer.work) for i in range(concurrency)]
            self._workers.append(self._thread("feed", self._drainer.feed))
        self._keepers = [self._thread("renew", self._renew_all), self._thread("observe", self._observe)]
        if parts.consumer.extend_every_s < float("inf"):
            self._keepers.append(self._thread("extend", self._extend_all))

    def start(self) -> None:
        """Begin to fetch."""
        for thread in (*self._keepers, *self._workers, self._fetcher):
            thread.start()

    def stop(self, timeout_s: float = STOP_S) -> None:
        """`drain`, and close everything; a few seconds longer where a counterpart hangs."""
        self.drain(timeout_s)
        places = (*self.parts.results, *filter(None, [self.parts.dead_letters]))
        closers = [*(place.publisher.close for place in places), *self.parts.closers]
        if self.parts.spool is not None and self._deferral is not None:
            _ = self._deferral.status  # the last one
            closers.append(self.parts.spool.close)
        self._join([self._started(close) for close in closers], time.monotonic() + _CLOSE_S)

    def drain(self, timeout_s: float) -> None:
        """Finish messages in work within `timeout_s`, and give the rest back; records and places stay open."""
        with self._draining:
            if not self._ended.is_set():
                self._drain(time.monotonic() + timeout_s)

    def status(self) -> TriggerStatus:
        """The state at this moment."""
        running, total = self._lanes.running, len(self._lanes)
        return TriggerStatus(
            counts=self._counts.snapshot(),
            in_work=running,
            waiting=total - running,
            work_bytes=self._lanes.bytes,
            limit=self._limit.limit,
            backlog=self._backlog,
            away=self._availability.away,
            spool=None if self._deferral is None else self._deferral.status,
        )

    def check(self) -> None:
        """Raise the error that ended a thread, if one did."""
        if self._failure is not None:
            raise self._failure

    def is_empty(self) -> bool:
        """Whether nothing is in memory or in the spool, and nothing waits at the broker.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        # Twice: an empty fetch may have been on its way while a message was given back.
        if len(self._lanes) or self._empty_fetches < 2 or (self.parts.spool is not None and len(self.parts.spool)):
            return False
        return not self.parts.consumer.backlog().messages

    def _drain(self, until: float) -> None:
        self._stop.set()
        self._limit.close()
        if self._drainer is not None:
            self._drainer.close()
        self._join([self._fetcher], until)
        returning = self._started(self._give_back)
        self._join([*self._workers, returning], until)
        until = time.monotonic() + _CLOSE_S
        if not returning.is_alive():
            self._join([self._started(self._give_back)], until)
        self._ended.set()
        self._join(self._keepers, until)
        # Returns unfinished messages to the broker; a late result is recorded, not acknowledged.
        self._join([self._started(self.parts.consumer.close)], until)

    def _fetch_all(self) -> None:
        while not self._stop.is_set():
            count = self._demand()
            if not count:
                self._lanes.wait_for_change(_FETCH_S)
                continue
            for delivery in self._fetch(count):
                size = len(delivery.message.body)
                # A decaying maximum: the next fetch may bring as many bytes a message.
                self._largest = max(1, size, self._largest * 15 // 16)
                lane = self._key(delivery.message)
                job = Job(delivery, self._counts.counts.done, time.monotonic(), lane)
                self._counts("received")
                self._lanes.put(job, lane, size)

    def _fetch(self, count: int) -> Sequence[Delivery]:
        consumer = self.parts.consumer
        deliveries = self._availability.until(
            "source", lambda: consumer.fetch(count, _FETCH_S), (BrokerUnavailable, BrokerRefused)
        )
        self._empty_fetches = 0 if deliveries else self._empty_fetches + 1
        return deliveries

    def _demand(self) -> int:
        """Messages that may be fetched now.

        Brokers do not say how large messages are: the next ones are taken to be as large as the latest, and a fetch
        exceeds the bound where messages grow.
        """
        free_bytes = self._configuration.max_work_bytes - self._lanes.bytes
        if free_bytes <= 0:
            return 0
        if not self._largest:
            return 1
        limit = self._limit.limit
        count = _MESSAGES_PER_REQUEST * limit - self._lanes.runnable
        if count < limit:
            # A fetch costs broker and client as much as a few messages do: several at a time.
            return 0
        free: int = min(
            count,
            MAX_JOBS - len(self._lanes),
            max(free_bytes // self._largest, 0 if len(self._lanes) else 1),
        )
        return max(0, free)

    def _key(self, message: Message) -> str | None:
        """The lane of a message; None without an order, or without the header of the order."""
        order_by = self._configuration.order_by
        if order_by in ("source", "key"):
            return message.source if order_by == "source" else message.key or None
        return message.headers.get(order_by.removeprefix("header:").lower()) if order_by else None

    def _work(self) -> None:
        while (job := self._lanes.take()) is not None:
            try:
                after_s = self._processor.process(job)
            except Stopping:
                self._processor.give_back(job)
                after_s = None
            except StoreDamaged:
                raise  # no wait repairs a file; the next start moves a damaged spool aside
            except Exception as e:
                # A defect, or an error that no stage knows: an attempt of this message, and no end of other messages.
                _log.exception("message %s: %s", job.delivery.message.id, type(e).__name__)
                after_s = float(self._configuration.retry_after)
            if after_s is not None and job.lane is not None:
                job.lease = None
                self._lanes.delay(job, after_s)
                continue
            if after_s is not None:
                # Without an order the broker keeps the message, and memory is free for other messages.
                job.delivery.retry(after_s)
            self._lanes.done(job)

    def _extend_all(self) -> None:
        """Extend deliveries in memory, also while the trigger stops."""
        extend_s = self.parts.consumer.extend_every_s / 2
        while not self._ended.wait(max(_MIN_TICK_S, min(extend_s, LEASE_S / 3))):
            for job in self._lanes.items():
                # Each may take a round trip.
                if (now := time.monotonic()) - job.extended_at >= extend_s:
                    job.extended_at = now
                    job.delivery.extend()

    def _renew_all(self) -> None:
        """Renew the leases of all jobs in work."""
        tick_s = max(_MIN_TICK_S, LEASE_S / 3)
        while not self._ended.wait(tick_s):
            for job in (*self._lanes.items(), *(() if self._drainer is None else self._drainer.jobs())):
                lease = job.lease
                # Younger leases have most of their time left.
                if lease is None or time.monotonic() - job.leased_at < tick_s:
                    continue
                try:
                    self.parts.calls.renew(lease, LEASE_S)
                except ResultStoreUnavailable as e:
                    _log.debug("leases are not renewed: %s", e.message)
                    break

    def _observe(self) -> None:
        """Read the backlog for the metrics, and remove expired calls and objects."""
        calls, claims = self.parts.calls, self.parts.claims
        records_s = float(self._configuration.records.keep) / _SWEEPS_PER_LIFETIME
        records_s = min(_MAX_SWEEP_S, max(_MIN_SWEEP_S, records_s))
        sweeps = [(records_s, calls.sweep), *([] if claims is None else [(_SWEEP_CLAIMS_EVERY_S, claims.sweep)])]
        # The first at once: a trigger may be started for minutes, day by day.
        due = [0.0] * len(sweeps)
        while not self._ended.wait(_BACKLOG_EVERY_S):
            try:
                self._backlog = self.parts.consumer.backlog()
                for i, (every_s, sweep) in enumerate(sweeps):
                    if time.monotonic() >= due[i]:
                        due[i] = time.monotonic() + every_s
                        sweep()
            except EventError as e:
                # The thread that needs the broker says so; an old figure would mislead.
                _log.debug("not observed: %s", e.message)
                self._backlog = Backlog()

    def _give_back(self) -> None:
        for job in self._lanes.close():
            self._processor.give_back(job)
            self._lanes.remove(job)

    def _tell(self, name: str, reason: str) -> None:
        told, now = self._told[name], time.monotonic()
        if len(told) == _MAX_TOLD and now - told[0] < _TOLD_WITHIN_S:
            return
        told.append(now)
        if len(told) == _MAX_TOLD and now - told[0] < _TOLD_WITHIN_S:
            _log.warning("%s comes and goes, which is not logged for a minute: %s", name, reason or "it answers again")
        elif reason:
            _log.warning("%s is away, and is waited for: %s", name, reason)
        else:
            _log.info("%s answers again", name)

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                target()
            except Stopping:
                pass
            except BaseException as e:
                # Half a trigger is none: its owner ends the process, and the platform starts another.
                self._failure = e
                self._stop.set()
                raise

        return threading.Thread(target=run, name=f"isthmus-{name}", daemon=True)

    def _started(self, target: Callable[[], None]) -> threading.Thread:
        """A running thread for something that may hang."""
        thread = threading.Thread(target=target, name="isthmus-close", daemon=True)
        thread.start()
        return thread

    def _join(self, threads: Sequence[threading.Thread], until: float) -> None:
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))
