"""Capture of labelled readings from MQTT: messages go to a file, and are acknowledged once on disk.

A killed capture goes on: the broker keeps the session, and the file keeps all acknowledged messages.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import BrokerUnavailable, LearningError
from isthmus.events.broker import Consumer, Delivery
from isthmus.events.configuration import MqttPlace
from isthmus.events.open import open_consumer
from isthmus.settings import RegistrySettings
from isthmus_tools.learning.training.config import MqttSource
from isthmus_tools.learning.training.samples import RawSample
from isthmus_tools.progress import Progress, silent

_FETCHED, _WAIT_S = 64, 0.2
# A broker that starts with the command, or restarts meanwhile.
_OUTAGE_S = 30.0


class Capture:
    """The messages of an MQTT source in a file; `done` once the count or the time of the source is reached."""

    def __init__(self, source: MqttSource, folder: Path, settings: RegistrySettings) -> None:
        self.source = source
        folder.mkdir(parents=True, exist_ok=True)
        # By the topic: another or a changed source has a file of its own.
        digest = hashlib.sha256(f"{source.url} {source.topic}".encode()).hexdigest()[:12]
        self.path = folder / f"mqtt-{digest}.jsonl"
        self._done_mark = self.path.with_suffix(".done")
        self._ids = {entry["id"] for entry in _entries(self.path)}
        self._settings = settings

    @property
    def count(self) -> int:
        return len(self._ids)

    @property
    def done(self) -> bool:
        return self._done_mark.exists() or self.count >= self.source.count

    def consumer(self) -> Consumer:
        """A consumer with a session that the broker keeps while this process is away."""
        source = self.source
        place = MqttPlace(
            url=source.url,
            topic=re.sub(r"\{\w+\}", "+", source.topic),
            version=source.version,
            client_id=source.client_id or f"train-{hashlib.sha256(str(self.path).encode()).hexdigest()[:16]}",
            user=source.user,
            password_secret=source.password_secret,
        )
        return open_consumer(place, self._settings)

    def take(self, deliveries: Sequence[Delivery]) -> None:
        """Write messages to the file, synchronise the file, then acknowledge."""
        with self.path.open("ab") as file:
            # A message twice in a delivery is appended once.
            for delivery in deliveries:
                self._append(file, delivery)
            file.flush()
            os.fsync(file.fileno())
        for delivery in deliveries:
            delivery.ack()

    def finish(self) -> None:
        """Mark the capture as over."""
        # A file of its own: the messages' file is for appending alone.
        self._done_mark.touch()

    def samples(self) -> Iterator[RawSample]:
        """The readings of the messages.

        Raises:
            LearningError: a message that holds no readings.
        """
        pattern = _topic_pattern(self.source.topic)
        for number, entry in enumerate(_entries(self.path), 1):
            place = f"message {number} of {entry['topic']}"
            match = pattern.fullmatch(entry["topic"])
            if match is None:
                raise LearningError(f"{place} is on another topic than {self.source.topic}", place=place)
            names = match.groupdict()
            for i, values in enumerate(_readings(entry["payload"], place)):
                group = names.get("group") or f"{self.path.stem}#{number}"
                yield RawSample(values, names["label"], group, f"{place}, row {i}", self.source.part)

    def _append(self, file: BinaryIO, delivery: Delivery) -> None:
        message = delivery.message
        # At least once: the same id is the same message. Beyond the count, messages are nobody's.
        if message.id in self._ids or self.count >= self.source.count:
            return
        payload = message.body.decode(errors="replace")
        file.write(json.dumps({"id": message.id, "topic": message.source, "payload": payload}).encode() + b"\n")
        self._ids.add(message.id)


def capture(captures: Sequence[Capture], progress: Progress = silent) -> None:
    """Take messages for all captures at once, each until its count or its time.

    Raises:
        LearningError: no message at all came for a capture.
        ConfigurationMalformed, BrokerRefused, BrokerUnavailable: the broker; it is waited for half a minute.
    """
    with ExitStack() as stack:
        opened = [(each, stack.enter_context(closing(each.consumer()))) for each in captures if not each.done]
        began = last_heard = time.monotonic()
        while waiting := [pair for pair in opened if not pair[0].done]:
            for each, consumer in waiting:
                try:
                    deliveries = consumer.fetch(_FETCHED, _WAIT_S / len(waiting))
                except BrokerUnavailable:
                    now = time.monotonic()
                    if now - last_heard > _OUTAGE_S or now - began >= each.source.time:
                        raise
                    continue
                last_heard = time.monotonic()
                each.take(deliveries)
                if time.monotonic() - began >= each.source.time:
                    each.finish()
            taken = sum(each.count for each in captures)
            # Without a count there is no total.
            bounded = all(each.source.count < 10**7 for each in captures)
            progress(f"{taken} messages by MQTT", taken, sum(each.source.count for each in captures) if bounded else 0)
    for each in captures:
        if not each.count:
            raise LearningError(
                f"no message came from {each.source.url} on {each.source.topic} within {each.source.time:g} s",
                topic=each.source.topic,
                hint="is something published there? mosquitto_sub -t shows it",
            )
        each.finish()


def _topic_pattern(topic: str) -> re.Pattern[str]:
    """A regular expression for a topic with placeholders and wildcards of a single level."""
    levels = []
    for level in topic.split("/"):
        placeholder = re.fullmatch(r"\{(\w+)\}", level)
        if placeholder is None and "{" in level:
            raise LearningError(f"{topic} has a placeholder beside other text; it is a whole level", key="topic")
        levels.append(f"(?P<{placeholder[1]}>[^/]+)" if placeholder else "[^/]*" if level == "+" else re.escape(level))
    return re.compile("/".join(levels))


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a file, without a line that a kill left half written."""
    if not path.exists():
        return
    # Such a message was not acknowledged: the broker sends it again.
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        path.write_bytes(data)
    for number, line in enumerate(data.splitlines(), 1):
        try:
            entry = json.loads(line)
            if not all(isinstance(entry[key], str) for key in ("id", "topic", "payload")):
                raise TypeError("a value is no text")
        except (ValueError, TypeError, KeyError) as e:
            raise LearningError(
                f"{path}, line {number} is damaged: {e}", file=str(path), hint="remove the line, or start with --fresh"
            ) from e
        yield entry


def _readings(payload: str, place: str) -> list[Array]:
    """The rows of a payload: an inference request with a single input, or nested lists (channels, samples)."""
    try:
        document = json.loads(payload)
        if isinstance(document, dict):
            (tensor,) = document["inputs"]
            batch = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
        else:
            batch = np.array(document, np.float32)[np.newaxis]
        # Without values, a shape of a few characters has any number of rows.
        if batch.ndim < 2 or not batch.size:
            raise ValueError(f"the shape {list(batch.shape)} is of no rows with values")
    # ValueError: other JSON, ragged lists, another number of values than the shape's. OverflowError: huge integers.
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as e:
        raise LearningError(
            f"{place} holds no readings: {e}",
            place=place,
            hint="a request of the Open Inference Protocol with one input, or nested lists (channels, samples)",
        ) from e
    return list(batch)
