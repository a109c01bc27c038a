"""The plan document: every candidate with its predicted and measured times, and the one that serves.

It is JSON in the bundle that it was made for. Format: docs/reference/plan.md.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Annotated

from msgspec import Meta, Struct, field
from msgspec.structs import force_setattr

from isthmus.artifacts.bundle import Blob, Bundle, ModelName, subject_digest
from isthmus.artifacts.choice import GRADED, MAX_LOOKS, MAX_MARGIN, Choice, CodecId, Look, Margin, successor
from isthmus.artifacts.conditions import Conditions, Constraints, Objective
from isthmus.artifacts.constraints import Amount, Count, Digest, Share, Text, one_of
from isthmus.artifacts.cuts import CutName
from isthmus.artifacts.json_documents import DocumentKind, builtins, canonical
from isthmus.errors import PlanMalformed, PlanMismatch

MAX_PLAN_BYTES = 4 * 2**20
MAX_CANDIDATES = 1000
_MAX_ITEMS = 1024
_Source = Annotated[str, one_of("measured", "predicted", "scaled", "")]


class Sources(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a tier's run time comes from: `measured`, a profile timed this very segment; `predicted`, node times were
    summed; `scaled`, a run on the planning machine was scaled; empty, the tier runs nothing.
    """

    edge: _Source = ""
    cloud: _Source = ""


