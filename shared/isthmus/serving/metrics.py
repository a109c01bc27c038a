"""A function's Prometheus metrics; docs/reference/metrics.md lists their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from isthmus.serving.request import Timings
from isthmus.settings import RouterSettings, urls_of

if TYPE_CHECKING:  # a router with remote hops alone never loads onnxruntime
    from isthmus.pipeline import LooksTaken
    from isthmus.runtime.batching import BatchCounts
    from isthmus.runtime.session_store import SessionStore
    from isthmus.runtime.sessions import SessionCounts

# Kinds of steps and reasons of `runtime.sessions`: each has a series from the start, so that rates have a first value.
KINDS, REASONS = ("prefill", "decode", "verify"), ("ended", "evicted", "expired")
# From the run of a small segment to the default deadline and a little beyond.
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class _Counts(Collector):
    """Counts that their owner keeps."""

    def __init__(self, name: str, help: str, label: str, read: Callable[[], Mapping[str, int]]) -> None:
        self._name, self._help, self._label, self._read = name, help, label, read

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        family = CounterMetricFamily(self._name, self._help, labels=[self._label])
        for value, count in self._read().items():
            family.add_metric([value], count)
        yield family


class FunctionMetrics:
    """A function's metrics, in a collector registry of their own."""

    def __init__(self) -> None:
        # Not the default of prometheus_client, where the names of a second app in this process would clash.
        self._registry = CollectorRegistry()
        r = self._registry
        self.requests = Counter(
            "isthmus_requests", "Requests answered, by endpoint and status.", ["endpoint", "code"], registry=r
        )
        self.request_seconds = Histogram(
            "isthmus_request_seconds", "Time to answer a request.", ["endpoint"], buckets=SECONDS, registry=r
        )
        self.stage_seconds = Histogram(
            "isthmus_stage_seconds",
            "Time in one stage of a request: decode, load, wait, run, encode, preprocess, packing, a hop, postprocess.",
            ["stage"],
            buckets=SECONDS,
            registry=r,
        )
        self.caller_requests = Counter(
            "isthmus_caller_requests",
            "Responses by caller, by its name in the secret callers, `token`, `anyone` or `none`.",
            ["caller", "outcome"],
            registry=r,
        )
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
        self.exits = Counter(
            "isthmus_exits",
            "Answers of routes with an exit: taken there, unsure and so the full model's, or cut off behind it.",
            ["outcome"],
            registry=r,
        )
        self.exit_checks = Counter(
            "isthmus_exit_checks",
            "Answers of routes with an exit of which the guard knows the full model's; unsure ones are that.",
            registry=r,
        )
        self.exit_disagreements = Counter(
            "isthmus_exit_disagreements", "Of these, early answers that were not the full model's.", registry=r
        )
        self.exit_disagreement = Gauge(
            "isthmus_exit_disagreement",
            "Share of the latest checks that were not the same, of the exit where it is largest.",
            registry=r,
        )
        self.exits_closed = Gauge("isthmus_exits_closed", "Exits that the guard closed.", registry=r)
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

    def count_response(self, endpoint: str, code: int, size: int, timings: Timings) -> None:
        """Count a response with the seconds of the whole and of its stages. Units: bytes."""
        self.requests.labels(endpoint, code).inc()
        self.request_seconds.labels(endpoint).observe(timings.elapsed())
        self.sent.inc(size)
        for stage, seconds, _ in timings.stages:
            self.stage_seconds.labels(stage).observe(seconds)

    def count_caller(self, caller: str, code: int) -> None:
        """Count a response to a caller: served, refused (401, 403), limited (429) or failed."""
        outcome = {401: "refused", 403: "refused", 429: "limited"}.get(code, "failed" if code >= 400 else "served")
        self.caller_requests.labels(caller, outcome).inc()

    def count_looks(self, looks: LooksTaken) -> None:
        """Count the closer looks of a prediction."""
        self.closer_looks.inc(looks.count)
        self.looked_answers.labels(looks.outcome).inc()

    def count_exit(self, outcome: str) -> None:
        """Count a request that met an exit."""
        self.exits.labels(outcome).inc()

    def count_call(self, hop: str, tensor_bytes: int, sent_bytes: int, received_bytes: int) -> None:
        """Count a call of a hop. Units: bytes."""
        self.hop_tensors.labels(hop).inc(tensor_bytes)
        self.hop_sent.labels(hop).inc(sent_bytes)
        self.hop_received.labels(hop).inc(received_bytes)

    def guard_checked(self, agreed: bool) -> None:
        """Count a check of the guard."""
        self.guard_checks.inc()
        self.guard_disagreements.inc(not agreed)

    def guard_state(self, disagreement: float, level: int) -> None:
        """Set the largest share of disagreements and the highest fallback level of all routes."""
        self.guard_disagreement.set(disagreement)
        self.guard_step.set(level)

    def exit_checked(self, agreed: bool) -> None:
        """Count a request of an exit's sample."""
        self.exit_checks.inc()
        self.exit_disagreements.inc(not agreed)

    def exit_state(self, disagreement: float, closed: int) -> None:
        """Set the largest share of disagreements of all exits, and how many exits are closed."""
        self.exit_disagreement.set(disagreement)
        self.exits_closed.set(closed)

    def busy(self) -> float:
        """Requests in flight."""
        # `collect` is the only public way to read a gauge.
        return sum(sample.value for metric in self.in_flight.collect() for sample in metric.samples)

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Add a gauge that calls `read` at every scrape."""
        Gauge(name, help, registry=self._registry).set_function(read)

    def counts(self, name: str, help: str, label: str, read: Callable[[], Mapping[str, int]]) -> None:
        """Add a counter with one label that calls `read` at every scrape; the label's values are names of the code."""
        self.add(_Counts(name, help, label, read))

    def add(self, collector: Collector) -> None:
        """Add metrics that `collector` reads at every scrape."""
        self._registry.register(collector)

    def gauge_store(self, sessions: SessionStore) -> None:
        """Add metrics of the segments that a store holds, of their batches and of their sessions."""
        store = sessions.store
        self.gauge("isthmus_loaded_segments", "Segments in memory.", lambda: float(len(store.loaded())))
        self.gauge(
            "isthmus_loaded_bytes",
            "Weights of the segments in memory.",
            lambda: float(sum(s.bytes for s in store.loaded())),
        )
        self.add(BatchCollector(store.batch_counts))
        self.add(SessionCollector(sessions.sessions.counts))

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that `accept` prefers, and its content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type


