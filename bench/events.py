"""The trigger: exactly one result a message under kills, throughput and latency beside HTTP, memory over a long run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import models
import psutil
from events_brokers import DEAD, IN, OUT, Broker, NatsBroker, NatsRoundTrips, Received
from events_messages import MODEL, Sample, photo_samples, publish_model, samples
from events_queues import MqttBroker, RedisBroker, SqsBroker
from functions import free_port, stage_functions
from harness import STATE, Report, arguments, at_least, at_most, interleave
from supervised import Kill, Supervised, answers, kill_at_random

from isthmus.client import Client
from isthmus_tools.netem import LinkShape, NetworkEmulator

Tables = Mapping[str, Mapping[str, object]]
BROKERS: Sequence[type[Broker]] = (NatsBroker, RedisBroker, MqttBroker, SqsBroker)
PARTS = ("kills", "throughput", "latency", "drain")
CONCURRENCY = 8
# Round trip to the tail, where the CPUs are not what requests wait for.
RTT_MS = 50
# Of a run of all messages, kills of each process included; none takes as long.
MAX_S = 1800.0
# The sender stays this far ahead, so that messages are also sent while processes die.
AHEAD, CHUNK = 1000, 250
MAX_ADDED_MS, MIN_THROUGHPUT, MAX_GROWTH = 5.0, 0.9, 1.05


def main() -> None:
    names = [broker.name for broker in BROKERS]
    report = arguments("events", __doc__, ["nats-py", "flask", "onnxruntime", "waitress"], parts=PARTS, brokers=names)
    parts = report.chosen["parts"] or PARTS
    chosen = [broker for broker in BROKERS if broker.name in (report.chosen["brokers"] or ("nats",))]
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as name:
        folder = Path(name)
        registry = folder / "registry"
        report.say("training a small model")
        publish_model(registry)
        for broker in chosen if "kills" in parts else ():
            with TriggerSetup(registry, broker(folder / broker.name)) as setup:
                kills(report, setup)
        if "latency" in parts or "throughput" in parts:
            with TriggerSetup(registry, NatsBroker(folder / "speed")) as setup:
                if "latency" in parts:
                    latency(report, setup)
                if "throughput" in parts:
                    count = 400 if report.quick else 2000
                    throughput(report, setup, "digits", samples(registry, count, poisoned=0.0))
        if "throughput" in parts:
            with TriggerSetup(registry, NatsBroker(folder / "linked"), is_linked=True) as setup:
                setup.link.set(LinkShape(rtt_s=RTT_MS / 1e3))
                name = f"digits, tail {RTT_MS} ms away"
                throughput(report, setup, name, samples(registry, 100 if report.quick else 1000, poisoned=0.0))
            models.import_model()
            with TriggerSetup(models.REGISTRY, NatsBroker(folder / "photos"), models.MODEL) as setup:
                throughput(report, setup, models.MODEL, photo_samples(60 if report.quick else 600))
        if "drain" in parts:
            with TriggerSetup(registry, NatsBroker(folder / "drain"), hops="local") as setup:
                drain(report, setup)
    report.emit()


class TriggerSetup:
    """Broker, head, tail, router and trigger as processes; `hops` in place of head and tail where given.

    `tables` are further ones of the trigger's configuration; with `is_linked` the tail is behind the network `link`.
    """

    def __init__(
        self,
        registry: Path,
        broker: Broker,
        model: str = MODEL,
        hops: str = "",
        tables: Tables | None = None,
        *,
        is_linked: bool = False,
    ) -> None:
        self.registry, self.broker = registry, broker
        self._model, self._hops, self._tables = model, hops, tables or {}
        self._is_linked, self.link = is_linked, NetworkEmulator("127.0.0.1:9")
        self._stack = contextlib.ExitStack()
        self.processes: dict[str, Supervised] = {}

    def __enter__(self) -> TriggerSetup:
        with contextlib.ExitStack() as stack:
            self.processes["broker"] = stack.enter_context(self.broker.start())
            names = ("router",) if self._hops else ("edge-head", "cloud-tail", "router")
            urls = {name: f"http://127.0.0.1:{free_port()}" for name in names}
            tail = urls.get("cloud-tail", "")
            if self._is_linked:
                self.link = stack.enter_context(NetworkEmulator(tail))
                tail = self.link.url
            hops = self._hops or f"{urls['edge-head']},{tail}"
            self.router = urls["router"]
            for name, staged in stage_functions(*names, registry=self.registry, model=self._model).items():
                environment = staged.environment_at(urls[name], hops=hops, cache_dir=str(self.broker.folder / name))
                is_ready = _ready_at(f"{urls[name]}/ready")
                process = Supervised(name, staged.command, environment, is_ready, staged.folder)
                self.processes[name] = stack.enter_context(process)
            for process in self.processes.values():
                process.wait_ready()
            self.processes["trigger"] = stack.enter_context(self._trigger())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def trigger(self) -> Supervised:
        """The trigger's process."""
        return self.processes["trigger"]

    def counts(self) -> Counter[str]:
        """The trigger's counts, of all its processes together: each process's last line before its death."""
        total: Counter[str] = Counter()
        last: Mapping[str, object] = {}
        for line in self.trigger.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                document = json.loads(line)
                if "router" in document:
                    total.update(_numbers(last))
                last = document
        total.update(_numbers(last))
        return total

    def _trigger(self) -> Supervised:
        path = write_configuration(self.broker, self.router, self._tables)
        command = [str(Path(sys.executable).with_name("isthmus")), "trigger", str(path), "--json", "--every", "200ms"]
        log = STATE / "logs" / "events-trigger.log"

        def has_begun() -> bool:
            return b"at_s" in log.read_bytes().rpartition(b'"router"')[2]

        return Supervised("trigger", command, dict(os.environ), has_begun)