class Terms(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of one request, one thing after the other, by what takes them.

    `preprocess` makes the input of a photo at the edge. `edge_run` and `cloud_run` compute; `edge_hop` and `cloud_hop`
    are what a call takes beside that: frames, HTTP, the network that is there. `pack` at the edge and `unpack` in the
    cloud are the codecs'. `up` and `down` are bytes over the link's rates, `rtt` its round trip.
    """

    preprocess: Amount = 0.0
    edge_run: Amount = 0.0
    edge_hop: Amount = 0.0
    pack: Amount = 0.0
    up: Amount = 0.0
    rtt: Amount = 0.0
    down: Amount = 0.0
    unpack: Amount = 0.0
    cloud_run: Amount = 0.0
    cloud_hop: Amount = 0.0
    sources: Sources = Sources()
    total: Amount = 0.0

    def __post_init__(self) -> None:
        # Documents hold the sum for their readers; it is never taken from them.
        force_setattr(self, "total", sum(self.seconds.values()))

    @property
    def seconds(self) -> Mapping[str, float]:
        """The terms by name."""
        return {name: getattr(self, name) for name in TERMS}

    @property
    def edge_busy(self) -> float:
        """Seconds of computing at the edge."""
        return self.preprocess + self.edge_run + self.pack

    @property
    def cloud_busy(self) -> float:
        """Seconds of computing in the cloud."""
        return self.unpack + self.cloud_run

    @property
    def slowest_stage(self) -> float:
        """Seconds of the slowest of the edge, the link each way, and the cloud: the inverse of the throughput."""
        return max(self.edge_busy + self.edge_hop, self.up, self.down, self.cloud_busy + self.cloud_hop)


TERMS = ("preprocess", "edge_run", "edge_hop", "pack", "up", "rtt", "down", "unpack", "cloud_run", "cloud_hop")


class Measured(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of real requests over the link: median and quartiles, and the medians of their parts.

    Parts: `preprocess`, `pack`, `edge` and `cloud` (whole calls), `edge_run` and `cloud_run` (computing in them).
    """

    median: Amount
    low: Amount
    high: Amount
    runs: Count
    parts: Annotated[Mapping[Text, Amount], Meta(max_length=_MAX_ITEMS)] = {}


class Error(Struct, frozen=True, forbid_unknown_fields=True):
    """The distance of predictions from the uncut model's, over `inputs` inputs.

    `relative` is the largest error of any input: the root mean square of the differences over that of the output, of
    the worst output. `disagreement` is the share of inputs with another prediction (see `fidelity.Measure`). If
    `calibrated`, both come from the fidelity document, `relative` as its mean, and agreement meets its limit.
    """

    relative: Amount
    inputs: Count
    disagreement: Amount = 0.0
    calibrated: bool = False


class Coding(Struct, frozen=True, forbid_unknown_fields=True):
    """The codec of one boundary tensor, and its quality."""

    codec: CodecId
    quality: Amount = 1.0

    def __post_init__(self) -> None:
        force_setattr(self, "codec", successor(self.codec))


class PlannedLook(Struct, frozen=True, forbid_unknown_fields=True):
    """A closer look of a plan, with the share of held-out inputs that took it."""

    quality: Share
    margin: Margin
    share: Share


class CloserLooks(Struct, frozen=True, forbid_unknown_fields=True):
    """Confidence-gated further transmissions: while the top-1 margin of `output` (nats) is below a look's margin, the
    router sends the boundary tensors again at that look's quality.

    A look's share is the share of held-out inputs that took it; sizes and times are of the first transmission plus
    that share of each further one.
    """

    output: Text
    steps: Annotated[tuple[PlannedLook, ...], Meta(min_length=1, max_length=MAX_LOOKS)] = field(name="looks")

    @classmethod
    def of(cls, output: str, looks: Sequence[Look], shares: Sequence[float]) -> CloserLooks:
        """Closer looks with the share of each."""
        each = zip(looks, shares, strict=True)
        return cls(output, tuple(PlannedLook(look.quality, look.margin, share) for look, share in each))

    @property
    def looks(self) -> tuple[Look, ...]:
        """The looks without their shares."""
        return tuple(Look(step.quality, step.margin) for step in self.steps)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of inputs that took each look."""
        return tuple(step.share for step in self.steps)

    @property
    def again(self) -> float:
        """Further calls of one request, on average."""
        return sum(self.shares)


class Candidate(Struct, frozen=True, forbid_unknown_fields=True):
    """One way to serve the model.

    kind `edge` runs it whole on the first hop, `cloud` on the last, `split` at `cuts` on both. `codecs` are those of
    the tensors that do not go raw; `input` says whether a photo goes as it came. `variant` is the digest of the bundle
    that runs instead. `up_bytes` and `down_bytes` are whole frames on the link. Where `refused` says why, it cannot be
    chosen. Units: bytes, seconds, joules, prices in the prices' currency.
    """

    name: Text
    kind: Annotated[str, one_of("edge", "cloud", "split")]
    predicted: Terms
    cuts: Annotated[tuple[CutName, ...], Meta(max_length=_MAX_ITEMS)] = ()
    codecs: Annotated[Mapping[Text, Coding], Meta(max_length=_MAX_ITEMS)] = {}
    input: Annotated[str, one_of("photo", "tensors")] = "tensors"
    variant: Digest | None = None
    up_bytes: Count = 0
    down_bytes: Count = 0
    measured: Measured | None = None
    error: Error = Error(0.0, 0)
    edge_memory_bytes: Count = 0
    cloud_memory_bytes: Count = 0
    price: Amount | None = None
    energy_j: Amount | None = None
    refused: Text = ""
    looks: CloserLooks | None = field(default=None, name="closer_looks")

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
        """The measurement's relative distance from the prediction: 0.1 is a tenth longer. None if unmeasured."""
        total = self.predicted.total
        return None if self.measured is None or total <= 0 else self.measured.median / total - 1


class ProfileUsed(Struct, frozen=True, forbid_unknown_fields=True):
    """The profile that the predictions are based on."""

    tier: Text
    device: Text
    cpu: Text
    measured_at: Text
    steady: bool


class Plan(Struct, frozen=True, forbid_unknown_fields=True, dict=True, tag_field="format", tag="isthmus.plan/2"):
    """The plan of one bundle under given conditions. `subject` is the only bundle that the plan may serve.

    `why` are sentences: the reasons for the choice, and everything left out or not measured. `inputs` is the kind of
    inputs of errors and sizes: `photo`, `tensors` or `random`.
    """

    model: ModelName
    subject: Digest
    objective: Objective
    conditions: Conditions
    constraints: Constraints
    profiles: Annotated[tuple[ProfileUsed, ...], Meta(max_length=_MAX_ITEMS)]
    candidates: Annotated[tuple[Candidate, ...], Meta(max_length=MAX_CANDIDATES)]
    chosen: Text
    why: Annotated[tuple[Text, ...], Meta(max_length=_MAX_ITEMS)]
    made_at: Text
    isthmus: Text
    currency: Text = ""
    inputs: Annotated[str, one_of("photo", "tensors", "random")] = "random"

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
        """The median relative distance of measurements from predictions; None without measurements."""
        gaps = [abs(c.apart) for c in self.candidates if c.apart is not None]
        return statistics.median(gaps) if gaps else None


def to_json(plan: Plan) -> bytes:
    """The document of `plan`; an unlimited rate is null.

    Raises:
        PlanMalformed: it is longer than a plan may be.
    """
    doc = builtins(plan)
    for candidate in doc["candidates"]:
        if candidate["closer_looks"] is None:
            del candidate["closer_looks"]
    data = canonical(doc)
    PLAN.check_size(len(data))
    return data


def from_json(data: bytes | memoryview) -> Plan:
    """Read a plan.

    Raises:
        PlanMalformed: not a plan of this format, or of another version's; `where` in its facts names the field.
    """
    return PLAN.decode(data)


def _check(plan: Plan) -> None:
    names = [candidate.name for candidate in plan.candidates]
    if len(set(names)) != len(names):
        raise ValueError("has two candidates of one name")
    if plan.chosen not in names:
        raise ValueError(f"has chosen {plan.chosen[:80]!r}, which is no candidate")
    if plan.choice.refused:
        raise ValueError(f"has chosen {plan.chosen[:80]!r}, which was refused: {plan.choice.refused}")
    for i, candidate in enumerate(plan.candidates):
        where = f"has candidates[{i}], {candidate.name[:80]!r},"
        if (candidate.kind == "split") != bool(candidate.cuts):
            raise ValueError(f"{where} of kind {candidate.kind} with cuts {list(candidate.cuts)}")
        if candidate.looks is not None:
            _check_looks(f"{where} with closer_looks", candidate, candidate.looks)


def _check_looks(where: str, candidate: Candidate, looks: CloserLooks) -> None:
    coarse = [coding for coding in candidate.codecs.values() if coding.codec in GRADED]
    if not candidate.cuts:
        raise ValueError(f"{where} and no cut")
    if not coarse:
        raise ValueError(f"{where} and no tensor that they could send finer")
    for coding in coarse:
        if not (choice := Choice(coding.codec, coding.quality, looks.looks)).is_valid():
            raise ValueError(
                f"{where} that are none, {choice}: qualities rise to 1 at most, and margins are above 0 and at most"
                f" {MAX_MARGIN:g}"
            )
    if any(before < after for before, after in itertools.pairwise((1.0, *looks.shares))):
        raise ValueError(f"{where} of shares {', '.join(map(str, looks.shares))}; no share exceeds the one before")


PLAN = DocumentKind(Plan, "plan", MAX_PLAN_BYTES, PlanMalformed, _check, hint="plan again: isthmus plan NAME …")
FORMAT = PLAN.format


def read_plan(bundle: Bundle, blob: Callable[[Blob], bytes]) -> Plan | None:
    """The plan in a bundle; None where there is none.

    Raises:
        PlanMismatch: it was made for another bundle, so it says nothing of this one.
        PlanMalformed: it is no plan, or another version of Isthmus wrote it.
        RegistryError: the blob cannot be had.
    """
    if bundle.plan is None:
        return None
    again = f"plan again: isthmus plan {bundle.name} …; or serve without it: the setting plan=false"
    try:
        PLAN.check_size(bundle.plan.size)
        plan = from_json(blob(bundle.plan))
    except PlanMalformed as e:
        raise PlanMalformed(f"in {bundle.name}: {e.message}", **{**e.facts, "hint": again}) from e
    if plan.subject != (subject := subject_digest(bundle)):
        raise PlanMismatch(
            f"the plan in {bundle.name} was made for {plan.model} {plan.subject[:19]}…, and this is {subject[:19]}…",
            subject=plan.subject,
            expected=subject,
            hint=again,
        )
    return plan
