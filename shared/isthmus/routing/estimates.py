"""Live estimates of links and functions, from the calls themselves.

Bounded: a link for each hop, and the latest MAX_SEGMENTS segments and candidates. Clocks are monotonic.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from cachetools import LRUCache

from isthmus.http.pool import ExchangeTimes
from isthmus.pipeline.hop import HopReply
from isthmus.routing.links import Link, LinkEstimate, Transfer
from isthmus.routing.own_work import OwnWork

MAX_SEGMENTS = 1024
MAX_HOPS = 64
# Their median follows a change within five calls, and four outliers do not move it.
_LATEST = 9
# A segment's first run after a load also allocates memory; so short a load is a look-up.
_COLD_LOAD_S = 0.001
# Weight of a call in the mean wait: some ten calls count.
_WAIT_WEIGHT = 0.2
# Weight of a call in a hop's stall, and the bound on one: beyond that a machine was paused, and no quota at work.
_STALL_WEIGHT, _MAX_STALL = 0.05, 16.0
# Of a share of requests that end at an exit: the planned one counts as so many of these, and the latest so many count.
_PRIOR_EXITS, _LATEST_EXITS = 8, 64
# Headers of a request and of a probe, with a gateway's.
_HEADER_BYTES = 300


class HopCall(NamedTuple):
    """A call of a hop that has not ended."""

    hop: str
    transfer: Transfer


class Median:
    """Median of the latest values; not thread-safe."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=_LATEST)
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Take a value into account."""
        self._values.append(value)
        ranked = sorted(self._values)
        # The lower of two middles: what disturbs a measurement makes it longer.
        self.value = ranked[(len(ranked) - 1) // 2]


class _SegmentTimes:
    def __init__(self) -> None:
        self.run, self.busy = Median(), Median()


class _CandidateTimes:
    def __init__(self) -> None:
        self.preprocess, self.encode, self.whole = Median(), Median(), Median()
        # None until a request meets the exit: earlier ones may have asked for the full model.
        self.exit_share: float | None = None
        self.exits_known = _PRIOR_EXITS

    def ended(self, planned_share: float, *, is_early: bool) -> None:
        share = planned_share if self.exit_share is None else self.exit_share
        self.exits_known = min(self.exits_known + 1, _LATEST_EXITS)
        self.exit_share = share + (is_early - share) / self.exits_known


class Estimates:
    """Estimates of each hop's link, each segment's seconds and each candidate's work at the router; thread-safe.

    The event `ambiguous` is set by calls that do not tell a longer round trip from a lower rate.
    """

    def __init__(self) -> None:
        self.ambiguous = threading.Event()
        self.own_work = OwnWork()
        self._lock = threading.Lock()
        self._links: LRUCache[str, Link] = LRUCache(MAX_HOPS)
        self._waits: LRUCache[str, float] = LRUCache(MAX_HOPS)
        self._stalls: LRUCache[str, float] = LRUCache(MAX_HOPS)
        self._segments: LRUCache[tuple[str, str, str], _SegmentTimes] = LRUCache(MAX_SEGMENTS)
        self._work: LRUCache[tuple[str, str], _CandidateTimes] = LRUCache(MAX_SEGMENTS)

    def began(self, hop: str, size: int) -> HopCall:
        """A call with about `size` bytes begins."""
        return HopCall(hop, self._link(hop).begin(size + _HEADER_BYTES, time.monotonic()))

    def failed(self, call: HopCall) -> None:
        """A call ended without a response of use."""
        self._link(call.hop).fail(call.transfer)

    def succeeded(self, call: HopCall, bundle: str, segment: str, reply: HopReply, *, is_usual: bool = True) -> None:
        """Learn from a call that ends now; of a call of unusual size for its segment nothing about the segment."""
        link, served = self._link(call.hop), reply.served
        link.end(call.transfer, reply.exchange, served.total_s, reply.sent_bytes + _HEADER_BYTES, time.monotonic())
        if link.is_ambiguous:
            self.ambiguous.set()
        key = (call.hop, bundle, segment)
        with self._lock:
            wait_s = self._waits.get(call.hop)
            self._waits[call.hop] = (
                served.wait_s if wait_s is None else wait_s + _WAIT_WEIGHT * (served.wait_s - wait_s)
            )
            if (times := self._segments.get(key)) is None:
                times = self._segments[key] = _SegmentTimes()
            if is_usual and served.load_s < _COLD_LOAD_S:
                busy_s = max(reply.run_s, served.total_s - served.wait_s - served.load_s)
                if times.busy.value:
                    ratio = min(busy_s / times.busy.value, _MAX_STALL)
                    stall = self._stalls.get(call.hop, 1.0)
                    self._stalls[call.hop] = stall + _STALL_WEIGHT * (ratio - stall)
                times.run.add(reply.run_s)
                times.busy.add(busy_s)

    def probe_due(self, hop: str) -> float:
        """When a hop's link should be probed next, on the monotonic clock; infinite without recent calls."""
        return self._link(hop).probe_due(time.monotonic())

    def probing(self, hop: str) -> None:
        """A probe is sent."""
        self._link(hop).probing(time.monotonic())

    def probed(self, hop: str, times: ExchangeTimes) -> None:
        """Learn from a probe that ends now."""
        self._link(hop).probed(times, _HEADER_BYTES, time.monotonic())

    def answered(
        self, bundle: str, candidate: str, seconds: float, preprocess_s: float | None, encode_s: float | None
    ) -> None:
        """Learn from a request that took `seconds` along a candidate.

        `preprocess_s` and `encode_s` are the router's own work: making the input of a photo (None for a request of
        tensors), and the codecs (None for a request that ended before these).
        """
        with self._lock:
            times = self._times_of(bundle, candidate)
            times.whole.add(seconds)
            if encode_s is not None:
                times.encode.add(encode_s)
            if preprocess_s is not None:
                times.preprocess.add(preprocess_s)

    def met_exit(self, bundle: str, candidate: str, planned_share: float, *, is_early: bool) -> None:
        """Learn whether a request along a candidate with an exit ended there; `planned_share` is the plan's."""
        with self._lock:
            self._times_of(bundle, candidate).ended(planned_share, is_early=is_early)

    def exit_share(self, bundle: str, candidate: str, planned_share: float) -> float:
        """The share of a candidate's latest requests that ended at its exit; the plan's before the first."""
        with self._lock:
            times = self._work.get((bundle, candidate))
            return planned_share if times is None or times.exit_share is None else times.exit_share

    def link(self, hop: str) -> LinkEstimate:
        """The estimate of the link to a hop."""
        return self._link(hop).estimate(time.monotonic())

    def run_s(self, hop: str, bundle: str, segment: str) -> float | None:
        """Median seconds of a segment's own computation; None where it did not run yet."""
        with self._lock:
            times = self._segments.get((hop, bundle, segment))
            return times.run.value if times else None

    def busy_s(self, hop: str, bundle: str, segment: str) -> float | None:
        """Median seconds that the function has a call for a segment, decoding included, waits and loads excluded."""
        with self._lock:
            times = self._segments.get((hop, bundle, segment))
            return times.busy.value if times else None

    def wait_s(self, hop: str) -> float:
        """Mean seconds that a hop's latest calls waited for a CPU there."""
        with self._lock:
            return float(self._waits.get(hop, 0.0))

    def stall(self, hop: str) -> float:
        """Mean over median seconds of a hop's runs, at least 1.

        A CPU quota lets a process run at full speed until its share of a period is spent, and then stands it still: few
        runs bear all of the waiting, which a median does not show. What a hop can do in a second goes by the mean.
        """
        with self._lock:
            return max(1.0, float(self._stalls.get(hop, 1.0)))

    def preprocess_s(self, bundle: str, candidate: str) -> float | None:
        """Median seconds of making the input at the router; None where no photo has taken the candidate yet."""
        return self._median(bundle, candidate, lambda times: times.preprocess)

    def encode_s(self, bundle: str, candidate: str) -> float | None:
        """Median seconds of the codecs at the router; None where the candidate was not taken yet."""
        return self._median(bundle, candidate, lambda times: times.encode)

    def whole_s(self, bundle: str, candidate: str) -> float | None:
        """Median seconds of the latest requests along a candidate; None where it was not taken yet."""
        return self._median(bundle, candidate, lambda times: times.whole)

    def _times_of(self, bundle: str, candidate: str) -> _CandidateTimes:
        if (times := self._work.get((bundle, candidate))) is None:
            times = self._work[bundle, candidate] = _CandidateTimes()
        return times

    def _median(self, bundle: str, candidate: str, part: Callable[[_CandidateTimes], Median]) -> float | None:
        with self._lock:
            times = self._work.get((bundle, candidate))
            return part(times).value if times else None

    def _link(self, hop: str) -> Link:
        with self._lock:
            if (link := self._links.get(hop)) is None:
                link = self._links[hop] = Link(time.monotonic())
            return link
