"""The gateway's own metrics, under OpenFaaS's names."""

from __future__ import annotations

from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """What GET /metrics answers."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ["function_name", "code"]
        self._calls = Counter("gateway_function_invocation", "Calls to functions.", labels, registry=self._registry)
        self._seconds = Histogram(
            "gateway_functions_seconds",
            "Time that a function took to answer.",
            labels,
            registry=self._registry,
        )
        # Looking labels up costs more than counting; functions and statuses are few.
        self._labelled = lru_cache(256)(lambda *names: (self._calls.labels(*names), self._seconds.labels(*names)))
        self._replicas = Gauge(
            "gateway_service_count", "Replicas of a function.", ["function_name"], registry=self._registry
        )

    def count(self, function: str, status: int, seconds: float) -> None:
        """Note one answered call of `function`, NAME.NAMESPACE."""
        calls, times = self._labelled(function, str(status))
        calls.inc()
        times.observe(seconds)

    def expose(self, replicas: dict[str, int]) -> bytes:
        """Everything, in Prometheus's text format."""
        self._replicas.clear()
        for function, number in replicas.items():
            self._replicas.labels(function).set(number)
        return generate_latest(self._registry)
