"""The threads that answer requests; each stays with the connection that it answered last."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque
from typing import Protocol

STAY_S = 5.0


class Task(Protocol):
    """Something to be answered: a connection, as a rule."""

    taken: bool
    """Whether it waits for a worker, or has one; nobody else reads from it then."""

    def fileno(self) -> int:
        """What tells that more has come."""
        ...

    def service(self) -> bool:
        """Answer what has come; whether a worker may wait for more."""
        ...

    def release(self) -> None:
        """Be nobody's again."""
        ...


class Worker:
    """One thread's ear for what it is given."""

    def __init__(self) -> None:
        self.given: Task | None = None
        self.ended = False
        self._ear, self._bell = os.pipe()

    def ring(self) -> None:
        """Tell that something is given."""
        os.write(self._bell, b"!")

    def end(self) -> None:
        """Tell that nothing more is given."""
        self.ended = True
        self.ring()

    def take(self) -> Task | None:
        """Wait for what is given; None at the end."""
        given = None
        while given is None and not self.ended:
            os.read(self._ear, 1)
            given, self.given = self.given, None
        return given

    def wait(self, fileno: int) -> bool:
        """Whether something has come there before STAY_S had passed, or something was given."""
        poll = select.poll()
        poll.register(self._ear, select.POLLIN)
        poll.register(fileno, select.POLLIN)
        return any(found == fileno for found, _ in poll.poll(STAY_S * 1000))


class Workers:
    """Answers tasks, and a connection's next request by the thread that answered the one before.

    So no thread has to wake another for it, and it finds its memory in the caches. A worker leaves its connection once
    a task finds nobody idle, or after STAY_S. Of those that are idle, the one that was busy last gets the next task.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Task] = deque()
        self._idle: list[Worker] = []
        self._staying: dict[Worker, None] = {}
        self._ended = False
        for i in range(count):
            threading.Thread(target=self._work, args=(Worker(),), name=f"worker {i}", daemon=True).start()

    def add_task(self, task: Task) -> None:
        """Have `task` answered, if it is nobody's yet."""
        if task.taken:
            return
        task.taken = True
        with self._lock:
            if self._idle:
                worker = self._idle.pop()
            elif self._staying:
                worker = next(iter(self._staying))  # it stays longest
                del self._staying[worker]
            else:
                self._waiting.append(task)
                return
            worker.given = task
        worker.ring()

    def shutdown(self) -> None:
        """End the workers, each once it is idle; a function's process ends all at once."""
        with self._lock:
            self._ended = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()

    def _work(self, me: Worker) -> None:
        while (task := self._next(me)) is not None:
            try:
                while task.service() and self._more(me, task):
                    pass
            except BaseException:
                logging.getLogger("waitress").exception("a request could not be answered")
            task.release()

    def _next(self, me: Worker) -> Task | None:
        with self._lock:
            if me.given is None:
                if self._waiting:
                    return self._waiting.popleft()
                if self._ended:
                    return None
                self._idle.append(me)
        return me.take()

    def _more(self, me: Worker, task: Task) -> bool:
        """Whether more has come to `task`, and `me` is needed nowhere else."""
        with self._lock:
            if self._waiting:
                return False
            self._staying[me] = None
        came = me.wait(task.fileno())
        with self._lock:
            self._staying.pop(me, None)
            return came and me.given is None