def write_configuration(broker: Broker, router: str, more: Tables | None = None) -> Path:
    """The trigger's configuration; `more` are further tables, and keys without a table in that without a name."""
    tables = {
        "source": broker.place(IN),
        "dead_letters": broker.place(DEAD),
        "router": {"url": router, "concurrency": CONCURRENCY, "timeout": "10s"},
        "records": {"url": f"sqlite:{broker.folder / 'records.sqlite'}"},
        **{name: table for name, table in (more or {}).items() if name},
    }
    lines = ["max_attempts = 5", 'retry_after = "500ms"', *_toml((more or {}).get("", {}))]
    for name, table in tables.items():
        lines += [f"[{name}]", *_toml(table)]
    path = broker.folder / "trigger.toml"
    path.write_text("\n".join([*lines, "[[results]]", *_toml(broker.place(OUT))]) + "\n")
    return path


def kills(report: Report, setup: TriggerSetup) -> None:
    """Messages while every process is killed again and again; each must have one right result."""
    broker = setup.broker
    count, number = (600, 5) if report.quick else (10_000, 20)
    report.say(f"{broker.name}: making {count} messages")
    messages = samples(setup.registry, count)
    victims = [each for name, each in setup.processes.items() if name != "broker" or broker.survives_kills]
    began = time.monotonic()
    progress = Progress(broker, len(messages))
    with ThreadPoolExecutor(1) as pool:
        report.say(f"{broker.name}: {count} messages, {number} kills")
        sending = pool.submit(progress.send_all, messages)
        done = kill_at_random(victims, number, progress.share, random.Random(1), mean_s=1.5 if report.quick else 3.0)
        sent = sending.result()
    wait_until(lambda: progress.is_over(), f"{broker.name}: messages are left")
    seconds = time.monotonic() - began
    time.sleep(1.0)  # a late repetition would show
    outcome = Outcome.of(messages, broker.read(OUT), broker.read(DEAD))
    add_kills(report, setup, done, outcome, seconds, sent)


