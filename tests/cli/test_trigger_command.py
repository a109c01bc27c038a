"""`isthmus trigger` with a real NATS server: messages in, results out, checks, errors."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from isthmus.events.brokers.nats import NatsConsumer, NatsPublisher
from isthmus.events.claims import ClaimStore
from isthmus.events.message import Message
from isthmus.registry import FolderStore
from support.cli import document, isthmus
from support.nats_server import NatsServer, unique_subject
from support.nats_server import nats_server as nats_server
from support.nats_server import own_nats_server as own_nats_server
from support.patience import LONG_S, eventually
from support.ports import free_port
from support.scripted_router import ScriptedRouter, result_of, scripted_router
from support.trigger_files import configuration_file, trigger_process


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with scripted_router() as running:
        yield running


class Stage:
    """A subject of photos, one of results and one of dead letters, and a trigger's file between them."""

    def __init__(self, server: NatsServer, router: ScriptedRouter, folder: Path, **tables: Any) -> None:
        self.server, self.router = server, router
        self.photos, self.results, self.dead = (unique_subject() for _ in range(3))
        nats = {"kind": "nats", "url": server.url}
        # Results are collected by a consumer that is there before them.
        self.collectors = [NatsConsumer(server.place(subject)) for subject in (self.results, self.dead)]
        self.file = configuration_file(
            folder,
            {**nats, "subject": self.photos, "ack_wait": "2s"},
            {**nats, "subject": self.results},
            dead_letters={**nats, "subject": self.dead},
            router={"url": router.url, "concurrency": 4},
            retry_after="50ms",
            **tables,
        )

    def send(self, *messages: Message) -> None:
        with closing(NatsConsumer(self.server.place(self.photos, ack_wait=2))):
            """The stream is made by its consumer."""
        with closing(NatsPublisher(self.server.place(self.photos))) as publisher:
            for message in messages:
                publisher.publish(message)

    def collected(self) -> tuple[list[Message], list[Message]]:
        """Results and dead letters until now."""
        sets = []
        for collector in self.collectors:
            messages: list[Message] = []
            while deliveries := collector.fetch(100, 0.3):
                messages += [delivery.message for delivery in deliveries]
                for delivery in deliveries:
                    delivery.ack()
            sets.append(messages)
        return sets[0], sets[1]

    def close(self) -> None:
        for collector in self.collectors:
            collector.close()


@pytest.fixture
def stage(nats_server: NatsServer, router: ScriptedRouter, tmp_path: Path) -> Iterator[Stage]:
    with closing(Stage(nats_server, router, tmp_path, max_attempts=50, claims={"url": str(tmp_path / "claims")})) as it:
        yield it


def test_messages_that_wait_are_served_each_once(stage: Stage, router: ScriptedRouter, tmp_path: Path) -> None:
    stage.send(*(Message(b"photo %d" % i, f"m{i}", headers={"content-type": "image/jpeg"}) for i in range(20)))
    ran = isthmus("trigger", stage.file, "--until-empty", "--json")
    assert ran.exit_code == 0, ran.output
    first, *_, last = [json.loads(line) for line in ran.stdout.splitlines()]
    assert first["router"] == router.url
    assert (last["received"], last["done"], last["backlog"] or 0) == (20, 20, 0)
    results, dead = stage.collected()
    assert {message.id: message.body for message in results} == {f"m{i}": result_of(b"photo %d" % i) for i in range(20)}
    assert (len(results), dead) == (20, [])
    assert {received.headers["content-type"] for received in router.received} == {"image/jpeg"}


def test_poison_is_a_dead_letter_and_the_exit_status_tells(
    stage: Stage, router: ScriptedRouter, tmp_path: Path
) -> None:
    stage.send(Message(b"photo", "good"), Message(b"poison", "bad"))
    ran = isthmus("trigger", stage.file, "--until-empty")
    assert ran.exit_code == 1
    assert "received 2, done 1, failed 1, dead letters 1" in ran.stdout
    results, dead = stage.collected()
    assert ([m.id for m in results], [m.id for m in dead]) == (["good"], ["bad"])
    assert dead[0].body == b"poison"
    assert "poison" in dead[0].headers["x-isthmus-reason"]


