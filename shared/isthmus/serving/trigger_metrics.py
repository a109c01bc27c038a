"""The trigger's Prometheus metrics, read from its status at every scrape; docs/reference/metrics.md lists them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from isthmus.events.spool import SpoolStatus
from isthmus.events.trigger import TriggerStatus

_GAUGES: Mapping[str, tuple[str, Callable[[TriggerStatus], float | None]]] = {
    "in_work": ("Messages being worked on.", lambda status: status.in_work),
    "waiting": ("Messages in memory that wait for their turn.", lambda status: status.waiting),
    "work_bytes": ("Bodies in memory.", lambda status: status.work_bytes),
    "limit": ("Requests that the router takes at a time, as observed.", lambda status: status.limit),
    "backlog_messages": (
        "Messages at the broker, those in work included.",
        lambda status: status.backlog.messages,
    ),
    "backlog_oldest_seconds": ("Age of the oldest of them.", lambda status: status.backlog.oldest_s),
}
_SPOOL_GAUGES: Mapping[str, tuple[str, Callable[[SpoolStatus], float]]] = {
    "spool_entries": ("Messages that wait on the disk for the cloud.", lambda spool: spool.entries),
    "spool_bytes": ("Bytes of the spool in use.", lambda spool: spool.bytes),
    "spool_max_bytes": ("The bound of the spool.", lambda spool: spool.max_bytes),
    "spool_oldest_seconds": ("Age of the oldest message of the spool.", lambda spool: spool.oldest_s),
}


class TriggerCollector(Collector):
    """Metrics of a trigger; without values where `status` gives None, as before its start."""

    def __init__(self, status: Callable[[], TriggerStatus | None]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        status = self._status()
        messages = CounterMetricFamily(
            "isthmus_trigger_messages", "Messages by outcome since the start.", labels=["outcome"]
        )
        for outcome, count in (status.counts if status else {}).items():
            messages.add_metric([outcome], count)
        yield messages
        away = GaugeMetricFamily(
            "isthmus_trigger_away", "Counterparts that do not answer, by kind.", labels=["counterpart"]
        )
        for kind, count in Counter(map(counterpart, status.away if status else ())).items():
            away.add_metric([kind], count)
        yield away
        for name, (help, read) in _GAUGES.items():
            yield _gauge(name, help, None if status is None else read(status))
        spool = None if status is None else status.spool
        for name, (help, read_spool) in _SPOOL_GAUGES.items():
            yield _gauge(name, help, None if spool is None else read_spool(spool))


def counterpart(name: str) -> str:
    """The kind of a counterpart: `source`, `records`, `router`, `spool`, or the kind of a place without its address."""
    return name.partition(" ")[0]


def _gauge(name: str, help: str, value: float | None) -> Metric:
    """A gauge, absent rather than 0 where the broker does not say: nobody must scale by a number that is none."""
    gauge = GaugeMetricFamily(f"isthmus_trigger_{name}", help)
    if value is not None:
        gauge.add_metric([], float(value))
    return gauge