class Progress:
    """How much of the messages is done, read from the broker."""

    def __init__(self, broker: Broker, total: int) -> None:
        self._broker, self._total = broker, total
        self._is_sent = False

    def share(self) -> float:
        """The share of messages with a result or a dead letter."""
        return self._broker.progress() / self._total

    def send_all(self, messages: Sequence[Sample]) -> int:
        """Send all messages in pieces, no more than AHEAD of what is done; their number with repetitions."""
        sent = 0
        for start in range(0, len(messages), CHUNK):
            wait_until(lambda start=start: self._broker.progress() >= start + CHUNK - AHEAD, "messages are not done")
            sent += self._broker.send(messages[start : start + CHUNK], repeat=True)
        self._is_sent = True
        return sent

    def is_over(self) -> bool:
        """Whether all are sent and none is left at the broker."""
        return self._is_sent and self._broker.counts()[0] == 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results and dead letters compared with what was sent."""

    good: int
    poisoned: int
    lost: int
    repeated: int
    wrong: int
    not_dead: int
    wrongly_dead: int

    @classmethod
    def of(cls, messages: Sequence[Sample], results: Sequence[Received], dead: Sequence[Received]) -> Outcome:
        """Count by id. `repeated` are results and dead letters beyond the first of a message."""
        by_id = {sample.id: sample for sample in messages}
        good = {sample.id for sample in messages if not sample.is_poisoned}
        counts, buried = Counter(each.id for each in results), Counter(each.id for each in dead)
        return cls(
            good=len(good),
            poisoned=len(by_id) - len(good),
            lost=sum(not counts[name] for name in good),
            repeated=sum(n - 1 for n in (*counts.values(), *buried.values())),
            wrong=sum(each.id not in by_id or not by_id[each.id].is_right(each.body) for each in results),
            not_dead=sum(not buried[name] for name in by_id if name not in good),
            wrongly_dead=sum(name not in by_id or name in good for name in buried),
        )


def add_kills(
    report: Report, setup: TriggerSetup, done: Sequence[Kill], outcome: Outcome, seconds: float, sent: int
) -> None:
    """Tables and goals of the kills."""
    name, counts = setup.broker.name, setup.counts()
    by_victim = Counter(each.victim for each in done)
    report.add(
        f"{name}: {len(done)} kills",
        [{"process": process, "kills": by_victim[process]} for process in setup.processes if process in by_victim],
    )
    report.add(
        f"{name}: messages over {len(done)} kills",
        [
            {
                "messages": outcome.good + outcome.poisoned,
                "poisoned": outcome.poisoned,
                "sent_with_repetitions": sent,
                "deliveries": counts["received"],
                "of_messages_that_were_over": counts["duplicates"],
                "attempts_repeated": counts["retried"],
                "requests_deferred": counts["deferred"],
                "results_repeated": outcome.repeated,
                "seconds": seconds,
            }
        ],
    )
    report.goals += [
        at_most(f"{name}: good messages without a result", outcome.lost, 0),
        at_most(f"{name}: results and dead letters that repeat another", outcome.repeated, 0)
        if setup.broker.deduplicates
        # Of each death of the trigger those that it was publishing; readers know them by their ids.
        else at_most(
            f"{name}: repeated results, for each kill of the trigger",
            outcome.repeated / by_victim["trigger"],
            CONCURRENCY,
        ),
        at_most(f"{name}: wrong results", outcome.wrong, 0),
        at_most(f"{name}: poisoned messages that are no dead letter", outcome.not_dead, 0),
        at_most(f"{name}: dead letters of good messages", outcome.wrongly_dead, 0),
    ]


def latency(report: Report, setup: TriggerSetup) -> None:
    """A message at a time, from its publishing to its result, beside the same request over HTTP."""
    report.say("messages one at a time, by the trigger and over HTTP")
    messages = samples(setup.registry, 64, poisoned=0.0)
    router, trips = Client(setup.router), NatsRoundTrips(setup.broker.url)
    turn = iter(range(10**9))

    def direct() -> None:
        sample = messages[next(turn) % len(messages)]
        check(sample, router.post("/", [sample.body], {"Content-Type": sample.content_type}, {}).body)

    def event() -> None:
        sample = messages[next(turn) % len(messages)]
        check(sample, trips.call(sample))

    try:
        times = interleave({"HTTP": direct, "trigger": event}, turns=10 if report.quick else 60, block=10, warm=2)
    finally:
        trips.close()
    rows = [
        {
            "way": name,
            "p50_ms": samples.p50 * 1e3,
            "p95_ms": samples.p95 * 1e3,
            "over_HTTP": samples.over(times["HTTP"]),
        }
        for name, samples in times.items()
    ]
    report.add("one message at a time, from publishing to the result", rows)
    added = (times["trigger"].p50 - times["HTTP"].p50) * 1e3
    report.goals.append(at_most("latency added by broker and trigger at p50", added, MAX_ADDED_MS, "ms"))


def throughput(report: Report, setup: TriggerSetup, model: str, messages: Sequence[Sample]) -> None:
    """A backlog drained by the trigger beside as many threads of clients, by turns."""
    rounds = 3 if report.quick else 7
    direct: list[float] = []
    events: list[float] = []
    for turn in range(rounds + 1):
        report.say(f"{model}: {len(messages)} messages by the trigger and over HTTP: {turn} of {rounds}")
        ways: list[Callable[[], None]] = [
            lambda: direct.append(len(messages) / http_seconds(setup.router, messages)),
            lambda turn=turn: events.append(len(messages) / drain_seconds(setup, messages, f"t{turn}")),
        ]
        for way in ways if turn % 2 else reversed(ways):
            way()
    # The first round warms up.
    rates = {"HTTP": direct[1:], "trigger": events[1:]}
    share = statistics.median(e / d for e, d in zip(events[1:], direct[1:], strict=True))
    rows = [
        {"way": name, "p50_messages_a_second": statistics.median(each), "worst": min(each), "best": max(each)}
        for name, each in rates.items()
    ]
    report.add(f"{model}: {len(messages)} messages, {CONCURRENCY} at a time, {rounds} rounds", rows)
    report.goals.append(at_least(f"{model}: throughput of the trigger over HTTP", share, MIN_THROUGHPUT))


def http_seconds(url: str, messages: Sequence[Sample]) -> float:
    """Seconds for all messages by as many threads of a client as the trigger has requests."""
    client = Client(url)

    def send(sample: Sample) -> None:
        check(sample, client.post("/", [sample.body], {"Content-Type": sample.content_type}, {}).body)

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        began = time.perf_counter()
        list(pool.map(send, messages))
        return time.perf_counter() - began


def drain_seconds(setup: TriggerSetup, messages: Sequence[Sample], prefix: str) -> float:
    """Seconds from the moment at which the trigger may work on a backlog to the last result, by the broker's clock."""
    broker = setup.broker
    broker.purge()
    with setup.trigger.paused():
        renamed = [dataclasses.replace(sample, id=f"{prefix}-{sample.id}") for sample in messages]
        broker.send(renamed, repeat=False)
        began = time.time()
    wait_until(lambda: broker.progress() >= len(messages), "messages are left", every_s=0.2)
    seconds = broker.last_result_at() - began
    outcome = Outcome.of(renamed, broker.read(OUT), broker.read(DEAD))
    if outcome.lost or outcome.wrong or outcome.repeated:
        raise RuntimeError(f"wrong results without a kill: {outcome}")
    return seconds


