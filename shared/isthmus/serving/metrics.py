"""What a function tells Prometheus; docs/metrics.md lists the names."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

if TYPE_CHECKING:  # a router whose hops are all remote never loads onnxruntime
    from isthmus.pipeline import LooksTaken
    from isthmus.runtime.store import SegmentStore

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """One function's metrics, in a collector registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        r = self._registry
        self.requests = Counter(
            "isthmus_requests", "Requests answered, by endpoint and status.", ["endpoint", "code"], registry=r
        )
        self.request_seconds = Histogram(
            "isthmus_request_seconds", "Time to answer a request.", ["endpoint"], buckets=_SECONDS, registry=r
        )
        self.stage_seconds = Histogram(
            "isthmus_stage_seconds",
            "Time in one stage of a request: decode, load, wait, run, encode, preprocess, packing, a hop, postprocess.",
            ["stage"],
            buckets=_SECONDS,
            registry=r,
        )
        # Looking a label up costs more than counting; endpoints, codes and stages are few.
        self._answers = lru_cache(256)(
            lambda endpoint, code: (self.requests.labels(endpoint, code), self.request_seconds.labels(endpoint))
        )
        self.stage = lru_cache(256)(lambda stage: self.stage_seconds.labels(stage))
        self.in_flight = Gauge("isthmus_requests_in_flight", "Requests being worked on.", registry=r)
        self.received = Counter("isthmus_received_bytes", "Bytes of request bodies.", registry=r)
        self.sent = Counter("isthmus_sent_bytes", "Bytes of response bodies.", registry=r)
        self.hop_tensors = Counter(
            "isthmus_hop_tensor_bytes", "Bytes of the tensors given to a hop, before packing.", ["hop"], registry=r
        )
        self.hop_sent = Counter("isthmus_hop_sent_bytes", "Bytes of frames sent to a hop.", ["hop"], registry=r)
        self.hop_received = Counter(
            "isthmus_hop_received_bytes", "Bytes of frames received from a hop.", ["hop"], registry=r
        )
        self._hops = lru_cache(64)(
            lambda hop: tuple(c.labels(hop) for c in (self.hop_tensors, self.hop_sent, self.hop_received))
        )
        self.hop_errors = Counter(
            "isthmus_hop_errors", "Calls to a hop that failed for good.", ["hop", "error"], registry=r
        )
        self.closer_looks = Counter(
            "isthmus_closer_looks", "Closer looks that answers took, where their route has some.", registry=r
        )
        self.looked_answers = Counter(
            "isthmus_looked_answers",
            "Answers of such routes: sure, after the last look, late or failed.",
            ["outcome"],
            registry=r,
        )
        self.guard_checks = Counter(
            "isthmus_guard_checks", "Encoded answers compared with the raw answer to the same inputs.", registry=r
        )
        self.guard_disagreements = Counter(
            "isthmus_guard_disagreements", "Of these, answers that were not the same.", registry=r
        )
        self.guard_disagreement = Gauge(
            "isthmus_guard_disagreement",
            "Share of the latest checks that were not the same, of the route where it is largest.",
            registry=r,
        )
        self.guard_step = Gauge(
            "isthmus_guard_step", "Steps to a safer codec, of the route with the most; 0 where none was.", registry=r
        )

    def answered(self, endpoint: str, code: int, seconds: float, size: int) -> None:
        """Count one answer and its time."""
        count, times = self._answers(endpoint, code)
        count.inc()
        times.observe(seconds)
        self.sent.inc(size)

    def looked(self, looked: LooksTaken) -> None:
        """Count how one answer's closer looks went."""
        self.closer_looks.inc(looked.taken)
        self.looked_answers.labels(looked.outcome).inc()

    def crossed(self, hop: str, tensors: int, sent: int, received: int) -> None:
        """Count what one call of a hop moved. Units: bytes."""
        for counter, count in zip(self._hops(hop), (tensors, sent, received), strict=True):
            counter.inc(count)

    def guard_checked(self, agreed: bool) -> None:
        """Count one check of the guard."""
        self.guard_checks.inc()
        self.guard_disagreements.inc(not agreed)

    def guard_state(self, disagreement: float, level: int) -> None:
        """Set what the guard found: the largest share of disagreements, and the highest fallback level."""
        self.guard_disagreement.set(disagreement)
        self.guard_step.set(level)

    def busy(self) -> float:
        """Requests being worked on now."""
        return sum(sample.value for metric in self.in_flight.collect() for sample in metric.samples)

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read when it is scraped."""
        Gauge(name, help, registry=self._registry).set_function(read)

    def gauge_store(self, store: SegmentStore) -> None:
        """Add what `store` holds."""
        self.gauge("isthmus_loaded_segments", "Segments in memory.", lambda: float(len(store.loaded())))
        self.gauge(
            "isthmus_loaded_bytes",
            "Weights of the segments in memory.",
            lambda: float(sum(s.bytes for s in store.loaded())),
        )

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that `accept` prefers, and its content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type
