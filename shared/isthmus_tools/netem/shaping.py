"""Link shape and bandwidth shaping: departure and arrival times of bytes, computed without a clock or a socket.

Serialisation runs in virtual time, as in Virtual Clock (L. Zhang, SIGCOMM 1990): a shaper is busy until its last byte
has departed, and later bytes start there. A late wake-up of the relay therefore costs no bandwidth. The kernel's
counterpart is the token bucket of tc-tbf(8).
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass

from isthmus.errors import LocalError

UNLIMITED = math.inf
MIN_QUANTUM = 1500  # bytes: a packet of Ethernet
MAX_QUANTUM = 65536  # bytes: as many as the relay's SOCKET_BUFFER
INITIAL_WINDOW = 10 * 1448  # RFC 6928: 10 segments, here with timestamps
MAX_WINDOW = 16 << 20  # bytes in flight, as on a host with a generous net.ipv4.tcp_rmem
_MIN_BPS = 1000.0  # a packet of Ethernet takes 12 s
_QUANTUM_S = 0.001  # ten times the resolution of PreciseSelector
_MIN_RTO_S = 0.2  # Linux's TCP_RTO_MIN


@dataclass(frozen=True)
class LinkShape:
    """Parameters of the network between client and target; "up" is from the client to the target.

    Units: rates in bits of payload per second, times in seconds. `rtt_s` and `jitter_s` (the round trip varies by up
    to ± `jitter_s`) are halved between the directions; `up_delay_s` and `down_delay_s` replace the halves of `rtt_s`.
    A new connection carries its first byte after `connect_rtts` round trips. With `slow_start` a connection sends 10
    segments in its first round trip, doubles them each round trip, and starts again after a pause. `cuts_per_s` is the
    rate of random resets of each established connection.

    Raises:
        LocalError: a value that no network has.
    """

    uplink_bps: float = UNLIMITED
    downlink_bps: float = UNLIMITED
    rtt_s: float = 0.0
    jitter_s: float = 0.0
    up_delay_s: float | None = None
    down_delay_s: float | None = None
    connect_rtts: float = 1.0
    slow_start: bool = False
    cuts_per_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("uplink_bps", "downlink_bps"):
            if not getattr(self, name) >= _MIN_BPS:
                raise LocalError(f"{name} is {getattr(self, name)}; it is at least {_MIN_BPS:g} bit/s")
        for name in ("rtt_s", "jitter_s", "up_delay_s", "down_delay_s", "connect_rtts", "cuts_per_s"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < math.inf):
                raise LocalError(f"{name} is {value}; it is 0 or more")

    @property
    def up(self) -> Direction:
        """The direction from the client to the target."""
        return Direction(self.uplink_bps, self._half(self.up_delay_s), self.jitter_s / 2)

    @property
    def down(self) -> Direction:
        """The direction from the target to the client."""
        return Direction(self.downlink_bps, self._half(self.down_delay_s), self.jitter_s / 2)

    @property
    def round_trip_s(self) -> float:
        """Sum of both propagation delays: `rtt_s`, unless the directions have delays of their own."""
        return self.up.delay_s + self.down.delay_s

    def _half(self, delay_s: float | None) -> float:
        return self.rtt_s / 2 if delay_s is None else delay_s


@dataclass(frozen=True)
class Direction:
    """Rate, propagation delay and jitter of one direction of a link."""

    bps: float
    delay_s: float
    jitter_s: float

    @property
    def quantum(self) -> int:
        """Bytes that a connection sends in its turn: a millisecond of the rate, at least a packet."""
        return int(min(max(self.bps / 8 * _QUANTUM_S, MIN_QUANTUM), MAX_QUANTUM))

    @property
    def in_flight(self) -> int:
        """Bandwidth-delay product in bytes, at most MAX_WINDOW."""
        max_delay_s = self.delay_s + self.jitter_s
        return int(min(self.bps / 8 * max_delay_s, MAX_WINDOW)) if max_delay_s else 0


class Shaper:
    """Bandwidth of one direction, shared by all connections in the order of their sends."""

    def __init__(self, direction: Direction, rng: random.Random) -> None:
        self.direction = direction
        self._rng = rng
        self._busy_until = -math.inf

    def send(self, at: float, size: int) -> float:
        """Departure time of the last of `size` bytes that are ready at `at`."""
        self._busy_until = max(self._busy_until, at) + size * 8 / self.direction.bps
        return self._busy_until

    def delay_s(self) -> float:
        """Propagation delay with jitter, in seconds."""
        limit = self.direction.jitter_s
        return max(0.0, self.direction.delay_s + (self._rng.uniform(-limit, limit) if limit else 0.0))


class Flow:
    """One direction of a connection: its bytes share a shaper and arrive in order."""

    def __init__(self, shaper: Shaper) -> None:
        self.shaper = shaper
        self._last_arrival = -math.inf

    def send(self, at: float, size: int) -> tuple[float, float]:
        """Departure and arrival of `size` bytes that are ready at `at`."""
        departure = self.shaper.send(at, size)
        return departure, self.arrive(departure)

    def arrive(self, departure: float) -> float:
        """Arrival after a departure, never before an earlier arrival: TCP delivers in order."""
        self._last_arrival = max(self._last_arrival, departure + self.shaper.delay_s())
        return self._last_arrival


class SlowStartWindow:
    """Congestion window of TCP's slow start without losses: it grows by the bytes acknowledged.

    Source: RFC 6928 (initial window), RFC 5681 sections 3.1 (slow start) and 4.1 (restart after idle).
    """

    def __init__(self) -> None:
        self._size = INITIAL_WINDOW
        self._outstanding = 0
        self._unacknowledged: deque[tuple[float, int]] = deque()
        self._idle_since = -math.inf

    def may_send(self, at: float, size: int, round_trip_s: float) -> float:
        """Earliest time with room in the window for `size` bytes that are ready at `at`."""
        # After a retransmission timeout of idleness the window starts again, RFC 5681 section 4.1.
        if at - self._idle_since > max(_MIN_RTO_S, 2 * round_trip_s):
            self._unacknowledged.clear()
            self._outstanding, self._size = 0, INITIAL_WINDOW
        while self._unacknowledged and (self._unacknowledged[0][0] <= at or self._outstanding + size > self._size):
            acknowledged_at, acknowledged = self._unacknowledged.popleft()
            self._outstanding -= acknowledged
            self._size = min(self._size + acknowledged, MAX_WINDOW)
            at = max(at, acknowledged_at)
        return at

    def on_sent(self, size: int, acknowledged_at: float) -> None:
        """Count `size` bytes as outstanding until `acknowledged_at`."""
        self._unacknowledged.append((acknowledged_at, size))
        self._outstanding += size
        self._idle_since = acknowledged_at
