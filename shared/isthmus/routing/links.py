"""Live model of the link to a hop: round trip and rate of each direction, from the transfers of calls and probes.

A transfer of x bytes takes `rtt + x * pace` seconds, where the pace is the seconds of a byte. A Kalman filter follows
both: transfers of one size alone show their sum, and transfers of several sizes show each. Where other transfers share
the link, x counts their bytes as well.

Sources: R. E. Kalman, A New Approach to Linear Filtering (1960); E. S. Page, Continuous Inspection Schemes (1954), for
steps; P. J. Huber, Robust Estimation of a Location Parameter (1964), for outliers.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from isthmus.http.pool import ExchangeTimes

# Deviations before the first transfer, and after a step: a round trip across a continent, the pace of 1 Mbit/s.
_PRIOR_RTT_S, _PRIOR_PACE = 0.1, 8e-6
# Relative change of a link in a second without a step; the estimate then averages some ten transfers.
_DRIFT_PER_S = 0.05
# The error of a transfer relative to its seconds, at first and within bounds, and the resolution of a thread's waking.
_FIRST_NOISE, _MIN_NOISE, _MAX_NOISE, _RESOLUTION_S = 0.2, 0.03, 0.5, 0.0003
# Page's test, in deviations: the slack of a transfer, the most that one counts, and the sums that are a step.
# Four far outliers in a row are a step upwards; two do for a step downwards, since nothing makes a transfer faster.
_SLACK, _MAX_COUNT, _STEP_UP, _STEP_DOWN = 1.5, 6.0, 16.0, 8.0
# An outlier counts as one of so many deviations.
_HUBER = 2.0
# Deviations of the round trip, relative and absolute, from which on a probe helps.
_CLEAR_RTT, _CLEAR_RTT_S = 0.1, 0.001
# A step is the round trip's or the pace's where transfers are e ** 3 times likelier so.
_CLEAR_EVIDENCE = 3.0
# Transfers from which the filter starts anew after a step.
_REPLAYED = 8
# Finished transfers whose intervals are in memory, for transfers that shared the link with them.
_FINISHED = 32
# Less than this of a response arrives at once, whatever the rate.
_MIN_REST_BYTES = 8192
# A transfer in so few bytes, a packet with its headers, shows the round trip at any rate.
MAX_SMALL_BYTES = 1500
# A link without a small transfer for so long is probed: a probe is some 600 bytes in all.
PROBE_AFTER_S = 5.0
# Pause between probes where transfers alone do not tell the round trip.
MIN_PROBE_PAUSE_S = 0.1
# Without a call for so long a link is probed no more: probes would keep an unused function from scaling to zero.
MAX_PROBED_S = 600.0
# The longest time for which drift is counted, so that the deviations of an idle link stay finite.
_MAX_IDLE_S = 60.0


class LinkEstimate(NamedTuple):
    """The link to a hop; None for properties not observed yet. Units: seconds, bytes a second.

    Small transfers cannot show a high rate: with `is_bound`, `up_bytes_s` is a lower bound, and the rate may be far
    higher. `age_s` are the seconds since the latest observation, and `connect_s` the time of a new connection, which an
    idle one saves.
    """

    rtt_s: float | None = None
    up_bytes_s: float | None = None
    down_bytes_s: float | None = None
    age_s: float | None = None
    is_bound: bool = False
    connect_s: float | None = None


_State = tuple[float, float, float, float, float]
"""Round trip and pace, their variances, and in between these their covariance."""


class _StepTest:
    """Page's test of deviations in either direction."""

    def __init__(self) -> None:
        self._above = self._below = 0.0

    @property
    def is_suspicious(self) -> bool:
        """Whether a step may have begun."""
        return self._above > 0 or self._below > 0

    @property
    def is_surprised(self) -> bool:
        """Whether the latest deviations were large."""
        return self._above > _SLACK or self._below > _SLACK

    def add(self, ratio: float) -> bool:
        """Count a deviation, in standard deviations; true for a step."""
        self._above = max(0.0, self._above + min(ratio, _MAX_COUNT) - _SLACK)
        self._below = max(0.0, self._below - max(ratio, -_MAX_COUNT) - _SLACK)
        return self._above >= _STEP_UP or self._below >= _STEP_DOWN

    def clear(self) -> None:
        """Begin anew."""
        self._above = self._below = 0.0


