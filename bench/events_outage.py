"""The link to the cloud cut for a minute under load: what is lost, how far the spool grows, how long it drains."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from events_brokers import DEAD, OUT, NatsBroker, Received
from events_messages import Sample, publish_model, samples
from harness import Report, arguments, at_most

from events import Outcome, TriggerSetup, wait_until
from isthmus.units import parse_size

# Two lanes, photos and JSON: messages of a lane are served one after the other.
ORDER_BY, MAX_BYTES = "header:content-type", "16MiB"
RATE, PIECES_PER_S = 15, 5
BEFORE_S, CUT_S, AFTER_S = 10.0, 60.0, 20.0


@dataclass
class SpoolWatch:
    """The trigger's status lines during a run. Units: bytes, and seconds of `time.monotonic`."""

    setup: TriggerSetup
    max_entries: int = 0
    max_bytes: int = 0
    oldest_s: float = 0.0
    empty_at: float = 0.0
    latest: dict[str, Any] = field(default_factory=dict)
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Read the status until over."""
        while not self.is_over.wait(0.1):
            for line in reversed(self.setup.trigger.log.read_text(errors="replace").splitlines()[-5:]):
                with contextlib.suppress(ValueError):
                    self._note(json.loads(line))
                    break

    def _note(self, document: dict[str, Any]) -> None:
        if "spool" not in document:
            return
        spool, self.latest = document["spool"], document
        if spool["entries"]:
            self.empty_at = 0.0
        elif not self.empty_at:
            self.empty_at = time.monotonic()
        self.max_entries = max(self.max_entries, spool["entries"])
        self.max_bytes = max(self.max_bytes, spool["bytes"])
        self.oldest_s = max(self.oldest_s, spool["oldest_s"])


def main() -> None:
    report = arguments("events_outage", __doc__, ["nats-py", "flask", "onnxruntime", "waitress"])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-bench-")))
        report.say("training a small model")
        publish_model(folder / "registry")
        tables = {"": {"order_by": ORDER_BY}, "spool": {"folder": str(folder / "spool"), "max_bytes": MAX_BYTES}}
        setup = TriggerSetup(folder / "registry", NatsBroker(folder / "nats"), tables=tables, is_linked=True)
        outage(report, stack.enter_context(setup))
    report.emit()


def outage(report: Report, setup: TriggerSetup) -> None:
    """Messages at a steady rate, with the link cut in their middle."""
    before_s, cut_s, after_s = (3.0, 10.0, 5.0) if report.quick else (BEFORE_S, CUT_S, AFTER_S)
    messages = samples(setup.registry, int(RATE * (before_s + cut_s + after_s)), poisoned=0.0)
    watch = SpoolWatch(setup)
    threads = [threading.Thread(target=watch.run), threading.Thread(target=send_steadily, args=(setup, messages))]
    report.say(f"{len(messages)} messages, {RATE} a second; the link is cut for {cut_s:.0f} s")
    for thread in threads:
        thread.start()
    try:
        time.sleep(before_s)
        setup.link.down()
        time.sleep(cut_s)
        setup.link.up()
        up_at = time.monotonic()
        threads[1].join()
        report.say("draining")
        wait_until(lambda: setup.broker.progress() >= len(messages), "messages are left")
        wait_until(lambda: watch.empty_at > 0, "the spool is not empty")
    finally:
        watch.is_over.set()
        threads[0].join()
    time.sleep(1.0)  # a late repetition would show
    results = setup.broker.read(OUT)
    outcome = Outcome.of(messages, results, setup.broker.read(DEAD))
    report.add(
        f"a cut of {cut_s:.0f} s at {RATE} messages a second, in order by {ORDER_BY.removeprefix('header:')}",
        [
            {
                "messages": len(messages),
                "spooled": watch.latest["spooled"],
                "drained": watch.latest["drained"],
                "dropped": watch.latest["dropped"],
                "most_entries": watch.max_entries,
                "most_KiB": watch.max_bytes / 2**10,
                "oldest_s": watch.oldest_s,
                "drained_after_s": max(0.0, watch.empty_at - up_at),
            }
        ],
    )
    report.goals += [
        at_most("messages without a result", outcome.lost, 0),
        at_most("results that repeat another", outcome.repeated, 0),
        at_most("wrong results", outcome.wrong, 0),
        at_most("dead letters", outcome.wrongly_dead, 0),
        at_most("results before that of an earlier message of their kind", overtakers(messages, results), 0),
        at_most("bytes of the spool", watch.max_bytes, parse_size(MAX_BYTES), "B"),
    ]


def send_steadily(setup: TriggerSetup, messages: Sequence[Sample]) -> None:
    """Send at RATE, a few at a time."""
    piece, began = RATE // PIECES_PER_S, time.monotonic()
    for start in range(0, len(messages), piece):
        time.sleep(max(0.0, began + start / RATE - time.monotonic()))
        setup.broker.send(messages[start : start + piece], repeat=False)


def overtakers(messages: Sequence[Sample], results: Sequence[Received]) -> int:
    """Results that came after that of a later message of their lane."""
    lanes = {sample.id: sample.content_type for sample in messages}
    latest: dict[str, int] = {}
    count = 0
    for result in results:
        lane, number = lanes.get(result.id, ""), int(result.id.removeprefix("m"))
        count += number < latest.get(lane, -1)
        latest[lane] = max(number, latest.get(lane, -1))
    return count


if __name__ == "__main__":
    main()
