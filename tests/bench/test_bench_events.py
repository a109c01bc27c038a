"""The pieces of the events benchmark: its messages, its judgement of results, its kills."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.events.configuration import read_configuration, where_of
from isthmus.events.loops import check_loops
from support.paths import ROOT
from support.patience import until


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    for name in ("supervised", "functions", "events"):
        monkeypatch.setattr(importlib.import_module(name), "STATE", tmp_path / "state")
    return importlib.import_module


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        importlib.import_module("events_messages").publish_model(folder)
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return folder


@pytest.fixture
def messages(module: Callable[[str], Any], registry: Path) -> list[Any]:
    return module("events_messages").samples(registry, 30, poisoned=0.2)  # type: ignore[no-any-return]


def response(sample: Any) -> bytes:
    """What a router answers to a good message."""
    if sample.kind == "photo":
        classes = [{"index": i, "probability": float(p), "label": None} for i, p in enumerate(sample.expected)]
        return json.dumps({"classes": classes[::-1]}).encode()
    data = sample.expected.ravel().tolist()
    return json.dumps({"outputs": [{"name": "logits", "shape": [1, 10], "data": data}]}).encode()


def test_messages_are_photos_tensors_and_poisoned_ones_of_every_kind(
    module: Callable[[str], Any], messages: list[Any]
) -> None:
    kinds = Counter(sample.kind for sample in messages if not sample.is_poisoned)
    assert set(kinds) == {"photo", "tensors"}
    assert {sample.kind for sample in messages if sample.is_poisoned} == set(module("events_messages").POISON)
    assert len({sample.body for sample in messages}) == len(messages)


def test_a_result_of_another_message_is_wrong(messages: list[Any]) -> None:
    good = [sample for sample in messages if not sample.is_poisoned]
    for one, other in itertools.pairwise(good):
        assert one.is_right(response(one))
        assert not one.is_right(response(other))
        assert not one.is_right(b"{}")


def test_results_are_judged_by_message(module: Callable[[str], Any], messages: list[Any]) -> None:
    received = module("events_brokers").Received
    good = [sample for sample in messages if not sample.is_poisoned]
    results = [received(sample.id, response(sample)) for sample in good]
    dead = [received(sample.id, sample.body) for sample in messages if sample.is_poisoned]

    def judged(*, results: list[Any] = results, dead: list[Any] = dead) -> dict[str, int]:
        outcome = dataclasses.asdict(module("events").Outcome.of(messages, results, dead))
        assert (outcome.pop("good"), outcome.pop("poisoned")) == (len(good), len(messages) - len(good))
        return {name: number for name, number in outcome.items() if number}

    assert judged() == {}
    assert judged(results=results[1:]) == {"lost": 1}
    assert judged(results=[*results, results[0]]) == {"repeated": 1}
    assert judged(results=[received(results[0].id, results[1].body), *results[1:]]) == {"wrong": 1}
    assert judged(dead=dead[1:]) == {"not_dead": 1}
    assert judged(dead=[*dead, dead[0]]) == {"repeated": 1}
    assert judged(dead=[*dead, results[0]]) == {"wrongly_dead": 1}
    assert judged(results=[*results, dead[0]]) == {"wrong": 1}


def test_every_process_is_killed_as_often_and_starts_again(module: Callable[[str], Any]) -> None:
    supervised = module("supervised")
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    processes = [supervised.Supervised(name, sleeping, {}, lambda: True) for name in ("a", "b")]
    first = [process.process.pid for process in processes]
    try:
        done = supervised.kill_at_random(processes, 4, lambda: 0.0, random.Random(0), mean_s=0.01)
        assert Counter(kill.victim for kill in done) == {"a": 2, "b": 2}
        assert until(lambda: all(process.is_ready for process in processes))
        assert not {process.process.pid for process in processes} & set(first)
    finally:
        for process in processes:
            process.stop()
    assert all(process.process.poll() is not None for process in processes)


def test_processes_of_the_benchmark_serve_messages_and_end_with_it(
    module: Callable[[str], Any], registry: Path, messages: list[Any], tmp_path: Path
) -> None:
    events = module("events")
    broker = module("events_brokers").NatsBroker(tmp_path / "nats")
    with events.TriggerSetup(registry, broker) as setup:
        assert broker.send(messages, repeat=True) == len(messages) + 1
        assert until(lambda: broker.progress() == len(messages) and broker.counts()[0] == 0)
        outcome = dataclasses.asdict(events.Outcome.of(messages, broker.read(events.OUT), broker.read(events.DEAD)))
        processes = [each.process for each in setup.processes.values()]
    assert {name for name, number in outcome.items() if number} == {"good", "poisoned"}
    assert len(processes) == 5
    assert all(process.poll() is not None for process in processes)


def test_the_trigger_reads_the_configuration_of_every_broker(module: Callable[[str], Any], tmp_path: Path) -> None:
    for broker in module("events").BROKERS:
        path = module("events").write_configuration(broker(tmp_path / broker.name), "http://127.0.0.1:8080")
        configuration = read_configuration(path, {})
        check_loops(configuration)
        assert where_of(configuration.source).split()[0] == broker.name
        assert len(configuration.results) == 1


def test_the_trigger_reads_the_configuration_of_the_benchmark(module: Callable[[str], Any], tmp_path: Path) -> None:
    broker = module("events_brokers").NatsBroker(tmp_path / "nats")
    path = module("events").write_configuration(broker, "http://127.0.0.1:8080")
    configuration = read_configuration(path, {})
    assert configuration.source.subject == "digits.in"
    assert [place.subject for place in (*configuration.results, configuration.dead_letters)] == [
        "digits.out",
        "digits.dead",
    ]
    assert float(configuration.source.ack_wait) == 10.0


def test_the_outage_configures_a_spool_and_an_order(module: Callable[[str], Any], tmp_path: Path) -> None:
    outage, broker = module("events_outage"), module("events_brokers").NatsBroker(tmp_path / "nats")
    tables = {"": {"order_by": outage.ORDER_BY}, "spool": {"folder": str(tmp_path), "max_bytes": outage.MAX_BYTES}}
    configuration = read_configuration(module("events").write_configuration(broker, "http://127.0.0.1", tables), {})
    assert (configuration.order_by, configuration.spool is not None) == ("header:content-type", True)


def test_the_outage_counts_overtakers_of_a_kind(module: Callable[[str], Any], messages: list[Any]) -> None:
    received = module("events_brokers").Received
    photos = [sample.id for sample in messages if sample.content_type == messages[0].content_type][:4]
    others = [sample.id for sample in messages if sample.content_type != messages[0].content_type][:1]
    order = [photos[0], photos[2], photos[1], *others, photos[3]]
    count = module("events_outage").overtakers(messages, [received(name, b"") for name in order])
    assert count == 1