class PaceFilter:
    """Kalman filter of round trip and pace; not thread-safe. With `has_rtt` false the round trip is 0.

    Units: seconds, seconds a byte.
    """

    def __init__(self, *, has_rtt: bool = True) -> None:
        self._has_rtt = has_rtt
        self.rtt = self.pace = 0.0
        self.noise = _FIRST_NOISE
        self.count = 0
        self._is_unconfirmed = False
        self._latest = self._rr = self._rp = self._pp = 0.0
        # Of large and of small transfers: a step of the rate leaves the small ones as they were.
        self._tests = _StepTest(), _StepTest()
        self._calm_noise = _FIRST_NOISE
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=_REPLAYED)
        self._widen()

    @property
    def pace_deviation(self) -> float:
        """Standard deviation of the pace."""
        return math.sqrt(max(self._pp, 0.0))

    @property
    def is_ambiguous(self) -> bool:
        """Whether a probe would help: after transfers unlike the estimate, after a step, where all are of one size."""
        is_unclear = self._rr > max(_CLEAR_RTT * self.rtt, _CLEAR_RTT_S) ** 2
        return self._is_unconfirmed or is_unclear or any(test.is_surprised for test in self._tests)

    def observe(self, size: float, seconds: float, now: float, trips: float = 1.0) -> bool:
        """Learn from a transfer of `size` bytes after `trips` round trips; true if the link has taken a step."""
        self._drift(now)
        expected = trips * self.rtt + size * self.pace
        # Of a transfer that takes longer than expected, noise is a share of the expected seconds: else no transfer
        # would ever be an outlier.
        error, deviation = self._innovation(size, seconds, trips, min(expected, seconds) if self.count else seconds)
        is_step = self._tests[size <= MAX_SMALL_BYTES].add(error / deviation)
        if any(test.is_suspicious for test in self._tests):
            self._recent.append((size, seconds, trips))
        else:
            self._recent.clear()
            self._calm_noise = self.noise
        self.count += 1
        if size <= MAX_SMALL_BYTES:
            self._is_unconfirmed = False
        if is_step and self.count > 1:
            self._start_anew()
            return True
        relative = min(abs(error), _HUBER * deviation) / max(expected, _RESOLUTION_S)
        # 1.25 mean absolute errors are a standard deviation.
        self.noise += 0.05 * (min(max(1.25 * relative, _MIN_NOISE), _MAX_NOISE) - self.noise)
        self._update(max(-_HUBER * deviation, min(error, _HUBER * deviation)), deviation, size, trips)
        return False

    def _drift(self, now: float) -> None:
        elapsed = min(max(now - self._latest, 0.0), _MAX_IDLE_S) if self.count else 0.0
        self._latest = now
        self._rr += (_DRIFT_PER_S * self.rtt) ** 2 * elapsed
        self._pp += (_DRIFT_PER_S * self.pace) ** 2 * elapsed

    def _innovation(self, size: float, seconds: float, trips: float, scale: float) -> tuple[float, float]:
        """The error of the expectation, and its deviation where noise is a share of `scale` seconds."""
        expected = trips * self.rtt + size * self.pace
        spread = trips * trips * self._rr + 2 * trips * size * self._rp + size * size * self._pp
        measured = (self.noise * scale) ** 2 + _RESOLUTION_S**2
        return seconds - expected, math.sqrt(max(spread, 0.0) + measured)

    def _update(self, error: float, deviation: float, size: float, trips: float) -> None:
        variance = deviation * deviation
        toward_rtt, toward_pace = trips * self._rr + size * self._rp, trips * self._rp + size * self._pp
        self.rtt = max(0.0, self.rtt + toward_rtt * error / variance)
        self.pace = max(0.0, self.pace + toward_pace * error / variance)
        self._rr -= toward_rtt * toward_rtt / variance
        self._rp -= toward_rtt * toward_pace / variance
        self._pp -= toward_pace * toward_pace / variance

    def _start_anew(self) -> None:
        """Forget what the transfers since the step contradict: the round trip, the pace, or both."""
        self._is_unconfirmed = True
        # What looked like noise was the step.
        self.noise = self._calm_noise
        for test in self._tests:
            test.clear()
        before = (self.rtt, self.pace, self._rr, 0.0, self._pp)
        of_rtt, of_pace, of_both = (self._replay(before, wide) for wide in ((True, False), (False, True), (True, True)))
        # Where either explains the transfers as well as the other, both stay open.
        single, other = (of_rtt, of_pace) if of_rtt[0] > of_pace[0] else (of_pace, of_rtt)
        chosen = single if single[0] > max(of_both[0], other[0] + _CLEAR_EVIDENCE) else of_both
        self.rtt, self.pace, self._rr, self._rp, self._pp = chosen[1]
        self._recent.clear()

    def _replay(self, state: _State, wide: tuple[bool, bool]) -> tuple[float, _State]:
        """Evidence of the transfers since the step (its logarithm), and the state after them."""
        self.rtt, self.pace, self._rr, self._rp, self._pp = state
        self._widen(*wide)
        evidence = 0.0
        for size, seconds, trips in self._recent:
            error, deviation = self._innovation(size, seconds, trips, seconds)
            evidence -= 0.5 * (error / deviation) ** 2 + math.log(deviation)
            self._update(error, deviation, size, trips)
        return evidence, (self.rtt, self.pace, self._rr, self._rp, self._pp)

    def _widen(self, rtt: bool = True, pace: bool = True) -> None:
        self._rp = 0.0
        if rtt:
            self._rr = max(_PRIOR_RTT_S, self.rtt) ** 2 if self._has_rtt else 0.0
        if pace:
            self._pp = max(_PRIOR_PACE, self.pace) ** 2


