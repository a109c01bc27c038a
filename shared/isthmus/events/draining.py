"""Drains the spool: its entries are worked on as messages are, in order, once the cloud is back."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial

from isthmus.errors import ResultStoreUnavailable, StoreDamaged
from isthmus.events.deferral import Deferral
from isthmus.events.lanes import Lanes
from isthmus.events.limits import Availability, Stopping
from isthmus.events.processing import Job, Processor, SpoolDelivery

# Entries in memory: enough for several lanes, since a lane runs one entry at a time; and their bytes.
_MAX_ENTRIES, _MAX_BYTES = 128, 32 * 2**20
_LOOK_S = 1.0
# After an error that no stage knows.
_DEFECT_S = 5.0
_log = logging.getLogger(__name__)


class Drainer:
    """Takes entries from the spool to the processor.

    One thread runs `feed`, and a thread for each parallel request `work`.
    """

    def __init__(self, deferral: Deferral, processor: Processor, availability: Availability) -> None:
        self._deferral, self._processor, self._availability = deferral, processor, availability
        self._lanes: Lanes[Job] = Lanes()
        self._is_closed = False

    def feed(self) -> None:
        """Keep the first entries in memory, until closed."""
        spool, seq = self._deferral.spool, 0
        while not self._is_closed:
            free = _MAX_ENTRIES - len(self._lanes)
            free_bytes = _MAX_BYTES - self._lanes.bytes
            if free <= 0 or free_bytes <= 0:
                self._lanes.wait_for_change(_LOOK_S)
                continue
            spool.grew.clear()
            read = partial(spool.after, seq, free, free_bytes)
            entries = self._availability.until("spool", read, (ResultStoreUnavailable,))
            for entry in entries:
                job = Job(SpoolDelivery(entry.message, self._remove), lane=entry.lane, is_deferred=True)
                self._lanes.put(job, entry.lane, len(entry.message.body))
                seq = entry.seq
            if not entries:
                spool.grew.wait(_LOOK_S)

    def work(self) -> None:
        """Finish entries within the slots of the cloud, until closed."""
        while (job := self._lanes.take()) is not None:
            try:
                with self._deferral.cloud.slot():
                    job.successes = self._processor.count.counts.drained
                    after_s = self._processor.process(job)
            except Stopping:
                self._processor.give_back(job)
                after_s = None
            except StoreDamaged:
                raise
            except Exception as e:
                _log.exception("spooled message %s: %s", job.delivery.message.id, type(e).__name__)
                after_s = _DEFECT_S
            if after_s is None:
                self._lanes.done(job)
            else:
                job.lease = None
                self._lanes.delay(job, after_s)

    def jobs(self) -> list[Job]:
        """Entries in memory."""
        return self._lanes.items()

    def close(self) -> None:
        """Let all threads end after their current entry."""
        self._is_closed = True
        self._deferral.cloud.close()
        self._deferral.spool.grew.set()
        self._lanes.close()

    def _remove(self, message_id: str) -> None:
        # An entry that stays at a stop is removed at the next start, since the call is over.
        with suppress(Stopping):
            self._availability.until(
                "spool", lambda: self._deferral.spool.remove(message_id), (ResultStoreUnavailable,)
            )
