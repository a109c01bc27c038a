"""A real MQTT broker, Debian's mosquitto, with passwords and a store."""

from __future__ import annotations

import shutil
import subprocess
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest

from isthmus.events.brokers.mqtt import MqttConsumer, MqttPublisher
from isthmus.events.configuration import Bytes, MqttPlace
from support.brokers import PASSWORD, USER, BrokerServer

MAX_PACKET_BYTES = 4 * 2**20


class MqttServer(BrokerServer):
    """mosquitto, spoken to by MQTT 5; consumers of one place are a group, each with its own session."""

    redelivery_s = None
    counts_deliveries = False
    deduplicates = False
    tells_backlog = False
    version = "5"

    def __init__(self, folder: Path, *settings: str) -> None:
        self._program, self._settings = program(), settings
        self._sessions: dict[str, list[weakref.ref[_SessionConsumer]]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        passwords = folder / "passwords"
        passwords.touch(mode=0o600)
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), USER, PASSWORD], check=True, capture_output=True)
        super().__init__(folder)

    def command(self) -> Sequence[str]:
        file = self.folder / "mosquitto.conf"
        lines = (
            "user root",  # else it gives up the right to write to the folder
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous false",
            f"password_file {self.folder / 'passwords'}",
            f"max_packet_size {MAX_PACKET_BYTES}",
            "persistence true",
            f"persistence_location {self.folder}/",
            # After each change, as the test's kill leaves no time for the usual half hour.
            "autosave_on_changes true",
            "autosave_interval 1",
            *self._settings,
        )
        file.write_text("\n".join(lines) + "\n")
        return [self._program, "-c", str(file)]

    def place(self, topic: str, **options: str) -> MqttPlace:
        version = options.pop("version", self.version)
        # Only MQTT 5 tells the broker's limit.
        limit = Bytes(256 * 2**20 if version == "5" else 2**20)
        url = f"mqtt://127.0.0.1:{self.port}"
        return MqttPlace(url=url, topic=topic, version=version, user=USER, max_bytes=limit, **options)

    def consumer(self, place: str, *, password: str = PASSWORD) -> MqttConsumer:
        # A session is one consumer's at a time; that of a closed one is the next one's.
        sessions = self._sessions.setdefault(place, [])
        index = next((n for n, ref in enumerate(sessions) if (c := ref()) is None or c.is_closed), len(sessions))
        options = {"client_id": f"{place[:12]}-{index}", "group": "workers" if self.is_shared else ""}
        consumer = _SessionConsumer(self.place(place, **options), password)
        sessions[index : index + 1] = [weakref.ref(consumer)]
        return consumer

    def publisher(self, place: str, *, password: str = PASSWORD) -> MqttPublisher:
        return MqttPublisher(self.place(place), password)


class Mqtt3Server(MqttServer):
    """The same by MQTT 3.1.1."""

    has_headers = False
    version = "3.1.1"


class _SessionConsumer(MqttConsumer):
    is_closed = False

    def close(self) -> None:
        self.is_closed = True
        super().close()


def program() -> str:
    """The path of mosquitto; a test without it is skipped."""
    path = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    return path
