"""When bytes leave a link and when they arrive: a shape, and arithmetic on times that are given. No clock, no socket.

Serialisation is virtual: a link is busy until the moment its last byte has left, and what comes next starts there. So
a late wake-up of whoever moves the bytes costs no bandwidth.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass

from isthmus.errors import LocalError

UNLIMITED = math.inf
MIN_QUANTUM = 1500
MAX_QUANTUM = 65536
FIRST_WINDOW = 10 * 1448  # RFC 6928, with timestamps
WINDOW = 16 << 20  # in flight at most, as on a host with a generous net.ipv4.tcp_rmem
_MIN_BPS = 1000.0
_QUANTUM_S = 0.001
_MIN_RTO_S = 0.2


@dataclass(frozen=True)
class LinkShape:
    """A network between client and target: what it does to bytes. "Up" is from the client to the target.

    Units: rates in bits of payload per second, times in seconds. `rtt_s` and `jitter_s` (the round trip varies by up
    to ± that) are halved between the ways; `up_delay_s` and `down_delay_s` go before the halves of `rtt_s`.
    `connect_rtts` round trips pass before a new connection carries a byte. With `slow_start` a connection sends 10
    segments in its first round trip, doubles each round trip, and starts again after a pause. `cuts_per_s` is the rate
    at which each established connection is reset.

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
    def up(self) -> Way:
        """From the client to the target."""
        return Way(self.uplink_bps, self._half(self.up_delay_s), self.jitter_s / 2)

    @property
    def down(self) -> Way:
        """From the target to the client."""
        return Way(self.downlink_bps, self._half(self.down_delay_s), self.jitter_s / 2)

    @property
    def round_trip_s(self) -> float:
        """Both delays: `rtt_s`, unless the ways were set apart."""
        return self.up.delay_s + self.down.delay_s

    def _half(self, delay_s: float | None) -> float:
        return self.rtt_s / 2 if delay_s is None else delay_s


@dataclass(frozen=True)
class Way:
    """One direction of a link."""

    bps: float
    delay_s: float
    jitter_s: float

    @property
    def quantum(self) -> int:
        """Bytes that one connection sends before another has its turn: a millisecond's, one packet at least."""
        return int(min(max(self.bps / 8 * _QUANTUM_S, MIN_QUANTUM), MAX_QUANTUM))

    @property
    def in_flight(self) -> int:
        """Bytes of one connection that can be between the two ends: rate × delay, within WINDOW."""
        longest_s = self.delay_s + self.jitter_s
        return int(min(self.bps / 8 * longest_s, WINDOW)) if longest_s else 0


class Lane:
    """One direction of one link; all its connections send through it, in the order in which they ask."""

    def __init__(self, way: Way, chance: random.Random) -> None:
        self.way = way
        self._chance = chance
        self._busy_until = -math.inf

    def send(self, at: float, size: int) -> float:
        """When the last of `size` bytes has left, if they are there from `at` on."""
        self._busy_until = max(self._busy_until, at) + size * 8 / self.way.bps
        return self._busy_until

    def travel(self) -> float:
        """Seconds from having left to arriving."""
        jitter = self._chance.uniform(-self.way.jitter_s, self.way.jitter_s) if self.way.jitter_s else 0.0
        return max(0.0, self.way.delay_s + jitter)


class Flow:
    """One direction of one connection: its bytes share the lane and never overtake each other."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._last_arrival = -math.inf

    def send(self, at: float, size: int) -> tuple[float, float]:
        """When `size` bytes that are there from `at` on have left, and when they arrive."""
        left = self.lane.send(at, size)
        return left, self.arrive(left)

    def arrive(self, left: float) -> float:
        """When what has left then arrives: never before what went ahead of it."""
        self._last_arrival = max(self._last_arrival, left + self.lane.travel())
        return self._last_arrival


class Window:
    """TCP's slow start without losses: what may be unacknowledged, growing by what is acknowledged.

    Source: RFC 6928 (the first window), RFC 5681 section 4.1 (a pause starts it again).
    """

    def __init__(self) -> None:
        self._size = FIRST_WINDOW
        self._outstanding = 0
        self._unacknowledged: deque[tuple[float, int]] = deque()
        self._quiet_since = -math.inf

    def may_send(self, at: float, size: int, round_trip_s: float) -> float:
        """When there is room for `size` bytes that are there from `at` on."""
        if at - self._quiet_since > max(_MIN_RTO_S, 2 * round_trip_s):
            self._unacknowledged.clear()
            self._outstanding, self._size = 0, FIRST_WINDOW
        while self._unacknowledged and (self._unacknowledged[0][0] <= at or self._outstanding + size > self._size):
            acknowledged_at, acknowledged = self._unacknowledged.popleft()
            self._outstanding -= acknowledged
            self._size = min(self._size + acknowledged, WINDOW)
            at = max(at, acknowledged_at)
        return at

    def sent(self, size: int, acknowledged_at: float) -> None:
        """`size` bytes went out; their acknowledgement is back at `acknowledged_at`."""
        self._unacknowledged.append((acknowledged_at, size))
        self._outstanding += size
        self._quiet_since = acknowledged_at
