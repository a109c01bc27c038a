"""Predicted costs of a candidate: seconds as named terms, money and joules, from profiles, a link and prices.

A segment's run time is measured where the profile timed that very graph, else the sum of node times, scaled so that
all nodes add up to the measured whole. Prices come from a TOML file; there are no default prices.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from msgspec.structs import replace

from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Candidate, Sources, Terms
from isthmus.artifacts.profile import HopCost, Profile
from isthmus.artifacts.segment_id import SegmentId
from isthmus.errors import ConstraintMalformed

HEADERS_UP, HEADERS_DOWN = 340, 420
"""Bytes of HTTP headers around a frame, each way, between a hop's connections and waitress."""
# A price file holds some ten numbers; the bound is against a wrong path.
MAX_PRICES_BYTES = 2**16
# The currency is part of a column's heading.
MAX_CURRENCY = 16

RunSource: TypeAlias = Literal["measured", "predicted", "scaled", ""]
"""Origin of a run time: timed by a profile, summed from node times, scaled from a run here, or no run at all."""


@dataclass(frozen=True)
class CallBytes:
    """Bytes of the frames of a call to a function."""

    sent: int
    received: int


@dataclass(frozen=True)
class RunTime:
    """Seconds of a tier's run, and their origin."""

    seconds: float
    source: RunSource


NO_RUN = RunTime(0.0, "")


@dataclass(frozen=True)
class Workload:
    """Calls, runs and codecs of a candidate independent of the link, in bytes and seconds of the candidate's tiers.

    `calls` is the mean number of calls over the link: below 1 behind an exit, above with closer looks. Bytes and codecs
    are means as well; the cloud's run time is that of a call.
    """

    near: CallBytes | None = None
    far: CallBytes | None = None
    edge: RunTime = NO_RUN
    cloud: RunTime = NO_RUN
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    calls: float = 1.0


def run_seconds(
    profile: Profile, segment_id: SegmentId, nodes: Collection[int], same_graph: Callable[[str], bool]
) -> RunTime:
    """A segment's run time on the profile's device; `same_graph` says whether the profile timed the same graph."""
    # A sum of node times leaves out what the runtime fuses across nodes, so a measured segment goes first.
    cost = profile.segments.get(segment_id)
    if cost is not None and same_graph(segment_id):
        return RunTime(cost.run.median, "measured")
    return RunTime(sum(profile.nodes[i] for i in nodes), "predicted")


def terms(workload: Workload, near: HopCost | None, far: HopCost | None, conditions: Conditions) -> Terms:
    """The seconds of a request under `conditions`, with hop costs as the profiles measured them."""
    up = down = rtt = 0.0
    calls = workload.calls
    if workload.far is not None:
        up = (workload.far.sent + calls * HEADERS_UP) * conditions.up_byte_s
        down = (workload.far.received + calls * HEADERS_DOWN) * conditions.down_byte_s
        rtt = calls * conditions.rtt_s
    return Terms(
        preprocess=workload.preprocess_s,
        edge_run=workload.edge.seconds,
        edge_hop=hop_seconds(near, workload.near),
        pack=workload.encode_s,
        up=up,
        rtt=rtt,
        down=down,
        unpack=workload.decode_s,
        cloud_run=calls * workload.cloud.seconds,
        cloud_hop=hop_seconds(far, workload.far, calls),
        sources=Sources(workload.edge.source, workload.cloud.source),
    )


def hop_seconds(cost: HopCost | None, call: CallBytes | None, calls: float = 1.0) -> float:
    """Seconds of calls beyond the runs: a fixed part per call, and a part per byte sent and received in all."""
    if cost is None or call is None:
        return 0.0
    # Slopes are fits of measurements; noise can make them slightly negative.
    return max(0.0, calls * cost.fixed_s + cost.up_byte_s * call.sent + cost.down_byte_s * call.received)


@dataclass(frozen=True)
class TierPrices:
    """A tier: money per second of one CPU, watts during work on a request, and watts while the request is elsewhere."""

    cpu_second: float | None = None
    active_watts: float | None = None
    idle_watts: float | None = None


@dataclass(frozen=True)
class LinkPrices:
    """The link: money per 10^9 bytes each way, and joules per byte of either direction."""

    gb_up: float | None = None
    gb_down: float | None = None
    joules_per_byte: float | None = None


