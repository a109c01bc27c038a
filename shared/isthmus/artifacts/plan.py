"""The plan: every candidate with what it was predicted and measured to take, and which of them serves.

It is a JSON document in the bundle that it was made for. Schema: docs/plan.schema.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from isthmus.artifacts.choice import Look
from isthmus.artifacts.conditions import Conditions, Constraints, Objective

FORMAT = "isthmus.plan/2"
MAX_PLAN_BYTES = 4 * 2**20
MAX_CANDIDATES = 1000
KINDS = ("edge", "cloud", "split")
INPUTS = ("photo", "tensors")
TRIED_WITH = ("photo", "tensors", "random")
SOURCES = ("measured", "predicted", "scaled", "")
"""Of a tier's run: a profile timed this very segment; node times were summed; a run here was scaled; nothing runs."""


@dataclass(frozen=True)
class Terms:
    """Seconds of one request, one thing after the other, by what takes them.

    `preprocess` makes the input of a photo at the edge. `edge_run` and `cloud_run` compute; `edge_hop` and `cloud_hop`
    are what a call takes beside that: frames, HTTP, the network that is there. `pack` at the edge and `unpack` in the
    cloud are the codecs'. `up` and `down` are bytes over the link's rates, `rtt` its round trip.
    """

    preprocess: float = 0.0
    edge_run: float = 0.0
    edge_hop: float = 0.0
    pack: float = 0.0
    up: float = 0.0
    rtt: float = 0.0
    down: float = 0.0
    unpack: float = 0.0
    cloud_run: float = 0.0
    cloud_hop: float = 0.0
    edge_source: str = ""
    cloud_source: str = ""

    @property
    def seconds(self) -> Mapping[str, float]:
        """The terms by name."""
        return {name: getattr(self, name) for name in TERMS}

    @property
    def total(self) -> float:
        """Seconds of one request."""
        return sum(self.seconds.values())

    @property
    def edge_busy(self) -> float:
        """Seconds in which the edge computes."""
        return self.preprocess + self.edge_run + self.pack

    @property
    def cloud_busy(self) -> float:
        """Seconds in which the cloud computes."""
        return self.unpack + self.cloud_run

    @property
    def slowest_stage(self) -> float:
        """Seconds of the slowest of the edge, the link each way, and the cloud: the inverse of the throughput."""
        return max(self.edge_busy + self.edge_hop, self.up, self.down, self.cloud_busy + self.cloud_hop)


TERMS = ("preprocess", "edge_run", "edge_hop", "pack", "up", "rtt", "down", "unpack", "cloud_run", "cloud_hop")


@dataclass(frozen=True)
class Measured:
    """Seconds of real requests over the link: median and quartiles, and the medians of the parts that were seen.

    Parts: `preprocess`, `pack`, `edge` and `cloud` (whole calls), `edge_run` and `cloud_run` (computing in them).
    """

    median: float
    low: float
    high: float
    runs: int
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Error:
    """How far the answers are from the uncut model's, over `inputs` inputs.

    `relative` is the largest error of any input: the root mean square of the differences over that of the output, of
    the worst output. `disagreement` is the share of inputs whose answer is another (see `calibration.Measure`). Where
    they are `calibrated`, both are the fidelity document's, `relative` being its mean, and agreement meets its limit.
    """

    relative: float
    inputs: int
    disagreement: float = 0.0
    calibrated: bool = False


@dataclass(frozen=True)
class Coding:
    """How one tensor travels to the cloud."""

    codec: str
    quality: float = 1.0


@dataclass(frozen=True)
class CloserLooks:
    """While `output`'s likeliest class leads by less than a look's margin (nats), what crosses is sent as fine as that.

    `shares` has for each look the share of the inputs that calibration held out that took it: sizes and times are of
    the first send and so much of each further one.
    """

    output: str
    looks: tuple[Look, ...]
    shares: tuple[float, ...]

    @property
    def again(self) -> float:
        """Further calls of one request, on average."""
        return sum(self.shares)


@dataclass(frozen=True)
class Candidate:
    """One way to serve the model.

    kind `edge` runs it whole on the first hop, `cloud` on the last, `split` at `cuts` on both. `codecs` are those of
    the tensors that do not go raw; `input` says whether a photo goes as it came. `variant` is the digest of the bundle
    that runs instead. `up_bytes` and `down_bytes` are whole frames on the link. Where `refused` says why, it cannot be
    chosen. Units: bytes, seconds, joules, prices in the prices' currency.
    """

    name: str
    kind: str
    predicted: Terms
    cuts: tuple[str, ...] = ()
    codecs: Mapping[str, Coding] = field(default_factory=dict)
    input: str = "tensors"
    variant: str | None = None
    up_bytes: int = 0
    down_bytes: int = 0
    measured: Measured | None = None
    error: Error = Error(0.0, 0)
    edge_memory_bytes: int = 0
    cloud_memory_bytes: int = 0
    price: float | None = None
    energy_j: float | None = None
    refused: str = ""
    looks: CloserLooks | None = None

    @property
    def calls(self) -> float:
        """Calls to the cloud for one request, on average."""
        return 1 + (self.looks.again if self.looks is not None else 0.0)

    @property
    def seconds(self) -> float:
        """Seconds of one request: as measured, else as predicted."""
        return self.predicted.total if self.measured is None else self.measured.median

    @property
    def apart(self) -> float | None:
        """How far measurement is from prediction: 0.1 where it took a tenth longer. None if it was not measured."""
        total = self.predicted.total
        return None if self.measured is None or total <= 0 else self.measured.median / total - 1


@dataclass(frozen=True)
class ProfileUsed:
    """Whose times the predictions stand on."""

    tier: str
    device: str
    cpu: str
    measured_at: str
    steady: bool


@dataclass(frozen=True)
class Plan:
    """What was found for one bundle under some conditions. `subject` is the only bundle that it may serve.

    `why` are sentences: why this candidate, what was left out, what was not measured. `inputs` says what errors and
    sizes were measured on: `photo`, `tensors` or `random`.
    """

    model: str
    subject: str
    objective: Objective
    conditions: Conditions
    constraints: Constraints
    profiles: tuple[ProfileUsed, ...]
    candidates: tuple[Candidate, ...]
    chosen: str
    why: tuple[str, ...]
    made_at: str
    isthmus: str
    currency: str = ""
    inputs: str = "random"

    @cached_property
    def choice(self) -> Candidate:
        """The chosen candidate."""
        return next(c for c in self.candidates if c.name == self.chosen)

    @property
    def measured(self) -> bool:
        """Whether the chosen candidate was measured; if not, the plan is predicted only."""
        return self.choice.measured is not None

    @property
    def typical_gap(self) -> float | None:
        """The median of how far measurements are from predictions, as a share; None without measurements."""
        gaps = [abs(c.apart) for c in self.candidates if c.apart is not None]
        return statistics.median(gaps) if gaps else None
