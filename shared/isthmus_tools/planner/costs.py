"""What one candidate is predicted to cost: seconds as named terms, money, joules.

The seconds of a segment are measured ones where the profile timed that very graph, else sums of its nodes' times, which
add up to the measured whole. Nothing here runs anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Candidate, Terms
from isthmus.artifacts.profile import HopCost, Profile
from isthmus.artifacts.segment_id import SegmentId
from isthmus_tools.planner.prices import Prices

HEADERS_UP, HEADERS_DOWN = 340, 420
"""Bytes of HTTP around a frame, each way, as a hop's connections write and waitress answers them."""


@dataclass(frozen=True)
class Exchange:
    """One call to a function: bytes of its frames."""

    sent: int
    received: int


@dataclass(frozen=True)
class Work:
    """Seconds of a tier's run, and where they are from: one of `plan.SOURCES`."""

    seconds: float
    source: str


@dataclass(frozen=True)
class Load:
    """What one candidate does, whatever the link: calls, runs and codecs, in bytes and in seconds of its tiers.

    `again` are the further calls of closer looks, on average; bytes and codecs count them already, runs do not.
    """

    near: Exchange | None = None
    far: Exchange | None = None
    edge: Work = Work(0.0, "")
    cloud: Work = Work(0.0, "")
    preprocess: float = 0.0
    pack: float = 0.0
    unpack: float = 0.0
    again: float = 0.0


def run_seconds(profile: Profile, segment_id: SegmentId, nodes: Collection[int], same: Callable[[str], bool]) -> Work:
    """A segment's run on the profile's device: as timed where the profile has the `same` one, else of its nodes."""
    timed = profile.segments.get(segment_id)
    if timed is not None and same(segment_id):
        return Work(timed.run.median, "measured")
    return Work(sum(profile.nodes[i] for i in nodes), "predicted")


def terms(load: Load, near: HopCost | None, far: HopCost | None, conditions: Conditions) -> Terms:
    """The seconds of one request under `conditions`; the hops' costs are those that the profiles measured."""
    up = down = rtt = 0.0
    calls = 1 + load.again
    if load.far is not None:
        up = (load.far.sent + calls * HEADERS_UP) * conditions.up_byte_s
        down = (load.far.received + calls * HEADERS_DOWN) * conditions.down_byte_s
        rtt = calls * conditions.rtt_s
    return Terms(
        preprocess=load.preprocess,
        edge_run=load.edge.seconds,
        edge_hop=hop_seconds(near, load.near),
        pack=load.pack,
        up=up,
        rtt=rtt,
        down=down,
        unpack=load.unpack,
        cloud_run=calls * load.cloud.seconds,
        cloud_hop=hop_seconds(far, load.far, calls),
        edge_source=load.edge.source,
        cloud_source=load.cloud.source,
    )


def hop_seconds(cost: HopCost | None, exchange: Exchange | None, calls: float = 1.0) -> float:
    """What calls take beside their runs: a fixed part each, and for each byte sent and received in all."""
    if cost is None or exchange is None:
        return 0.0
    return max(0.0, calls * cost.fixed_s + cost.up_byte_s * exchange.sent + cost.down_byte_s * exchange.received)


def price_of(candidate: Candidate, prices: Prices, cpus: Mapping[str, int]) -> float | None:
    """Money for one request: each tier's busy seconds times its CPUs, and the bytes; None if a price is missing."""
    if prices.missing_for_cost:
        return None
    t, p = candidate.predicted, prices
    tiers = (t.edge_busy, p.edge.cpu_second, cpus["edge"]), (t.cloud_busy, p.cloud.cpu_second, cpus["cloud"])
    compute = sum(busy * (price or 0.0) * count for busy, price, count in tiers)
    return compute + (candidate.up_bytes * (p.link.gb_up or 0.0) + candidate.down_bytes * (p.link.gb_down or 0.0)) / 1e9


def energy_of(candidate: Candidate, prices: Prices) -> float | None:
    """Joules of one request: each tier active while it computes and idle for the rest, and the bytes."""
    if prices.missing_for_energy:
        return None
    t, found = candidate.predicted, 0.0
    for busy, tier in ((t.edge_busy, prices.edge), (t.cloud_busy, prices.cloud)):
        found += busy * (tier.active_watts or 0.0) + max(0.0, candidate.seconds - busy) * (tier.idle_watts or 0.0)
    return found + (candidate.up_bytes + candidate.down_bytes) * (prices.link.joules_per_byte or 0.0)


def priced(candidate: Candidate, prices: Prices | None, cpus: Mapping[str, int]) -> Candidate:
    """`candidate` with its price and energy, as far as there are prices for them."""
    if prices is None:
        return candidate
    return replace(candidate, price=price_of(candidate, prices, cpus), energy_j=energy_of(candidate, prices))
