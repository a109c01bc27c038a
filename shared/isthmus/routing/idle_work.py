"""Work beside requests: one job at a time, while no request is in flight."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from isthmus.context import CURRENT, Context, Deadline, working_on
from isthmus.errors import IsthmusError

# How long a job waits for an idle router before it is dropped.
MAX_IDLE_WAIT_S = 30.0
# In flight is a gauge without an event to wait for; jobs are rare.
_POLL_S = 0.02

Job: TypeAlias = Callable[[], None]


def job_context(deadline_s: float) -> Context:
    """The context of a job's own calls: the ids of the request that offered the job, and a deadline from now on."""
    request = CURRENT.get() or Context.from_headers({}, longest_s=deadline_s)
    return replace(request, deadline=Deadline.after(deadline_s))


class IdleWork:
    """Runs jobs in a thread of its own; `busy` tells the requests in flight. `name` is the thread's and the log's."""

    def __init__(self, name: str, busy: Callable[[], float], log: logging.Logger) -> None:
        self._name, self._busy, self._log = name, busy, log
        # A job in work and another in the queue are enough; each keeps a request's tensors in memory.
        self._jobs: queue.Queue[tuple[Job, Context | None] | None] = queue.Queue(maxsize=1)  # None ends the worker
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._worker: threading.Thread | None = None

    @property
    def is_closed(self) -> bool:
        """Whether no further job is taken."""
        return self._closed.is_set()

    def offer(self, job: Job) -> None:
        """Run a job later, with the ids of the present request, so that its calls join that trace; or drop the job."""
        with self._lock:
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._worker.start()
        with contextlib.suppress(queue.Full):
            self._jobs.put_nowait((job, CURRENT.get()))

    def close(self) -> None:
        """Take no more jobs; a job under way goes on to its end."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            self._jobs.get_nowait()
        with contextlib.suppress(queue.Full):  # another job came between: its worker sees that this is closed
            self._jobs.put_nowait(None)

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None and not self.is_closed:
            job, request = entry
            with working_on(request):
                self._run_idly(job)

    def _run_idly(self, job: Job) -> None:
        try:
            if self._is_idle():
                job()
        except IsthmusError as e:
            # A hop that is away, a deadline: nothing that was checked is at fault.
            self._log.info("the %s's own request failed", self._name, extra={"facts": {"error": e.message}})
        except Exception as e:
            self._log.error("unexpected in the %s: %s", self._name, type(e).__name__, exc_info=e)

    def _is_idle(self) -> bool:
        give_up = time.monotonic() + MAX_IDLE_WAIT_S
        while self._busy() > 0:
            if time.monotonic() > give_up or self.is_closed:
                return False
            time.sleep(_POLL_S)
        return True
