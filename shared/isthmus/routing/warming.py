"""Segments follow: hops load the segments of candidate routes in the background, before traffic moves there.

A thread asks each hop for the segments of each candidate: the plan's choice first, then the route of the first hop
alone, which answers while the link is down, then the quickest. A function loads in the order of the questions, within
its own bound, and evicts nothing that is in use for a load ahead (`SegmentMemory`): so the routes that fit are the
first of this order, and they stay. Source: docs/explanation/routing.md, "Segments follow".
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from isthmus.context import Deadline
from isthmus.errors import (
    HopBusy,
    HopMismatch,
    HopTimeout,
    HopUnavailable,
    IsthmusError,
    MemoryInUse,
    NotReady,
    Overloaded,
    SegmentTooLarge,
)
from isthmus.routing.candidates import RouteCandidate, ServedModel
from isthmus.routing.replicas import RoutedHop

# Versions whose segments are asked for; callers name versions.
MAX_MODELS = 32
# A version without requests for so long is left alone: questions would keep an idle function from scaling to zero.
WANTED_S = 60.0
# A hop is asked again about loaded segments; a third of the time for which it keeps them from being evicted.
RECHECK_S = 20.0
# Pauses between questions about a segment that is being loaded, or to a hop that does not respond, doubling.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.05, 1.0
# A segment without room, or that cannot be loaded, is asked for again after so long.
_REFUSED_S = 30.0
# A question reads a manifest at most; a hop that takes longer is asked later.
_ASK_S = 2.0
# The longest that an alias stays at its old version for the segments of the new one.
MAX_MOVE_WAIT_S = 10.0
# The look-up of an alias waits for a quick load: the request that finds an old entry then gets the new version.
PREPARE_S, _POLL_S = 0.2, 0.005

_MISMATCH_ADVICE = (
    "a function of isthmus package serves one bundle, and no canary: deploy it from the version, or with a registry"
)
_PASSING = (HopUnavailable, HopTimeout, HopBusy, NotReady, Overloaded)

SegmentKey = tuple[str, str, str]
"""A hop's name, a bundle's digest, a segment's id."""


@dataclass
class _Question:
    """When a hop is asked next, the pause after that, and its last word. Units: seconds of the monotonic clock."""

    due: float = -math.inf
    pause_s: float = _FIRST_PAUSE_S
    reply: Literal["", "loaded", "loading", "refused", "mismatch"] = ""

    def back_off(self, now: float) -> None:
        """Ask again after a pause, twice as long as the last."""
        self.due = now + self.pause_s
        self.pause_s = min(2 * self.pause_s, _MAX_PAUSE_S)

    def settle(self, reply: Literal["loaded", "refused"], due: float) -> None:
        """Ask again at `due`, the pauses anew."""
        self.reply, self.due, self.pause_s = reply, due, _FIRST_PAUSE_S


@dataclass
class _WarmModel:
    """A version whose routes are kept loaded."""

    model: ServedModel
    order: tuple[RouteCandidate, ...]
    began: float
    wanted_at: float
    was_loaded: bool = False
    """Whether the plan's choice was loaded once; until then it is chosen in any case."""
    names: frozenset[str] = field(default_factory=frozenset)


