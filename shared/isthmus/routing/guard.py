"""The accuracy guard: now and then a request is answered raw as well, and a bad codec steps aside.

What a codec keeps was measured on the inputs of whoever calibrated it; other inputs may cost more. A step goes to the
next safer way to pack: the last look's quality for all, the codec's higher ones, int8, half, raw. It is never taken
back by itself: a new version of the bundle, or a restart, starts anew. Source: docs/calibration.md, "The guard".
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from isthmus.arrays import Array
from isthmus.artifacts.agreement import Measure, measure_for
from isthmus.artifacts.bounds import exceeds
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import RAW, Choice, Look
from isthmus.artifacts.fidelity import LIMIT, Fidelity
from isthmus.codecs import EncodedTensor, Encoding
from isthmus.codecs.choice import is_exact
from isthmus.context import Context
from isthmus.errors import IsthmusError
from isthmus.pipeline import Result, Route, execute
from isthmus.pipeline.agreement import agrees
from isthmus.routing.fallback import ladder

WINDOW = 500
"""Checks of one route that are remembered; older ones are forgotten, so that a drift shows."""
CONFIDENCE = 0.999
"""That the limit is broken, before a step is taken: every check asks anew, so one in twenty would be too often."""
IDLE_WAIT_S = 30.0
"""How long a sampled request waits for the router to have nothing else to do before it is let go."""
MAX_ROUTES = 256

Fidelities: TypeAlias = Callable[[Bundle], Fidelity | None]
"""Where a bundle's fidelity is looked up; None where it has none."""
Key: TypeAlias = tuple[str, tuple[str, ...], tuple[tuple[str, str, float], ...], tuple[Look, ...]]

_POLL_S = 0.02


class GuardMetrics(Protocol):
    """What the guard reads of a function and reports."""

    def busy(self) -> float:
        """Requests at work now."""
        ...

    def guard_checked(self, agreed: bool) -> None:
        """Count one check."""
        ...

    def guard_state(self, disagreement: float, level: int) -> None:
        """The largest share of disagreements, and the highest fallback level, of all routes."""
        ...


@dataclass(frozen=True)
class Sample:
    """One answered request, kept to be answered again."""

    route: Route
    inputs: Mapping[str, Array]
    encoded: Mapping[str, EncodedTensor]
    outputs: Mapping[str, Array]
    step: int


@dataclass(frozen=True)
class Standing:
    """The step that a route was on when it was taken, and what its answer says of that."""

    step: int = 0
    notes: Mapping[str, str | int] = field(default_factory=dict)


UNWATCHED = Standing()


@dataclass
class Watched:
    """What is known of one route: its ladder, the step it stands on, and how the latest checks came out."""

    ladder: tuple[Choice, ...]
    measure: Measure
    limit: float
    step: int = 0
    seen: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def disagreement(self) -> float:
        """The share of the remembered checks whose answers differed."""
        return self.seen.count(False) / len(self.seen) if self.seen else 0.0

    def notes(self) -> dict[str, str | int]:
        """What an answer's route says of it; nothing before the first step."""
        if not self.step:
            return {}
        return {
            "guard_step": self.step,
            "guard_codec": str(self.ladder[self.step]),
            "guard_instead_of": str(self.ladder[0]),
        }


