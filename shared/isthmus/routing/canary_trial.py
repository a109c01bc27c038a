"""The trial of a canary: what the requests of its two versions show, and the verdict by the canary's rule.

Source: docs/how-to/canary.md.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from dataclasses import dataclass, field

from isthmus.artifacts.alias import Alias
from isthmus.artifacts.bounds import exceeds
from isthmus.artifacts.canary import Canary, CanaryRule
from isthmus.routing.candidates import ServedModel
from isthmus.routing.latest_outcomes import WINDOW, LatestOutcomes
from isthmus.routing.state import ReleaseCounts, TrialState

# Callers of an alias with a canary have one of these releases.
STABLE, CANARY = "stable", "canary"


@dataclass
class _Requests:
    """The requests of one version: all of them counted, and the latest remembered."""

    count: int = 0
    errors: int = 0
    latest: LatestOutcomes = field(default_factory=LatestOutcomes)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, seconds: float, *, is_error: bool) -> None:
        self.count += 1
        self.errors += is_error
        self.latest.add(is_bad=is_error)
        if not is_error:  # a failure may be quick, or last until the deadline
            self.seconds.append(seconds)

    def counts(self, version: str) -> ReleaseCounts:
        median_s = statistics.median(self.seconds) if self.seconds else None
        return ReleaseCounts(version, self.count, self.errors, median_s)


class CanaryTrial:
    """The two versions of an alias with a canary, and the evidence of their requests; thread-safe."""

    def __init__(self, alias: Alias, canary: Canary, stable: ServedModel, tried: ServedModel) -> None:
        self.alias, self.canary, self.stable, self.tried = alias, canary, stable, tried
        self.reason = ""
        """The part of the rule that ended the trial; empty while it runs."""
        self.is_alias_moved = False
        self._lock = threading.Lock()
        self._stable, self._tried = _Requests(), _Requests()
        self._outcomes = LatestOutcomes()
        self._agreed = self._differed = self._failed = 0

    @property
    def key(self) -> tuple[str, str, str, int]:
        """The same for all moves of the alias that leave this canary on trial."""
        return self.alias.name, self.alias.alias, self.canary.digest, self.canary.began

    def with_document(self, alias: Alias, canary: Canary) -> None:
        """Take share and rule of a later document of the same trial."""
        self.alias, self.canary = alias, canary

    def answered(self, release: str, seconds: float, *, is_error: bool) -> None:
        """Add the outcome of a request. Units: seconds of its work, of a generation those for each token."""
        with self._lock:
            (self._tried if release == CANARY else self._stable).add(seconds, is_error=is_error)

    def compared(self, agreed: bool | None) -> None:
        """Add a comparison of both versions' predictions; None where a hop or the deadline prevented it."""
        with self._lock:
            if agreed is None:
                self._failed += 1
                return
            self._agreed += agreed
            self._differed += not agreed
            self._outcomes.add(is_bad=not agreed)

    def verdict(self) -> str:
        """The part of the rule that the canary breaks beyond chance: errors, disagreement or latency; or empty."""
        with self._lock:
            return _verdict(self.canary.rule, self._stable, self._tried, self._outcomes)

    def state(self) -> TrialState:
        """The counts so far."""
        with self._lock:
            return TrialState(
                self.alias.name,
                self.alias.alias,
                0.0 if self.reason else self.canary.share,
                self._stable.counts(self.stable.version),
                self._tried.counts(self.tried.version),
                self._agreed,
                self._differed,
                self._failed,
                self.reason,
                self.is_alias_moved,
            )


def _verdict(rule: CanaryRule, stable: _Requests, tried: _Requests, outcomes: LatestOutcomes) -> str:
    # The least number is for comparisons too: the first ones may be of one caller that repeats a request.
    is_enough = len(outcomes) >= min(rule.min_requests, WINDOW)
    if is_enough and outcomes.exceed(rule.max_disagreement, rule.confidence):
        return "disagreement"
    if tried.count < rule.min_requests:
        return ""
    # Where a hop is away both versions fail: only what the canary fails beyond that is the canary's.
    max_errors = min(1.0, rule.max_errors + stable.latest.share)
    if tried.latest.exceed(max_errors, rule.confidence):
        return "errors"
    if len(stable.seconds) < rule.min_requests or not tried.seconds:
        return ""
    # A sign test: if the canary's median were within the limit, at most half of its requests would be beyond it.
    limit_s = rule.max_latency_ratio * statistics.median(stable.seconds)
    slower = sum(seconds > limit_s for seconds in tried.seconds)
    return "latency" if exceeds(slower, len(tried.seconds), 0.5, rule.confidence) else ""