class Warming:
    """Keeps the segments of candidate routes loaded, and knows which candidates are; thread-safe."""

    def __init__(
        self, hops: Sequence[RoutedHop], log: logging.Logger, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._hops = {hop.name: hop for hop in hops}
        self._first = hops[0].name
        self._log, self._clock = log, clock
        self._lock = threading.Lock()
        self._models: dict[str, _WarmModel] = {}
        self._questions: dict[SegmentKey, _Question] = {}
        # Of hops that gave no response, whatever they were asked for.
        self._pauses = {hop.name: _Question() for hop in hops}
        self._changed, self._closed = threading.Event(), False
        self._thread: threading.Thread | None = None
        for hop in hops:
            hop.memory.on_change = self._update

    def loaded(self, model: ServedModel) -> frozenset[str]:
        """Names of the candidates whose segments are loaded, for a request of the model.

        The plan's choice is among them until it was loaded once, and where no other is.
        """
        warm = self._models.get(model.digest)
        if warm is None:
            warm = self._add(model)
        elif (now := self._clock()) - warm.wanted_at > 1.0:  # a write and a wake-up a second are enough
            is_back = now - warm.wanted_at > WANTED_S
            warm.wanted_at = now
            if is_back:
                self._changed.set()
        return warm.names

    def state(self, model: ServedModel) -> frozenset[str]:
        """As `loaded`, without a request."""
        warm = self._models.get(model.digest)
        return warm.names if warm is not None else frozenset((model.route.name,))

    def prepare(self, model: ServedModel) -> bool:
        """Whether requests may move to a new version, whose segments begin to load; waits for at most PREPARE_S.

        They may once the plan's choice is loaded or cannot be loaded ahead, and after MAX_MOVE_WAIT_S in any case but
        one: functions that hold another bundle would refuse them.
        """
        self.loaded(model)
        until = time.monotonic() + PREPARE_S
        while not (may_move := self._may_move(model)) and time.monotonic() < until:
            time.sleep(_POLL_S)
        return may_move

    def holds(self, model: ServedModel) -> bool:
        """Whether the functions of the plan's choice have its segments in memory, asked now."""
        return all(self._ask_now(key) for key in _keys(model.route))

    def _ask_now(self, key: SegmentKey) -> bool:
        name, bundle, segment = key
        hop = self._hops[name]
        try:
            is_loaded = hop.load(bundle, segment, Deadline.after(_ASK_S))
        except IsthmusError:
            is_loaded = False
        hop.memory.tell(bundle, segment, is_loaded=is_loaded)
        return is_loaded

    def close(self) -> None:
        """End the thread; a question under way goes on to its end."""
        self._closed = True
        self._changed.set()

    def _may_move(self, model: ServedModel) -> bool:
        warm = self._models.get(model.digest)
        if warm is None or warm.was_loaded:
            return True
        replies = [question.reply for key in _keys(model.route) if (question := self._questions.get(key)) is not None]
        has_waited = self._clock() - warm.began > MAX_MOVE_WAIT_S
        if "mismatch" in replies:
            return has_waited and any(self._is_loaded(candidate) for candidate in warm.order)
        return has_waited or "refused" in replies

    def _add(self, model: ServedModel) -> _WarmModel:
        now = self._clock()
        warm = _WarmModel(model, _load_order(model, self._first), now, now)
        with self._lock:
            warm = self._models.setdefault(model.digest, warm)
            if len(self._models) > MAX_MODELS:
                del self._models[min(self._models.values(), key=lambda each: each.wanted_at).model.digest]
            if self._thread is None and not self._closed:
                # A daemon: a hop that never responds must not hold up the end of the process.
                self._thread = threading.Thread(target=self._run, name="warming", daemon=True)
                self._thread.start()
        self._update()
        return warm

    def _update(self) -> None:
        """See anew which candidates are loaded, and have the thread ask for the others."""
        for warm in list(self._models.values()):
            names = {c.name for c in warm.order if self._is_loaded(c)}
            choice = warm.model.route.name
            warm.was_loaded = warm.was_loaded or choice in names
            warm.names = frozenset(names if names and warm.was_loaded else {*names, choice})
        self._changed.set()

    def _is_loaded(self, candidate: RouteCandidate) -> bool:
        return all((bundle, segment) in self._hops[hop].memory for hop, bundle, segment in _keys(candidate))

    def _run(self) -> None:
        while not self._closed:
            self._changed.clear()
            try:
                wait_s = self.ask()
            except Exception as e:  # a defect must not leave candidates unloaded for good, in silence
                self._log.error("unexpected while segments were asked for: %s", type(e).__name__, exc_info=e)
                wait_s = _REFUSED_S
            self._changed.wait(wait_s)

    def ask(self) -> float:
        """Ask every question that is due; seconds until the next is."""
        now = self._clock()
        with self._lock:
            wanted = [warm for warm in self._models.values() if now - warm.wanted_at <= WANTED_S]
        keys = {key for warm in wanted for key in self._ask_for(warm)}
        # Versions come and go.
        self._questions = {key: question for key, question in self._questions.items() if key in keys}
        dues = [self._due(key, question) for key, question in self._questions.items()]
        return max(0.0, min(dues) - self._clock()) if dues else RECHECK_S

    def _ask_for(self, warm: _WarmModel) -> Iterator[SegmentKey]:
        """Ask for the segments of each candidate, as far as its hops have room for them."""
        for candidate in warm.order:
            for key in _keys(candidate):
                question = self._questions.setdefault(key, _Question())
                if not self._closed and self._due(key, question) <= self._clock():
                    self._put(key, question)
                yield key
                if question.reply in ("refused", "mismatch"):
                    break

    def _due(self, key: SegmentKey, question: _Question) -> float:
        """When to ask: of a segment that was loaded and is lost at once, but not before the hop's pause is over."""
        hop, bundle, segment = key
        is_lost = question.reply == "loaded" and (bundle, segment) not in self._hops[hop].memory
        return max(-math.inf if is_lost else question.due, self._pauses[hop].due)

    def _put(self, key: SegmentKey, question: _Question) -> None:
        name, bundle, segment = key
        hop = self._hops[name]
        try:
            is_loaded = hop.load(bundle, segment, Deadline.after(_ASK_S))
        except _PASSING:
            self._pauses[name].back_off(self._clock())
            question.due = self._pauses[name].due  # a lost segment's own was that of its next check
            return
        except HopMismatch as e:
            # Of head and tail one after the other, too, until both have the version.
            if question.reply != "mismatch":
                self._log_not_taken(key, e.message, "its function holds another bundle", _MISMATCH_ADVICE)
            question.reply = "mismatch"
            question.back_off(self._clock())
            is_loaded = False
        except IsthmusError as e:
            self._refused(key, question, e)
            is_loaded = False
        else:
            self._pauses[name] = _Question()
            if is_loaded:
                question.settle("loaded", self._clock() + RECHECK_S)
            else:
                question.reply = "loading"
                question.back_off(self._clock())
        hop.memory.tell(bundle, segment, is_loaded=is_loaded)

    def _refused(self, key: SegmentKey, question: _Question, error: IsthmusError) -> None:
        if question.reply != "refused":
            is_memory = isinstance(error, MemoryInUse | SegmentTooLarge)
            why = "the hop has no room for its segment" if is_memory else "its segment cannot be loaded"
            self._log_not_taken(key, error.message, why, error.hint)
        question.settle("refused", self._clock() + _REFUSED_S)

    def _log_not_taken(self, key: SegmentKey, error: str, why: str, hint: str) -> None:
        hop, bundle, segment = key
        facts = {"hop": hop, "bundle": bundle, "segment": segment, "error": error, "hint": hint}
        self._log.info("a route is not taken: %s", why, extra={"facts": facts})


def _keys(candidate: RouteCandidate) -> list[SegmentKey]:
    route = candidate.route
    keys = [(hop.name, route.digest, str(segment.id)) for segment, hop in zip(route.segments, route.hops, strict=True)]
    if route.exit is not None:  # runs where the head does, in the same calls
        keys.insert(1, (route.hops[0].name, route.digest, str(route.exit.segment.id)))
    return keys


def _load_order(model: ServedModel, first_hop: str) -> tuple[RouteCandidate, ...]:
    """The plan's choice, the quickest route of the first hop alone, then the others, the quickest first."""

    def rank(candidate: RouteCandidate) -> float:
        return math.inf if candidate.planned_s is None else candidate.planned_s

    quickest = sorted(model.candidates, key=rank)
    alone = [c for c in quickest if c.hops == (first_hop,)][:1]
    return tuple({c.name: c for c in (model.route, *alone, *quickest)}.values())
