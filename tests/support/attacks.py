"""Attacks on a function: each is refused with its status, nothing runs, and the function serves on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flask.testing import FlaskClient

from support.bundles import metrics

MIN_CASES = {
    "frame": 150,
    "sealed": 150,
    "signed": 150,
    "key": 80,
    "token": 180,
    "manifest": 70,
    "signature": 120,
    "alias": 60,
    "sealed blob": 50,
    "grant": 60,
    "name": 130,
    "segment name": 100,
    "stored name": 300,
    "bomb": 35,
    "photo bomb": 20,
    "tensor length": 80,
    "photo length": 15,
    "claim": 45,
    "connection": 90,
}
"""How many distinct cases of each kind there are at least."""


@dataclass(frozen=True)
class Attack:
    """A hostile request: what it does, its parts for a test client, and the status that refuses it."""

    what: str
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    path: str = "/"
    method: str = "POST"

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes one request another than the next."""
        return self.method, self.path, self.body, *sorted(self.headers.items())


@dataclass(frozen=True)
class Target:
    """A function under attack, with a request that it serves."""

    client: FlaskClient
    good: Callable[[FlaskClient], int]
    stage: str = "run"
    """The stage of requests that ran a segment; a router's is `hop0`."""
    metrics_headers: dict[str, str] = field(default_factory=dict)

    def runs(self) -> float:
        """How many segments ran since the start."""
        found = metrics(self.client, self.metrics_headers)
        return found.get(("isthmus_stage_seconds_count", (("stage", self.stage),)), 0.0)

    def refuses(self, kind: str, attacks: Iterable[Attack], prepare: Callable[[Attack], object] | None = None) -> None:
        """Send each attack; all are distinct, refused with their statuses as JSON, and none runs anything."""
        assert self.good(self.client) == 200
        before, seen, wrong = self.runs(), set[tuple[Any, ...]](), []
        for attack in attacks:
            if prepare is not None:
                prepare(attack)
            response = self.client.open(attack.path, method=attack.method, data=attack.body, headers=attack.headers)
            document = response.get_json(silent=True)
            if response.status_code != attack.status or not isinstance(document, dict) or "error" not in document:
                wrong.append(f"{attack.what}: {response.status_code}, not {attack.status}: {response.data[:200]!r}")
            seen.add(attack.key)
        assert not wrong, "\n".join(wrong)
        assert self.runs() == before
        assert self.good(self.client) == 200
        assert self.runs() == before + 1
        assert len(seen) >= MIN_CASES[kind], f"{len(seen)} cases"


def other_character(character: str) -> str:
    """One that stands for other bytes, also at the end of base64, where up to four bits of a character are unused."""
    return "A" if character in "wxyz0123456789+/-_" else "x"


def flips(data: bytes, places: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """The bytes with one bit of each place inverted."""
    for place in places:
        yield place, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
