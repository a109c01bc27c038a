"""Prometheus metrics of versions and canaries; docs/reference/metrics.md, "Versions and canaries".

Labels are names of published models and their aliases; never texts of callers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from cachetools import LRUCache
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from isthmus.routing.canary_trial import CANARY, STABLE
from isthmus.routing.state import TrialState
from isthmus.settings import RouterSettings

# Versions with series of their own, the latest ones: whoever can call the router chooses among all published ones.
MAX_VERSIONS = 16
REASONS = ("errors", "disagreement", "latency")


class VersionMetrics(Collector):
    """Requests by version, and the trials of canaries."""

    def __init__(self, settings: RouterSettings, trials: Callable[[], Sequence[TrialState]]) -> None:
        self._settings, self._trials = settings, trials
        self._lock = threading.Lock()
        self._counts: LRUCache[tuple[str, str], list[int]] = LRUCache(MAX_VERSIONS)

    def count(self, model: str, version: str, *, is_error: bool) -> None:
        """Count a request that a version served, or failed."""
        with self._lock:
            counts = self._counts.setdefault((model, version), [0, 0])
            counts[is_error] += 1

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        with self._lock:
            counts = {key: tuple(each) for key, each in self._counts.items() if self._settings.tells_of(key[0])}
        requests = CounterMetricFamily(
            "isthmus_version_requests",
            "Requests that a version served (ok) or failed (error).",
            labels=["model", "version", "outcome"],
        )
        for key, (served, failed) in counts.items():
            requests.add_metric([*key, "ok"], served)
            requests.add_metric([*key, "error"], failed)
        yield requests
        yield from self._of_trials()

    def _of_trials(self) -> Iterator[Metric]:
        alias = ["model", "alias"]
        share = GaugeMetricFamily("isthmus_canary_share", "Share of an alias's callers with the canary.", labels=alias)
        requests = CounterMetricFamily(
            "isthmus_canary_requests",
            "Requests of an alias with a canary, by release and outcome.",
            labels=[*alias, "release", "outcome"],
        )
        compared = CounterMetricFamily(
            "isthmus_canary_comparisons", "Requests run with both versions, by outcome.", labels=[*alias, "outcome"]
        )
        rollbacks = CounterMetricFamily(
            "isthmus_canary_rollbacks", "Canaries that this router rolled back.", labels=[*alias, "reason", "moved"]
        )
        # An alias has a trial after the other: the latest one is in force, and its series begins anew.
        latest = {(t.model, t.alias): t for t in self._trials() if self._settings.tells_of(t.model)}
        for key, trial in latest.items():
            share.add_metric(list(key), trial.share)
            for release, counts in ((STABLE, trial.stable), (CANARY, trial.canary)):
                requests.add_metric([*key, release, "ok"], counts.requests - counts.errors)
                requests.add_metric([*key, release, "error"], counts.errors)
            for outcome, number in (
                ("agreed", trial.agreed),
                ("differed", trial.differed),
                ("failed", trial.not_compared),
            ):
                compared.add_metric([*key, outcome], number)
            for reason in REASONS:
                for moved in (True, False):
                    is_it = trial.reason == reason and trial.is_alias_moved == moved
                    rollbacks.add_metric([*key, reason, "yes" if moved else "no"], float(is_it))
        yield from (share, requests, compared, rollbacks)