@dataclass(frozen=True)
class Prices:
    """All prices; None where the file has no entry. `currency` is for display only."""

    edge: TierPrices = field(default_factory=TierPrices)
    cloud: TierPrices = field(default_factory=TierPrices)
    link: LinkPrices = field(default_factory=LinkPrices)
    currency: str = ""

    @property
    def missing_for_cost(self) -> tuple[str, ...]:
        """Keys without an entry that a cost needs."""
        return _unset({"edge.cpu_second": self.edge.cpu_second, "cloud.cpu_second": self.cloud.cpu_second}) + _unset(
            {"link.gb_up": self.link.gb_up, "link.gb_down": self.link.gb_down}
        )

    @property
    def missing_for_energy(self) -> tuple[str, ...]:
        """Keys without an entry that an energy needs."""
        tiers = (("edge", self.edge), ("cloud", self.cloud))
        watts = {f"{name}.{k}": getattr(tier, k) for name, tier in tiers for k in ("active_watts", "idle_watts")}
        return _unset({**watts, "link.joules_per_byte": self.link.joules_per_byte})


def read_prices(path: Path) -> Prices:
    """The prices of a TOML file with the tables edge, cloud and link. Source: docs/reference/plan.md.

    Raises:
        ConstraintMalformed: the file cannot be read, or has an unknown key or a price that is no number of 0 or more.
    """
    try:
        data = path.read_bytes()
        if len(data) > MAX_PRICES_BYTES:
            raise ValueError(f"{len(data)} bytes; at most {MAX_PRICES_BYTES}")
        doc = tomllib.loads(data.decode())
    except (OSError, ValueError) as e:
        raise ConstraintMalformed(f"the prices {path} cannot be read: {e}", what="prices") from e
    _check_keys(doc, ("edge", "cloud", "link", "currency"), path.name)
    currency = doc.get("currency", "")
    if not isinstance(currency, str) or len(currency) > MAX_CURRENCY:
        raise ConstraintMalformed(f"currency is a text of up to {MAX_CURRENCY} characters", what="currency")
    return Prices(
        TierPrices(**_table(doc, "edge", TierPrices)),
        TierPrices(**_table(doc, "cloud", TierPrices)),
        LinkPrices(**_table(doc, "link", LinkPrices)),
        currency,
    )


def _table(doc: Mapping[str, Any], name: str, kind: type[TierPrices | LinkPrices]) -> dict[str, float]:
    table = doc.get(name, {})
    if not isinstance(table, dict):
        raise ConstraintMalformed(f"the prices' {name} is a table", what=name)
    _check_keys(table, [f.name for f in fields(kind)], name)
    for key, value in table.items():
        # An exact type check: bool is an int to isinstance.
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ConstraintMalformed(f"the price {name}.{key} is {value!r}; it is 0 or more", what=f"{name}.{key}")
    return {key: float(value) for key, value in table.items()}


def _check_keys(doc: Mapping[str, Any], keys: Iterable[str], table: str) -> None:
    allowed = list(keys)
    if unknown := sorted(set(doc) - set(allowed)):
        message = f"{table} has unknown keys: {', '.join(unknown)}; known are {', '.join(allowed)}"
        raise ConstraintMalformed(message, what=unknown[0])


def _unset(values: Mapping[str, float | None]) -> tuple[str, ...]:
    return tuple(name for name, value in values.items() if value is None)


def with_prices(candidate: Candidate, prices: Prices | None, cpus: Mapping[str, int]) -> Candidate:
    """`candidate` with price and energy, as far as the prices are complete; `cpus` are those of each tier."""
    if prices is None:
        return candidate
    return replace(candidate, price=_price(candidate, prices, cpus), energy_j=_energy(candidate, prices))


def _price(candidate: Candidate, prices: Prices, cpus: Mapping[str, int]) -> float | None:
    """Money for a request: each tier's busy seconds times CPUs, and the bytes; None if a price is missing."""
    if prices.missing_for_cost:
        return None
    # A request occupies all CPUs of its tier: functions run it with that many threads.
    t, p = candidate.predicted, prices
    tiers = (t.edge_busy, p.edge.cpu_second, cpus["edge"]), (t.cloud_busy, p.cloud.cpu_second, cpus["cloud"])
    compute = sum(busy * (price or 0.0) * count for busy, price, count in tiers)
    return compute + (candidate.up_bytes * (p.link.gb_up or 0.0) + candidate.down_bytes * (p.link.gb_down or 0.0)) / 1e9


def _energy(candidate: Candidate, prices: Prices) -> float | None:
    """Joules of a request: each tier active while computing and idle for the rest, and the bytes."""
    if prices.missing_for_energy:
        return None
    t, joules = candidate.predicted, 0.0
    for busy, tier in ((t.edge_busy, prices.edge), (t.cloud_busy, prices.cloud)):
        joules += busy * (tier.active_watts or 0.0) + max(0.0, candidate.seconds - busy) * (tier.idle_watts or 0.0)
    return joules + (candidate.up_bytes + candidate.down_bytes) * (prices.link.joules_per_byte or 0.0)