class Guard:
    """Checks a share of the requests that were packed, one at a time, while nothing else is in flight."""

    def __init__(
        self,
        share: float,
        fidelities: Fidelities,
        metrics: GuardMetrics,
        log: logging.Logger,
        *,
        deadline_s: float,
        draw: Callable[[], float] | None = None,
    ) -> None:
        self._share, self._fidelities, self._metrics, self._log = share, fidelities, metrics, log
        # Not the global generator's: that is the program's, and the guard draws in a request's thread.
        self._deadline_s, self._draw = deadline_s, draw or random.Random().random  # noqa: S311
        self._lock = threading.Lock()
        self._watched: OrderedDict[Key, Watched] = OrderedDict()
        self._unguarded: OrderedDict[str, None] = OrderedDict()  # bundles of which that was said
        self._waiting: queue.Queue[Sample | None] = queue.Queue(maxsize=1)  # None ends the worker
        self._closed = threading.Event()
        self._worker: threading.Thread | None = None

    def close(self) -> None:
        """Check no more; a check under way goes on to its end."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            self._waiting.get_nowait()
        with contextlib.suppress(queue.Full):  # another sample came between: its worker sees that this is closed
            self._waiting.put_nowait(None)

    def safer(self, route: Route) -> tuple[Route, Standing]:
        """Apply the fallback codec in force for this route (none at level 0); the route and that level."""
        if not route.encodings:
            return route, UNWATCHED
        with self._lock:
            watched = self._watched.get(_key(route))
            if watched is None or not watched.step:
                return route, UNWATCHED
            standing = Standing(watched.step, watched.notes())
            choice = watched.ladder[watched.step]
        made = tuple(
            {name: p for name, how in each.items() if (p := _packing(how, choice)) is not None}
            for each in route.encodings
        )
        return replace(route, encodings=made, looks=None), standing

    def watch(
        self,
        route: Route,
        standing: Standing,
        inputs: Mapping[str, Array],
        encoded: Mapping[str, EncodedTensor],
        result: Result,
    ) -> None:
        """Perhaps check this answer later; `route` is the one that was asked for, before `safer`."""
        sent = {name for run in result.runs for name in run.codecs}
        if not any(name in sent and not is_exact(p) for each in route.encodings for name, p in each.items()):
            return
        if self._draw() >= self._share or self._closed.is_set():
            return
        with self._lock:
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="guard", daemon=True)
                self._worker.start()
        with contextlib.suppress(queue.Full):  # one is being checked and one waits: enough
            self._waiting.put_nowait(Sample(route, inputs, encoded, result.outputs, standing.step))

    def _work(self) -> None:
        while (sample := self._waiting.get()) is not None and not self._closed.is_set():
            try:
                if self._idle():
                    self.check(sample)
            except IsthmusError as e:
                # A hop that is away, a deadline: nothing was learned of the codec.
                self._log.info("the guard's own request failed", extra={"facts": {"error": e.message}})
            except Exception as e:
                self._log.error("unexpected in the guard: %s", type(e).__name__, exc_info=e)

    def _idle(self) -> bool:
        until = time.monotonic() + IDLE_WAIT_S
        while self._metrics.busy() > 0:
            if time.monotonic() > until or self._closed.is_set():
                return False
            time.sleep(_POLL_S)
        return True

    def check(self, sample: Sample) -> None:
        """Answer one request raw, compare, and step down where the limit is broken beyond chance.

        Raises:
            IsthmusError: the raw answer could not be had.
        """
        watched = self._look(sample.route)
        raw = replace(sample.route, encodings=(), looks=None)
        context = Context.from_headers({}, longest_s=self._deadline_s)
        expected = execute(raw, sample.inputs, context, sample.encoded)
        same = agrees(watched.measure, expected.outputs, sample.outputs)
        self._metrics.guard_checked(same)
        with self._lock:
            if sample.step != watched.step:
                return  # of a codec that is no longer in use
            watched.seen.append(same)
            differing, count, share = watched.seen.count(False), len(watched.seen), watched.disagreement
            stepped = watched.step + 1 < len(watched.ladder) and exceeds(
                differing, count, 1 - watched.limit, CONFIDENCE
            )
            if stepped:
                watched.step += 1
                watched.seen.clear()
            watched_now = self._watched.values()
            self._metrics.guard_state(max(w.disagreement for w in watched_now), max(w.step for w in watched_now))
        if stepped:
            facts = {
                "bundle": sample.route.digest,
                "segments": [s.id for s in sample.route.segments],
                "checks": count,
                "disagreement": round(share, 4),
                "limit": round(1 - watched.limit, 4),
                **watched.notes(),
            }
            self._log.warning("the guard stepped to a safer codec", extra={"facts": facts})

    def _look(self, route: Route) -> Watched:
        key = _key(route)
        with self._lock:
            if (found := self._watched.get(key)) is not None:
                self._watched.move_to_end(key)
                return found
        fidelity = self._fidelity(route)
        measure = fidelity.measure if fidelity is not None else measure_for(route.bundle)
        limit = fidelity.limit if fidelity is not None else LIMIT
        made = Watched(ladder(_worst(route), _cut(route), fidelity), measure, limit)
        with self._lock:
            found = self._watched.setdefault(key, made)
            while len(self._watched) > MAX_ROUTES:
                self._watched.popitem(last=False)
        return found

    def _fidelity(self, route: Route) -> Fidelity | None:
        try:
            return self._fidelities(route.bundle)
        except IsthmusError as e:
            with self._lock:
                known = route.digest in self._unguarded
                self._unguarded[route.digest] = None
                while len(self._unguarded) > MAX_ROUTES:
                    self._unguarded.popitem(last=False)
            if not known:
                facts = {"bundle": route.digest, "type": type(e).__name__, "error": e.message, "hint": e.hint}
                self._log.warning(
                    "the guard cannot read what was calibrated, and checks nothing", extra={"facts": facts}
                )
            raise


def _packing(how: Encoding, choice: Choice) -> Encoding | None:
    """How a tensor travels on the step of `choice`; None for raw."""
    if is_exact(how):
        return how
    if choice == RAW:
        return None
    if choice.codec == how.codec:
        return replace(how, quality=max(how.quality, choice.quality))
    return Encoding(choice.codec, choice.quality)


def _worst(route: Route) -> Choice:
    """The choice that the route's lossy encodings have in common; of several, the one of the lowest quality."""
    lossy = [Choice(p.codec, p.quality) for each in route.encodings for p in each.values() if not is_exact(p)]
    worst = min(lossy, key=lambda c: (c.quality, c.codec), default=RAW)
    return worst if route.looks is None else replace(worst, looks=route.looks.looks)


def _cut(route: Route) -> str:
    """The cut before the first segment that anything lossy is sent to."""
    for segment, each in zip(route.segments, route.encodings, strict=False):
        if any(not is_exact(p) for p in each.values()):
            return segment.id.start
    return ""


def _key(route: Route) -> Key:
    """What makes a route another one for the guard: its segments, each tensor's codec and quality, the closer looks."""
    encodings = tuple((name, p.codec, p.quality) for each in route.encodings for name, p in each.items())
    looks = () if route.looks is None else route.looks.looks
    return route.digest, tuple(s.id for s in route.segments), encodings, looks