def test_a_body_over_the_brokers_limit_travels_by_reference(
    stage: Stage, router: ScriptedRouter, tmp_path: Path
) -> None:
    router.replies = [(200, {"Content-Type": "application/octet-stream"}, bytes(3_200_000))]
    stage.send(Message(b"photo", "m"))
    assert isthmus("trigger", stage.file, "--until-empty").exit_code == 0
    (result,), _ = stage.collected()
    assert result.content_type == "application/vnd.isthmus.claim+json"
    assert json.loads(result.body)["size"] == 3_200_000


def test_a_claim_is_redeemed_before_the_router(stage: Stage, router: ScriptedRouter, tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    store = ClaimStore(FolderStore(tmp_path / "claims"), max_bytes=2**25, keep_s=3600)
    photo = os.urandom(20_000_000)
    stage.send(Message(store.deposit(photo, "image/jpeg").encode(), "m"))
    assert isthmus("trigger", stage.file, "--until-empty").exit_code == 0
    (received,) = router.received
    assert (received.body == photo, received.headers["content-type"]) == (True, "image/jpeg")


def test_a_check_connects_to_every_part(stage: Stage, router: ScriptedRouter, tmp_path: Path) -> None:
    router.replies = [(400, {}, b'{"error": "the body is empty", "type": "RequestMalformed"}')]
    checked = document(isthmus("trigger", stage.file, "--check", "--json"))
    assert checked["ok"]
    assert [part["part"] for part in checked["parts"]] == [
        "source",
        "results",
        "dead letters",
        "records",
        "claims",
        "router",
    ]


def test_a_check_names_what_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.events.brokers.nats_connection.CONNECT_TIMEOUT_S", 1.0)
    file = configuration_file(
        tmp_path,
        {"kind": "nats", "url": f"nats://127.0.0.1:{free_port()}", "subject": "photos"},
        {"kind": "objects", "url": str(tmp_path / "results")},
        router={"url": f"http://127.0.0.1:{free_port()}"},
        dead_letters={"kind": "redis", "url": f"redis://127.0.0.1:{free_port()}", "stream": "dead"},
    )
    ran = isthmus("trigger", file, "--check", "--json")
    assert ran.exit_code == 1
    states = {part["part"]: bool(part["error"]) for part in json.loads(ran.stdout)["parts"]}
    assert states == {"source": True, "results": False, "dead letters": True, "records": False, "router": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[source]\nkind = 'pigeon'\n", "pigeon"),
        ("[source]\nkind = 'nats'\nsubject = 'a'\n[[results]]\nkind = 'nats'\nsubject = 'a'\n", "is a loop"),
        ("[source]\nkind = 'nats'\nsubject = '${NOWHERE}'\n", "NOWHERE"),
        ("[source]\nkind = 'nats'\nsubject = 'a'\n[records]\nurl = 'disk'\n", "records.url is 'disk'"),
        ("[source]\nkind = 'nats'\nsubject = 'a'\ncredentials_secret = 'absent'\n", "the secret absent"),
    ],
)
def test_a_configuration_that_cannot_be_used_stops_the_start(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "trigger.toml"
    file.write_text(text)
    ran = isthmus("trigger", file, "--json")
    assert ran.exit_code == 1
    error = json.loads(ran.stderr)
    assert message in error["error"]
    assert error["type"] == "ConfigurationMalformed"


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    ran = isthmus("trigger", tmp_path / "none.toml")
    assert ran.exit_code == 1
    assert "none.toml cannot be read" in ran.stderr


def runs_until(running: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Wait for a condition while the process runs."""
    eventually(lambda: running.poll() is not None or bool(condition()))
    assert running.poll() is None


def test_sigterm_finishes_what_is_in_work(stage: Stage, router: ScriptedRouter, tmp_path: Path) -> None:
    router.pause_s = 0.3
    stage.send(*(Message(b"", f"m{i}") for i in range(12)))
    running = trigger_process(stage.file, "--json", stdout=subprocess.PIPE)
    runs_until(running, lambda: len(router.received) >= 4)
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=LONG_S)
    last = json.loads(out.splitlines()[-1])
    assert last["done"] >= 4
    router.pause_s = 0.0
    assert isthmus("trigger", stage.file, "--until-empty").exit_code == 0
    results, dead = stage.collected()
    assert (sorted(m.id for m in results), dead) == (sorted(f"m{i}" for i in range(12)), [])
    assert set(router.calls().values()) == {1}


def test_every_message_has_one_result_while_the_trigger_is_killed_at_random(
    stage: Stage, router: ScriptedRouter, tmp_path: Path
) -> None:
    count, kills, chance = 400, 5, random.Random(7)
    router.pause_s = 0.01
    stage.send(*(Message(b"photo %d" % i, f"m{i}") for i in range(count)))
    running = trigger_process(stage.file, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for kill in range(1, kills + 1):
        wanted = kill * count // (kills + 2)
        runs_until(running, lambda wanted=wanted: len(router.received) >= wanted)
        time.sleep(chance.uniform(0, 0.1))
        running.kill()
        running.wait()
        running = trigger_process(stage.file, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    running.send_signal(signal.SIGTERM)
    running.wait(LONG_S)
    ended = isthmus("trigger", stage.file, "--until-empty", "--json")
    assert ended.exit_code == 0, ended.output
    results, dead = stage.collected()
    assert Counter(m.id for m in results) == Counter(f"m{i}" for i in range(count))
    assert {m.id: m.body for m in results} == {f"m{i}": result_of(b"photo %d" % i) for i in range(count)}
    assert dead == []


def test_two_triggers_of_one_name_share_the_messages(stage: Stage, router: ScriptedRouter) -> None:
    router.pause_s = 0.05
    stage.send(*(Message(b"photo %d" % i, f"m{i}") for i in range(60)))
    running = [
        trigger_process(stage.file, "--until-empty", "--json", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    counts = [json.loads(process.communicate(timeout=LONG_S)[0].splitlines()[-1]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum(count["done"] for count in counts) == 60
    results, dead = stage.collected()
    assert Counter(m.id for m in results) == Counter(f"m{i}" for i in range(60))
    assert (set(router.calls().values()), dead) == ({1}, [])


def test_a_broker_that_dies_and_comes_back_is_waited_for(
    own_nats_server: NatsServer, router: ScriptedRouter, tmp_path: Path
) -> None:
    router.pause_s = 0.02
    with closing(Stage(own_nats_server, router, tmp_path, max_attempts=50)) as stage:
        stage.send(*(Message(b"photo %d" % i, f"m{i}") for i in range(100)))
        log = tmp_path / "log"
        with log.open("w") as file:
            running = trigger_process(stage.file, stdout=subprocess.DEVNULL, stderr=file)
        for outage in (1, 2):
            runs_until(running, lambda outage=outage: len(router.received) >= 30 * outage)
            own_nats_server.kill()
            # Fetches, publishes and acknowledgements meet the outage; the first to time out says so.
            runs_until(running, lambda: "is away, and is waited for" in log.read_text())
            time.sleep(0.5)
            own_nats_server.restart()
        runs_until(running, lambda: len(router.calls()) >= 100)
        running.send_signal(signal.SIGTERM)
        running.wait(LONG_S)
        assert isthmus("trigger", stage.file, "--until-empty").exit_code == 0
        results, dead = stage.collected()
        assert Counter(m.id for m in results) == Counter(f"m{i}" for i in range(100))
        assert dead == []


def test_a_broker_that_comes_back_empty_goes_on_with_new_messages(
    own_nats_server: NatsServer, router: ScriptedRouter, tmp_path: Path
) -> None:
    with closing(Stage(own_nats_server, router, tmp_path)) as stage:
        stage.send(Message(b"", "before"))
        running = trigger_process(stage.file, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        runs_until(running, lambda: router.received)
        own_nats_server.restart(empty=True)
        stage.send(Message(b"", "after"))
        runs_until(running, lambda: len(router.received) >= 2)
        running.send_signal(signal.SIGTERM)
        running.wait(LONG_S)
    assert router.calls() == {"before": 1, "after": 1}
