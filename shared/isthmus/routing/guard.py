"""The accuracy guard: some requests run raw as well, and a codec whose predictions differ too often is replaced.

Calibration measured a codec on its own inputs; other inputs may fare worse. A route then moves down a level of its
fallback chain: the last look's quality for all requests, the codec's higher qualities, int8, half, raw. Only a new
version of the bundle, or a restart, starts again at level 0. Source: docs/explanation/calibration.md, "The guard".
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeAlias

from cachetools import LRUCache

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import GRADED, RAW, Choice, Look
from isthmus.artifacts.fidelity import LIMIT, Fidelity, Measure, measure_for
from isthmus.codecs import EncodedTensor, Encoding, is_exact
from isthmus.errors import IsthmusError
from isthmus.pipeline import Result, Route, execute
from isthmus.pipeline.agreement import agrees
from isthmus.routing.exit_guard import ExitGuard, ExitMetrics
from isthmus.routing.idle_work import IdleWork, Job, job_context
from isthmus.routing.latest_outcomes import LatestOutcomes

# Callers name versions, each with a route of its own, so there must be an end.
MAX_ROUTES = 256

# Looks up a bundle's fidelity document; None where the bundle has no such document.
Fidelities: TypeAlias = Callable[[Bundle], Fidelity | None]
RouteKey: TypeAlias = tuple[str, tuple[str, ...], tuple[tuple[str, str, float], ...], tuple[Look, ...]]

_FALLBACKS = (Choice("int8/1"), Choice("half/1"), RAW)


class GuardMetrics(ExitMetrics, Protocol):
    """The function's metrics, as far as the guard reads and sets metrics."""

    def busy(self) -> float:
        """Requests in flight."""
        ...

    def guard_checked(self, agreed: bool) -> None:
        """Count a check."""
        ...

    def guard_state(self, disagreement: float, level: int) -> None:
        """The largest share of disagreements, and the highest fallback level, of all routes."""
        ...


@dataclass(frozen=True)
class Sample:
    """A served request, to be run again raw."""

    route: Route
    inputs: Mapping[str, Array]
    encoded: Mapping[str, EncodedTensor]
    outputs: Mapping[str, Array]
    level: int


@dataclass(frozen=True)
class Fallback:
    """The fallback level of a route for a request, and its facts for the response."""

    level: int = 0
    notes: Mapping[str, str | int] = field(default_factory=dict)


NO_FALLBACK = Fallback()


@dataclass
class GuardState:
    """A route's fallback chain, the level in force, and its latest checks; another prediction is a bad outcome."""

    chain: tuple[Choice, ...]
    measure: Measure
    limit: float
    level: int = 0
    checks: LatestOutcomes = field(default_factory=LatestOutcomes)

    def notes(self) -> dict[str, str | int]:
        """Facts for responses; empty at level 0."""
        if not self.level:
            return {}
        return {
            "guard_step": self.level,
            "guard_codec": str(self.chain[self.level]),
            "guard_instead_of": str(self.chain[0]),
        }

    def step(self) -> bool:
        """Move to the next level, with checks starting anew, where the limit is exceeded; whether that was so."""
        if self.level + 1 == len(self.chain) or not self.checks.exceed(1 - self.limit):
            return False
        self.level += 1
        self.checks.clear()
        return True


def fallback_chain(choice: Choice, cut: str, fidelity: Fidelity | None) -> tuple[Choice, ...]:
    """A choice and its fallbacks, each with less error: two higher qualities, int8, half, raw.

    The first fallback of a choice with closer looks is the last look's quality, for every request. A fallback that
    agreed no more often than its predecessor, as `fidelity` measured at `cut`, is left out.
    """
    measured = {e.choice: e.agreement for e in fidelity.entries if e.cut == cut} if fidelity else {}
    chain = [choice]
    last = choice.last
    if last.codec in GRADED and last.quality < 1:
        chain += [last, replace(last, quality=round((1 + last.quality) / 2, 3)), replace(last, quality=1.0)]
    elif last != choice:
        chain.append(last)
    start = _FALLBACKS.index(choice) + 1 if choice in _FALLBACKS else 0
    agreement = measured.get(choice, 0.0)
    for fallback in _FALLBACKS[start:]:
        if fallback == RAW or measured.get(fallback, 1.0) >= agreement:
            chain.append(fallback)
            agreement = max(agreement, measured.get(fallback, agreement))
    return tuple(dict.fromkeys(chain))