@dataclass(eq=False)
class Transfer:
    """An upload under way: its start on the monotonic clock, and its bytes."""

    began: float
    size: int


class Link:
    """The link to one hop, and the transfers that share it; thread-safe.

    A link `began` at that moment is probed until MAX_PROBED_S later, also without a call.
    """

    def __init__(self, began: float = -math.inf) -> None:
        self._lock = threading.Lock()
        self._up, self._down = PaceFilter(), PaceFilter(has_rtt=False)
        self._open: dict[Transfer, None] = {}
        self._finished: deque[tuple[float, float, int]] = deque(maxlen=_FINISHED)
        self._connect_s: float | None = None
        self._latest: float | None = None
        self._called_at = began
        self._small_at = self._probed_at = -math.inf

    def begin(self, size: int, now: float) -> Transfer:
        """An upload of about `size` bytes begins."""
        transfer = Transfer(now, size)
        with self._lock:
            self._open[transfer] = None
            self._called_at = now
        return transfer

    def fail(self, transfer: Transfer) -> None:
        """An upload has ended without a response."""
        with self._lock:
            self._open.pop(transfer, None)

    def end(self, transfer: Transfer, times: ExchangeTimes, served_s: float, sent: int, now: float) -> None:
        """A response to an upload of `sent` bytes was received at `now`; the function had it for `served_s`."""
        began = now - times.whole_s  # of the last try, where the call took several
        up_s = times.first_byte_s - served_s
        with self._lock:
            self._open.pop(transfer, None)
            # A function that claims the whole time, or more, says nothing about the link.
            if up_s <= 0 or times.whole_s <= 0:
                return
            self._observe_up(began, up_s, sent, times, now)
            if times.rest_bytes >= _MIN_REST_BYTES:
                self._down.observe(times.rest_bytes, times.whole_s - times.first_byte_s, now)

    def probed(self, times: ExchangeTimes, sent: int, now: float) -> None:
        """A probe of `sent` bytes was answered at `now`."""
        if times.first_byte_s > 0:
            with self._lock:
                self._observe_up(now - times.whole_s, times.first_byte_s, sent, times, now)

    def estimate(self, now: float) -> LinkEstimate:
        """The present estimate."""
        with self._lock:
            if self._latest is None:
                return LinkEstimate()
            up, is_bound = _rate(self._up)
            down = _rate(self._down)[0] if self._down.count else None
            return LinkEstimate(self._up.rtt, up, down, max(0.0, now - self._latest), is_bound, self._connect_s)

    def probe_due(self, now: float) -> float:
        """When the link should be probed next; infinite without recent calls."""
        with self._lock:
            if not self._open and now - self._called_at > MAX_PROBED_S:
                return math.inf
            latest = -math.inf if self._latest is None else self._latest
            # While calls come: probes of a hop that went away would otherwise go on at that pace.
            if self._up.is_ambiguous and now - latest < PROBE_AFTER_S:
                return self._probed_at + MIN_PROBE_PAUSE_S
            return max(self._small_at, self._probed_at) + PROBE_AFTER_S

    def probing(self, now: float) -> None:
        """A probe is sent."""
        with self._lock:
            self._probed_at = now

    @property
    def is_ambiguous(self) -> bool:
        """Whether a probe would tell a longer round trip from a lower rate."""
        return self._up.is_ambiguous

    def _observe_up(self, began: float, up_s: float, sent: int, times: ExchangeTimes, now: float) -> None:
        # Propagation does not occupy the link; at least a tenth of the transfer does, while little is known.
        ended = began + max(up_s - self._up.rtt, up_s / 10)
        size = sent + self._shared(began, ended, sent)
        self._finished.append((began, ended, sent))
        trips, seconds = (2.0, up_s + times.connect_s) if times.connect_s else (1.0, up_s)
        if size <= MAX_SMALL_BYTES:
            self._small_at = now
        if times.connect_s:
            older = self._connect_s
            self._connect_s = times.connect_s if older is None else older + 0.3 * (times.connect_s - older)
        self._up.observe(size, seconds, now, trips)
        self._latest = now

    def _shared(self, began: float, ended: float, sent: int) -> float:
        """Bytes of other uploads that the link carried between two moments, under equal shares of its rate."""
        carried = 0.0
        # In the order of their ends: all before one that ended earlier did so as well.
        for start, end, size in reversed(self._finished):
            if end <= began:
                break
            if (overlap := min(ended, end) - max(began, start)) > 0:
                carried += size * overlap / (end - start)
        for other in self._open:
            if (overlap := ended - max(began, other.began)) > 0:
                carried += min(other.size, sent * overlap / (ended - began))
        return carried


def _rate(model: PaceFilter) -> tuple[float | None, bool]:
    """Bytes a second, and whether that is only a lower bound; None for a rate beyond measure."""
    pace, deviation = model.pace, model.pace_deviation
    if pace > deviation:
        return 1 / pace, False
    bound = pace + deviation
    return (1 / bound if bound else None), True