def drain(report: Report, setup: TriggerSetup) -> None:
    """A long backlog: the trigger's memory, sampled through the run."""
    count = 5_000 if report.quick else 100_000
    report.say(f"making and sending {count} messages")
    few = samples(setup.registry, 1000, poisoned=0.0)
    with setup.trigger.paused():
        for start in range(0, count, len(few)):
            broker_samples = [dataclasses.replace(sample, id=f"d{start + i}") for i, sample in enumerate(few)]
            setup.broker.send(broker_samples, repeat=False)
        began = time.time()
    report.say("draining them")
    process, sampled = psutil.Process(setup.trigger.process.pid), []
    while (done := setup.broker.progress()) < count:
        sampled.append((done / count, process.memory_info().rss / 2**20))
        if time.time() - began > MAX_S:
            raise TimeoutError(f"{done} of {count} messages done")
        time.sleep(0.2 if report.quick else 1.0)
    seconds = setup.broker.last_result_at() - began
    quarters = [statistics.median(rss for share, rss in sampled if q <= share * 4 < q + 1) for q in range(4)]
    report.add(
        f"{count} messages drained, {seconds:.0f} s",
        [
            {
                "messages_a_second": count / seconds,
                **{f"quarter_{q + 1}_MiB": rss for q, rss in enumerate(quarters)},
                "largest_MiB": max(rss for _, rss in sampled),
            }
        ],
    )
    report.goals.append(
        at_most("memory of the trigger, last quarter over second quarter", quarters[3] / quarters[1], MAX_GROWTH)
    )


def check(sample: Sample, body: bytes | bytearray) -> None:
    """Raise RuntimeError where a result is wrong."""
    if not sample.is_right(bytes(body)):
        raise RuntimeError(f"a wrong result for {sample.id}: {bytes(body)[:300]!r}")


def wait_until(is_over: Callable[[], bool], message: str, every_s: float = 0.1) -> None:
    """Wait until `is_over`.

    Raises:
        TimeoutError: not within MAX_S.
    """
    until = time.monotonic() + MAX_S
    while not is_over():
        if time.monotonic() > until:
            raise TimeoutError(message)
        time.sleep(every_s)


def _ready_at(url: str) -> Callable[[], bool]:
    return lambda: answers(url)


def _numbers(document: Mapping[str, object]) -> dict[str, int]:
    return {name: value for name, value in document.items() if isinstance(value, int)}


def _toml(table: Mapping[str, object]) -> Iterator[str]:
    # JSON's texts and numbers are TOML's.
    return (f"{name} = {json.dumps(value)}" for name, value in table.items())


if __name__ == "__main__":
    main()