def hop_label(settings: RouterSettings, hop: str) -> str:
    """A hop by its place in the setting `hops`: anybody may read metrics, and the URL of a hop is a detail."""
    if settings.expose_details or hop == "local":
        return hop
    for index, tier in enumerate(settings.hops):
        if hop == tier:
            return f"hop{index}"
        if hop in (urls := urls_of(tier)):
            return f"hop{index}.{urls.index(hop)}"
    return hop


class SessionCollector(Collector):
    """Metrics of the sessions of a store's segments; no label holds a session's name."""

    def __init__(self, counts: Callable[[], SessionCounts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        counts = self._counts()
        yield GaugeMetricFamily("isthmus_sessions", "Sessions whose state is in memory.", counts.sessions)
        yield GaugeMetricFamily(
            "isthmus_session_reserved_bytes", "Memory reserved for the state of sessions.", counts.reserved
        )
        yield GaugeMetricFamily(
            "isthmus_session_resident_bytes", "Memory that the state of sessions takes.", counts.resident
        )
        steps = CounterMetricFamily("isthmus_session_steps", "Steps of sessions, by kind.", labels=["kind"])
        for kind in KINDS:
            steps.add_metric([kind], counts.steps.get(kind, 0))
        runs = CounterMetricFamily("isthmus_session_runs", "Runs, by the steps that shared them.", labels=["steps"])
        for size, count in sorted(counts.runs.items()):
            runs.add_metric([str(size)], count)
        dropped = CounterMetricFamily("isthmus_sessions_dropped", "Sessions forgotten, by reason.", labels=["reason"])
        for reason in REASONS:
            dropped.add_metric([reason], counts.dropped.get(reason, 0))
        refused = CounterMetricFamily(
            "isthmus_session_steps_refused", "Steps without a place for their session.", counts.refused
        )
        yield from (steps, runs, dropped, refused)


class BatchCollector(Collector):
    """Metrics of a store's batches."""

    def __init__(self, counts: Callable[[], BatchCounts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        counts = self._counts()
        batches = CounterMetricFamily("isthmus_batches", "Runs that several requests shared, by size.", labels=["size"])
        for size, count in counts.batches.items():
            batches.add_metric([str(size)], count)
        trials = CounterMetricFamily("isthmus_batch_trials", "Trials of batches, by outcome.", labels=["outcome"])
        for outcome, count in counts.trials.items():
            trials.add_metric([outcome], count)
        fallbacks = CounterMetricFamily(
            "isthmus_batch_fallbacks", "Batches whose requests were run alone after all.", value=counts.fallbacks
        )
        yield from (batches, trials, fallbacks)
