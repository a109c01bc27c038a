"""Transfers over a simulated link, without clock or socket: what a router would record of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from isthmus.http.pool import ExchangeTimes
from isthmus.routing.links import Link, Transfer

MBIT = 1e6


@dataclass
class Wire:
    """A link whose uplink is shared equally by the uploads under way. Units: seconds, bits a second."""

    rtt_s: float
    up_bps: float
    down_bps: float = 100 * MBIT
    noise: float = 0.0
    """Each upload takes up to this share more or less."""


@dataclass
class _Upload:
    transfer: Transfer
    size: int
    left: float
    began: float


class Router:
    """Sends uploads over `wire` and tells `link` of them, on a clock of its own."""

    def __init__(self, wire: Wire, seed: int = 0) -> None:
        self.wire, self.link, self.now = wire, Link(), 100.0
        self.rng = random.Random(seed)
        self._uploads: list[_Upload] = []

    def call(self, size: int, *, served_s: float = 0.01, connect_s: float = 0.0, delay_s: float = 0.0) -> None:
        """An upload on its own, from begin to end."""
        upload = self._begin(size)
        self._advance(self._next_end() - self.now)
        self.now = self._end(upload, served_s, connect_s, delay_s)

    def calls(self, sizes: list[int], gap_s: float, served_s: float = 0.01) -> None:
        """Uploads begun `gap_s` after one another, while earlier ones are still under way; returns after the last."""
        waiting = list(sizes)
        begins = self.now
        while waiting or self._uploads:
            end = self._next_end()
            if waiting and begins <= end:
                self._advance(begins - self.now)
                self._begin(waiting.pop(0))
                begins += gap_s
            else:
                self._advance(end - self.now)
                for upload in [u for u in self._uploads if u.left <= 1e-6]:
                    self._end(upload, served_s)

    def probe(self) -> None:
        """A probe, on a link without uploads."""
        seconds = self.wire.rtt_s * self._noise() + 300 * 8 / self.wire.up_bps
        self.now += seconds
        self.link.probed(ExchangeTimes(0.0, seconds, seconds), 300, self.now)

    def steps(self, sizes: list[int], count: int, pause_s: float = 0.1) -> Iterator[int]:
        """`count` uploads on their own, of these sizes in turn at random; a probe where the link asks for one."""
        for i in range(count):
            self.call(self.rng.choice(sizes))
            if self.link.probe_due(self.now) <= self.now:
                self.link.probing(self.now)
                self.probe()
            self.now += pause_s
            yield i

    def _begin(self, size: int) -> _Upload:
        upload = _Upload(self.link.begin(size, self.now), size, size * self._noise(), self.now)
        self._uploads.append(upload)
        return upload

    def _advance(self, seconds: float) -> None:
        for upload in self._uploads:
            upload.left -= seconds * self.wire.up_bps / 8 / len(self._uploads)
        self.now += seconds

    def _next_end(self) -> float:
        if not self._uploads:
            return float("inf")
        left = min(u.left for u in self._uploads)
        return self.now + max(left, 0.0) * len(self._uploads) * 8 / self.wire.up_bps

    def _end(self, upload: _Upload, served_s: float, connect_s: float = 0.0, delay_s: float = 0.0) -> float:
        """The response arrives a round trip later; the clock stays, as others upload meanwhile; its arrival."""
        self._uploads.remove(upload)
        later = self.wire.rtt_s * self._noise() + served_s + delay_s
        first_byte_s = self.now - upload.began + later
        times = ExchangeTimes(connect_s, first_byte_s, first_byte_s, 0)
        arrival = upload.began + first_byte_s
        self.link.end(upload.transfer, times, served_s, upload.size, arrival)
        return arrival

    def _noise(self) -> float:
        return 1 + self.rng.uniform(-self.wire.noise, self.wire.noise)