class Guard:
    """Checks a share of the requests with lossy codecs, singly, while no request is in flight."""

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
        # Not the global generator, which belongs to the program: the guard draws in a request's thread.
        self._deadline_s, self._draw = deadline_s, draw or random.Random().random  # noqa: S311
        self._lock = threading.Lock()
        self._states: LRUCache[RouteKey, GuardState] = LRUCache(MAX_ROUTES)
        self._unreadable: LRUCache[str, None] = LRUCache(MAX_ROUTES)  # bundles, so that the log names each once
        self._idle = IdleWork("guard", metrics.busy, log)
        self.exits = ExitGuard(metrics, log, deadline_s=deadline_s)

    def close(self) -> None:
        """Stop checking; a check under way goes on to its end."""
        self._idle.close()

    def apply_fallback(self, route: Route) -> tuple[Route, Fallback]:
        """The route with its fallback codec in force (unchanged at level 0), and the level; without a closed exit."""
        if route.exit is None:
            return self._apply_codec(route)
        open_route, notes = self.exits.apply(route)
        applied, fallback = self._apply_codec(open_route)
        return applied, replace(fallback, notes={**fallback.notes, **notes}) if notes else fallback

    def _apply_codec(self, route: Route) -> tuple[Route, Fallback]:
        if not route.encodings:
            return route, NO_FALLBACK
        with self._lock:
            state = self._states.get(_key(route))
            if state is None or not state.level:
                return route, NO_FALLBACK
            fallback = Fallback(state.level, state.notes())
            choice = state.chain[state.level]
        encodings = tuple(
            {name: e for name, encoding in each.items() if (e := _fallback_encoding(encoding, choice)) is not None}
            for each in route.encodings
        )
        return replace(route, encodings=encodings, looks=None), fallback

    def watch(
        self,
        route: Route,
        fallback: Fallback,
        inputs: Mapping[str, Array],
        encoded: Mapping[str, EncodedTensor],
        result: Result,
    ) -> None:
        """Draw whether this request is checked later; `route` is the route before `apply_fallback`."""
        encoded_names = {name for run in result.runs for name in run.codecs}
        # The exit's first: a codec's check may fail, and one whose late requests went missing would seem worse.
        jobs = [job] if (job := self.exits.job(route, inputs, encoded, result)) is not None else []
        if any(name in encoded_names and not is_exact(e) for each in route.encodings for name, e in each.items()):
            # Without the exit: of a fused prediction the part is compared that calibration measured.
            sample = Sample(route.full(), inputs, encoded, result.comparable, fallback.level)
            jobs.append(partial(self.check, sample))
        if jobs and self._draw() < self._share and not self._idle.is_closed:
            self._idle.offer(partial(_all, jobs))

    def check(self, sample: Sample) -> None:
        """Run the request raw, compare the predictions, and fall back where the limit is exceeded beyond chance.

        Raises:
            IsthmusError: the raw request failed.
        """
        state = self._state(sample.route)
        raw = sample.route.raw()
        expected = execute(raw, sample.inputs, job_context(self._deadline_s), sample.encoded)
        agreed = agrees(state.measure, expected.outputs, sample.outputs)
        self._metrics.guard_checked(agreed)
        with self._lock:
            if sample.level != state.level:
                return  # of a codec that is no longer in use
            state.checks.add(is_bad=not agreed)
            checked = state.checks.facts()
            is_fallback = state.step()
            states = self._states.values()
            self._metrics.guard_state(max(s.checks.share for s in states), max(s.level for s in states))
        if is_fallback:
            facts = {
                "bundle": sample.route.digest,
                "segments": [s.id for s in sample.route.segments],
                **checked,
                "limit": round(1 - state.limit, 4),
                **state.notes(),
            }
            self._log.warning("the guard stepped to a safer codec", extra={"facts": facts})

    def _state(self, route: Route) -> GuardState:
        key = _key(route)
        with self._lock:
            if (state := self._states.get(key)) is not None:
                return state
        fidelity = self._fidelity(route)
        measure = fidelity.measure if fidelity is not None else measure_for(route.bundle)
        limit = fidelity.limit if fidelity is not None else LIMIT
        chain = fallback_chain(_coarsest(route), _cut(route), fidelity)
        with self._lock:
            return self._states.setdefault(key, GuardState(chain, measure, limit))

    def _fidelity(self, route: Route) -> Fidelity | None:
        try:
            return self._fidelities(route.bundle)
        except IsthmusError as e:
            with self._lock:
                is_logged = route.digest in self._unreadable
                self._unreadable[route.digest] = None
            if not is_logged:
                facts = {"bundle": route.digest, "type": type(e).__name__, "error": e.message, "hint": e.hint}
                self._log.warning(
                    "the guard cannot read what was calibrated, and checks nothing", extra={"facts": facts}
                )
            raise


def _all(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job()


def _fallback_encoding(encoding: Encoding, choice: Choice) -> Encoding | None:
    """A tensor's encoding at the fallback `choice`; None for raw."""
    if is_exact(encoding):
        return encoding
    if choice == RAW:
        return None
    if choice.codec == encoding.codec:
        return replace(encoding, quality=max(encoding.quality, choice.quality))
    return Encoding(choice.codec, choice.quality)


def _coarsest(route: Route) -> Choice:
    """The choice common to the route's lossy encodings; of several, the lowest quality."""
    lossy = [Choice(e.codec, e.quality) for each in route.encodings for e in each.values() if not is_exact(e)]
    coarsest = min(lossy, key=lambda c: (c.quality, c.codec), default=RAW)
    return coarsest if route.looks is None else replace(coarsest, looks=route.looks.looks)


def _cut(route: Route) -> str:
    """The cut before the first segment with a lossy input."""
    for segment, each in zip(route.segments, route.encodings, strict=False):
        if any(not is_exact(e) for e in each.values()):
            return segment.id.start
    return ""


def _key(route: Route) -> RouteKey:
    encodings = tuple((name, e.codec, e.quality) for each in route.encodings for name, e in each.items())
    looks = () if route.looks is None else route.looks.looks
    return route.digest, tuple(s.id for s in route.segments), encodings, looks
