"""Supervisor of a function: keeps the desired number of replicas running, and picks a replica for each call."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime

import aiohttp

from isthmus.errors import LocalError
from isthmus_tools.engine.replica import Deployment, Replica, ReplicaState
from isthmus_tools.engine.telemetry import Event, EventKind, LogBuffer, OnEvent, message_of

MAX_REPLICAS = 16  # each a Python process of some 100 MB with its own copy of the session
MAX_FAILED_STARTS = 8
"""Consecutive starts of a replica that may end before readiness; with back-off, about 20 s."""
MISCONFIGURED = 78  # EX_CONFIG of sysexits.h: the template's exit status where a setting stops the start
_MAX_BACKOFF_S = 10.0  # a fixed file or registry is noticed within this time
_STEADY_S = 10.0  # ready for so long, a replica ends a series of crashes


class Supervisor:
    """A function's deployment, replicas and log.

    Updates roll over: replicas of the old deployment drain once the new replicas are ready. `discard` is called in a
    thread with each replaced deployment after the end of its last replica.
    """

    def __init__(
        self,
        name: str,
        session: aiohttp.ClientSession,
        on_event: OnEvent,
        *,
        drain_s: float,
        discard: Callable[[Deployment], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.log_buffer = LogBuffer(lambda line: on_event(Event("log", line.text, name, line.instance)))
        self.created = datetime.now(UTC)
        self.invocations = 0
        self.desired = 0
        self.crashes = 0  # consecutive, without a steady replica between
        self.failure = ""
        self.given_up = False
        """Whether starting was given up, because the deployment cannot start."""
        self._failed_starts = 0
        self._session = session
        self._on_event = on_event
        self._drain_s = drain_s
        self._discard = discard
        self._deployment: Deployment | None = None
        self._replicas: list[Replica] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._not_before = 0.0
        self._changed = asyncio.Event()
        self._closing = False
        self._loop_task = asyncio.create_task(self._reconcile_forever(), name=f"supervise {name}")

    @property
    def deployment(self) -> Deployment:
        """The current deployment.

        Raises:
            LocalError: nothing is deployed yet.
        """
        if self._deployment is None:
            raise LocalError(f"{self.name} is not deployed")
        return self._deployment

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """All replicas that have not ended."""
        return tuple(self._replicas)

    @property
    def available(self) -> int:
        """Number of ready replicas of the current deployment; replicas of an older deployment do not count."""
        return sum(r.state is ReplicaState.READY and r.deployment is self._deployment for r in self._replicas)

    @property
    def settled(self) -> bool:
        """Whether the desired replicas are ready."""
        return self.available >= self.desired

    @property
    def reason(self) -> str:
        """Reason for not being ready: the last replica's refusal, or how the replica ended."""
        waiting = [r.reason for r in self._replicas if r.state is ReplicaState.STARTING]
        return waiting[-1] if waiting and not self.failure else self.failure or "starting"

    @property
    def exposes_details(self) -> bool:
        """Whether callers may read the reason, as it holds a line of the function's log."""
        return self._deployment is not None and self._deployment.exposes_details

    def deploy(self, deployment: Deployment, replicas: int) -> None:
        """Replace the current deployment by `replicas` of `deployment`."""
        replaced, self._deployment = self._deployment, deployment
        if replaced is not None:
            self._discard_unused(replaced)
        self.created = datetime.now(UTC)
        self.crashes, self.failure = 0, ""
        self.scale(replicas)

    def scale(self, replicas: int) -> None:
        """Set the desired number of replicas, and retry a start that was given up.

        Raises:
            LocalError: a negative number, or more than MAX_REPLICAS.
        """
        if not 0 <= replicas <= MAX_REPLICAS:
            raise LocalError(f"{self.name} cannot run {replicas} replicas; 0 to {MAX_REPLICAS} are possible here")
        self.desired = replicas
        self.given_up, self._failed_starts, self._not_before = False, 0, 0.0
        self._changed.set()

    def pick(self) -> Replica | None:
        """The ready replica with the fewest calls in flight; round robin among equals."""
        ready = [r for r in self._replicas if r.state is ReplicaState.READY]
        if not ready:
            return None
        replica = min(ready, key=lambda r: (r.in_flight, r.used_at))
        replica.used_at = time.monotonic()
        return replica

    async def close(self) -> None:
        """Drain and end every replica."""
        self._closing = True
        self._loop_task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._loop_task
        await asyncio.gather(*(r.stop(self._drain_s) for r in self._replicas))
        await asyncio.gather(*self._tasks)
        self.log_buffer.close()

    def kill(self) -> None:
        """End every replica now."""
        self._closing = True
        for replica in self._replicas:
            replica.kill()

    async def _reconcile_forever(self) -> None:
        while True:
            self._changed.clear()
            wait_s = self._reconcile()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)

    def _reconcile(self) -> float | None:
        """A step towards the desired state; seconds until the next step, None to wait for a change."""
        deployment = self._deployment
        if deployment is None:
            return None
        live = [r for r in self._replicas if r.state in (ReplicaState.STARTING, ReplicaState.READY)]
        current = [r for r in live if r.deployment is deployment]
        if (surplus := len(current) - self.desired) > 0:
            self._drain(sorted(current, key=lambda r: (r.state is ReplicaState.READY, r.in_flight))[:surplus])
        # The older deployment serves until this one is ready; its replicas that never became ready would pile up.
        replaced = sum(r.state is ReplicaState.READY for r in current) >= self.desired
        older = [r for r in live if r.deployment is not deployment]
        self._drain([r for r in older if replaced or r.state is ReplicaState.STARTING])
        missing = 0 if self.given_up else self.desired - len(current)
        if missing > 0 and (wait_s := self._not_before - time.monotonic()) > 0:
            return wait_s
        for _ in range(missing):
            replica = Replica(deployment, self.log_buffer, self._session)
            self._replicas.append(replica)
            self._spawn(self._tend(replica))
        return None

    def _drain(self, replicas: list[Replica]) -> None:
        for replica in replicas:
            replica.state, replica.asked_to_stop = ReplicaState.DRAINING, True
            self._spawn(replica.stop(self._drain_s))

    async def _tend(self, replica: Replica) -> None:
        """Start a replica, and follow it to its end."""
        self._report("starting", "", replica)
        try:
            await replica.start()
        except (OSError, ValueError) as e:
            replica.state = ReplicaState.GONE
            self._ended(replica, f"cannot be started: {e}")
            return
        probing = asyncio.create_task(self._await_ready(replica))
        status = await replica.pump()
        probing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await probing
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        self._ended(replica, how, misconfigured=status == MISCONFIGURED)

    async def _await_ready(self, replica: Replica) -> None:
        await replica.probe()
        if replica.state is ReplicaState.READY:
            self.failure = ""
            self._report("ready", replica.url, replica)
            self._changed.set()

    def _ended(self, replica: Replica, how: str, *, misconfigured: bool = False) -> None:
        self._replicas.remove(replica)
        if self._closing or replica.asked_to_stop:
            self._report("stopped", how, replica)
        elif replica.deployment is not self._deployment:  # a replaced deployment is not restarted
            self._report("exited", self._with_last_line(replica, how), replica)
        else:
            self.failure = self._with_last_line(replica, how)
            self._restart(replica, misconfigured)
        if not self._closing:
            self._discard_unused(replica.deployment)
        self._changed.set()

    def _discard_unused(self, deployment: Deployment) -> None:
        if deployment is not self._deployment and all(r.deployment is not deployment for r in self._replicas):
            self._spawn(asyncio.to_thread(self._discard, deployment))

    def _restart(self, replica: Replica, misconfigured: bool) -> None:
        """Schedule a replacement for a crashed replica with exponential back-off, or give up."""
        steady = replica.ready_at is not None and time.monotonic() - replica.ready_at > _STEADY_S
        # A replica that served for a while crashed by its load, not by its deployment.
        self.crashes = 0 if steady else self.crashes + 1
        self._failed_starts = self._failed_starts + 1 if replica.ready_at is None else 0
        if misconfigured or self._failed_starts >= MAX_FAILED_STARTS * max(1, self.desired):
            self.given_up = True
            after = "deployed, or this engine started, with other settings" if misconfigured else "deployed or scaled"
            self._report("failed", f"{self.failure}; not started again until it is {after}", replica)
            return
        wait_s = min(_MAX_BACKOFF_S, 0.25 * 2 ** (self.crashes - 2)) if self.crashes > 1 else 0.0
        self._not_before = time.monotonic() + wait_s
        self._report("exited", f"{self.failure}; again in {wait_s:g} s", replica)

    def _with_last_line(self, replica: Replica, how: str) -> str:
        last = message_of(self.log_buffer.last(replica.id))
        return f"{how}: {last}" if last else how

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _report(self, kind: EventKind, text: str, replica: Replica) -> None:
        pid = (replica.pid or 0) if kind == "ready" else 0
        self._on_event(Event(kind, text, self.name, replica.id, pid))
