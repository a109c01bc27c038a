"""The trials of a router's aliases, and the rollback of a canary that breaks its rule.

A rollback is the router's own at once: none of its requests goes to the canary any more. Then the alias moves by
compare-and-set, so that other routers follow; a router that may not write says so, and judges for itself alone.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from cachetools import LRUCache

from isthmus.artifacts.alias import Alias
from isthmus.errors import AliasMoved, IsthmusError
from isthmus.registry import Registry
from isthmus.routing.canary_trial import CanaryTrial
from isthmus.routing.candidates import ServedModel
from isthmus.routing.state import TrialState
from isthmus.security.audit import AuditLog

# Trials in the state and the metrics; an alias has one at a time.
MAX_TRIALS = 16
# From one attempt to move an alias to the next; the registry may let the router write again.
_RETRY_S = 60.0


class CanaryTrials:
    """The latest MAX_TRIALS trials; thread-safe."""

    def __init__(self, registry: Registry, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._log, self._clock = registry, log, clock
        self._lock = threading.Lock()
        self._trials: LRUCache[tuple[str, str, str, int], CanaryTrial] = LRUCache(MAX_TRIALS)
        self._tried_at: dict[tuple[str, str, str, int], float] = {}
        # A thread of its own: a registry that hangs must not hold up requests.
        self._mover = ThreadPoolExecutor(max_workers=1, thread_name_prefix="canary-rollback")

    @property
    def any_begun(self) -> bool:
        """Whether an alias had a canary since the start; without a lock, for requests where none has."""
        return bool(self._trials)

    def trial(self, alias: Alias, stable: ServedModel, tried: ServedModel) -> CanaryTrial | None:
        """The trial of an alias's canary, begun or gone on with; None where this router rolled the canary back."""
        if (canary := alias.canary) is None:
            return None
        begun = CanaryTrial(alias, canary, stable, tried)
        with self._lock:
            trial = self._trials.setdefault(begun.key, begun)
            trial.with_document(alias, canary)
        if trial.reason:
            self._move_later(trial)
            return None
        return trial

    def of(self, model: ServedModel) -> CanaryTrial | None:
        """A trial under way with this version in it."""
        if not self.any_begun:
            return None
        with self._lock:
            trials = list(self._trials.values())
        digests = ((trial, (trial.stable.digest, trial.tried.digest)) for trial in trials if not trial.reason)
        return next((trial for trial, pair in digests if model.digest in pair), None)

    def answered(self, model: str, alias: str, release: str, seconds: float, *, is_error: bool) -> None:
        """Add a request of an alias to its trial, and roll the canary back where that breaks the rule."""
        if (trial := self._running(model, alias)) is not None:
            trial.answered(release, seconds, is_error=is_error)
            self.judge(trial)

    def judge(self, trial: CanaryTrial) -> None:
        """Roll the canary of a trial back if it breaks the rule."""
        if trial.reason or not (reason := trial.verdict()):
            return
        with self._lock:
            if trial.reason:
                return
            trial.reason = reason
        state = trial.state()
        facts = {"alias": f"{state.model}:{state.alias}", "reason": reason, "canary": state.canary.version}
        self._log.warning("a canary was rolled back", extra={"facts": facts | _facts(state)})
        self._move_later(trial)

    def states(self) -> tuple[TrialState, ...]:
        """All trials, the ended ones too, until others take their place."""
        with self._lock:
            return tuple(trial.state() for trial in self._trials.values())

    def close(self) -> None:
        """End the thread; a move under way goes on to its end."""
        self._mover.shutdown(wait=False, cancel_futures=True)

    def _running(self, model: str, alias: str) -> CanaryTrial | None:
        with self._lock:
            named = (t for t in self._trials.values() if (t.alias.name, t.alias.alias) == (model, alias))
            return next((trial for trial in named if not trial.reason), None)

    def _move_later(self, trial: CanaryTrial) -> None:
        now = self._clock()
        with self._lock:
            if trial.is_alias_moved or now - self._tried_at.get(trial.key, -_RETRY_S) < _RETRY_S:
                return
            self._tried_at = {key: at for key, at in self._tried_at.items() if key in self._trials} | {trial.key: now}
        self._mover.submit(self._move, trial)

    def _move(self, trial: CanaryTrial) -> None:
        """Move the alias off the canary, unless somebody did meanwhile."""
        alias = f"{trial.alias.name}:{trial.alias.alias}"
        try:
            trial.is_alias_moved = self._end_canary(trial)
        except Exception as e:  # in a thread whose errors nobody would see
            facts = {"alias": alias, "type": type(e).__name__, "error": str(e)}
            facts |= {"hint": e.hint} if isinstance(e, IsthmusError) else {}
            self._log.warning(
                "the alias keeps its canary: this router may not move it, and other routers judge for themselves",
                extra={"facts": facts},
            )

    def _end_canary(self, trial: CanaryTrial) -> bool:
        name, alias = trial.alias.name, trial.alias.alias
        who, audit = f"router {platform.node()}", AuditLog(self._registry.store, self._registry.retry_policy)
        while True:
            present = self._registry.alias(name, alias)
            canary = present.canary
            if canary is None or (canary.digest, canary.began) != (trial.canary.digest, trial.canary.began):
                return True  # moved by another router, or by its owner
            try:
                self._registry.move_alias(name, alias, present.number, moved_by=who, expected=present.counter)
            except AliasMoved:
                continue
            state = trial.state()
            facts = {"model": name, "alias": alias, "version": present.number, "canary": str(canary.version)}
            audit.append(who, "canary rollback", facts | {"reason": trial.reason} | _facts(state))
            self._log.info("the alias was moved off its canary", extra={"facts": facts})
            return True


def _facts(state: TrialState) -> dict[str, int | float | None]:
    return {
        "requests": state.canary.requests,
        "errors": state.canary.errors,
        "median_s": state.canary.median_s,
        "stable_median_s": state.stable.median_s,
        "agreed": state.agreed,
        "differed": state.differed,
    }
