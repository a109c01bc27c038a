"""The plan document: all candidates with predicted and measured times, and the chosen candidate.

A plan is a JSON blob of its bundle. Format: docs/reference/plan.md.
"""

from __future__ import annotations

import itertools
import math
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
from isthmus.artifacts.cuts import CutName, is_cut_name
from isthmus.artifacts.json_documents import DocumentKind, builtins, canonical
from isthmus.errors import PlanMalformed, PlanMismatch

# Some 4 kB for each of MAX_CANDIDATES candidates.
MAX_PLAN_BYTES = 4 * 2**20
MAX_CANDIDATES = 1000
# Far above any real plan: the router and the commands walk all items of a list.
_MAX_ITEMS = 1024
# Tokens, far beyond any context.
Length = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Source = Annotated[str, one_of("measured", "predicted", "scaled", "")]


class Sources(Struct, frozen=True, forbid_unknown_fields=True):
    """The source of a tier's run time: `measured`, a profile of this segment; `predicted`, the sum of node times;
    `scaled`, a run on the planning machine, scaled; empty, no run on the tier.
    """

    edge: _Source = ""
    cloud: _Source = ""


class Terms(Struct, frozen=True, forbid_unknown_fields=True):
    """Sequential seconds of one request, by cause.

    `preprocess` converts a photo to the input at the edge. `edge_run` and `cloud_run` are inference; `edge_hop` and
    `cloud_hop` are the rest of a call: frames, HTTP, the real network. `pack` at the edge and `unpack` in the cloud are
    codecs. `up` and `down` are bytes over the link's rates, `rtt` its round trip.
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
        # The total in a document is for its readers only; the terms decide.
        force_setattr(self, "total", sum(self.seconds.values()))

    @property
    def seconds(self) -> Mapping[str, float]:
        """The terms by name."""
        return {name: getattr(self, name) for name in TERMS}

    @property
    def edge_busy(self) -> float:
        """Seconds of computation at the edge."""
        return self.preprocess + self.edge_run + self.pack

    @property
    def cloud_busy(self) -> float:
        """Seconds of computation in the cloud."""
        return self.unpack + self.cloud_run


# In the order of a request; tables and sums follow it.
TERMS = ("preprocess", "edge_run", "edge_hop", "pack", "up", "rtt", "down", "unpack", "cloud_run", "cloud_hop")


class Measured(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of real requests over the link: median, quartiles, and medians of the parts.

    Parts: `preprocess`, `pack`, `edge` and `cloud` (whole calls), `edge_run` and `cloud_run` (inference within the
    calls).
    """

    median: Amount
    low: Amount
    high: Amount
    runs: Count
    parts: Annotated[Mapping[Text, Amount], Meta(max_length=_MAX_ITEMS)] = {}


class Error(Struct, frozen=True, forbid_unknown_fields=True):
    """The distance from the uncut model's predictions, over `inputs` inputs.

    `relative` is the maximum over inputs and outputs of the RMS difference over the RMS of the output. `disagreement`
    is the share of inputs with another prediction (see `fidelity.Measure`). If `calibrated`, both come from the
    fidelity document, `relative` as its mean, and agreement meets its limit; a photo compressed at the edge is measured
    on photos, and held to the same limit.
    """

    relative: Amount
    inputs: Count
    disagreement: Amount = 0.0
    calibrated: bool = False


class Coding(Struct, frozen=True, forbid_unknown_fields=True):
    """The codec and quality of a boundary tensor."""

    codec: CodecId
    quality: Amount = 1.0

    def __post_init__(self) -> None:
        force_setattr(self, "codec", successor(self.codec))


class PlannedLook(Struct, frozen=True, forbid_unknown_fields=True):
    """A closer look of a plan, with the share of held-out inputs that needed the second transmission."""

    quality: Share
    margin: Margin
    share: Share


class CloserLooks(Struct, frozen=True, forbid_unknown_fields=True):
    """Confidence-gated second transmissions: if the top-1 margin of `output` (nats) is below the margin of a look, the
    router requests the boundary tensors at the quality of that look.

    The share of a look is the share of held-out inputs below the margin; sizes and times include each further
    transmission weighted by its share.
    """

    output: Text
    steps: Annotated[tuple[PlannedLook, ...], Meta(min_length=1, max_length=MAX_LOOKS)] = field(name="looks")

    @classmethod
    def of(cls, output: str, looks: Sequence[Look], shares: Sequence[float]) -> CloserLooks:
        """Build from looks and their shares."""
        each = zip(looks, shares, strict=True)
        return cls(output, tuple(PlannedLook(look.quality, look.margin, share) for look, share in each))

    @property
    def looks(self) -> tuple[Look, ...]:
        """The looks without shares."""
        return tuple(Look(step.quality, step.margin) for step in self.steps)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of inputs of each look."""
        return tuple(step.share for step in self.steps)

    @property
    def extra_calls(self) -> float:
        """Mean number of further calls per request."""
        return sum(self.shares)


class PlannedExit(Struct, frozen=True, forbid_unknown_fields=True):
    """The exit behind a candidate's head: requests that are clear there end at the edge.

    `share` is the share of `inputs` inputs that exited: with `examples` the planner's examples, else the held-out
    inputs of the exit's gate. Sizes and times behind the exit are weighted by the rest. `error` is the mean relative
    error of the exit's scores as the model's output, over the examples.
    """

    share: Share
    inputs: Count
    examples: bool = False
    error: Amount = 0.0


class GenerationLoad(Struct, frozen=True, forbid_unknown_fields=True):
    """The generation of text that a plan is for.

    Units: tokens. An answer has `tokens` tokens after a prompt of `prompt`, run in steps of `chunk`. `context` is the
    longest session; functions keep the state of `sessions` sessions at once.
    """

    prompt: Length
    tokens: Length
    context: Length
    sessions: Length
    chunk: Length


class TokenCosts(Struct, frozen=True, forbid_unknown_fields=True):
    """The predicted costs of a language model's candidate by step.

    `first_token` is the time of the prompt up to the first token, `per_token` that of a further token, the mean over
    the answer. Calls are over the link, and bytes are whole frames there: of the prompt, and of a further token.
    `edge_state_bytes` and `cloud_state_bytes` are the state of a session at the context, which memory sizes include.
    """

    first_token: Terms
    per_token: Terms
    prompt_calls: Count
    token_calls: Count
    prompt_up_bytes: Count
    prompt_down_bytes: Count
    token_up_bytes: Count
    token_down_bytes: Count
    edge_state_bytes: Count
    cloud_state_bytes: Count


class Candidate(Struct, frozen=True, forbid_unknown_fields=True):
    """A placement of the model.

    kind `edge` runs the whole model on the first hop, `cloud` on the last, `split` divides the model at `cuts`.
    `codecs` lists the tensors not sent raw; `input` is whether a photo's file is sent: unchanged, or, where the quality
    of `photo/1` is below 1, as a JPEG of that quality, in percent, of the part that the model takes. `variant` is the
    digest of a substitute bundle. `up_bytes` and `down_bytes` are whole frames on the link. A candidate with a reason
    in `refused` cannot be chosen. Of a language model a request is an answer, `generation` has its costs by step, and
    the measurement's parts are `first_token` and `per_token`. `exit` is the exit at the first cut, `head` the name of
    the variant (see `bundle.SegmentVariant`) that runs at the edge in place of the head or the whole model. Units:
    bytes, seconds, joules, prices in the plan's currency.
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
    generation: TokenCosts | None = None
    exit: PlannedExit | None = None
    head: Text = ""

    @property
    def calls(self) -> float:
        """Mean number of calls to the cloud per request."""
        if self.generation is not None:
            return self.generation.prompt_calls + self.generation.token_calls
        first = 1 - self.exit.share if self.exit is not None else 1.0
        return first + (self.looks.extra_calls if self.looks is not None else 0.0)

    @property
    def seconds(self) -> float:
        """Seconds of a request: measured, else predicted."""
        return self.predicted.total if self.measured is None else self.measured.median

    @property
    def first_token_s(self) -> float:
        """Seconds to the first token: measured, else predicted; infinite for other models."""
        return self._part("first_token")

    @property
    def per_token_s(self) -> float:
        """Seconds of a further token: measured, else predicted; infinite for other models."""
        return self._part("per_token")

    def _part(self, name: str) -> float:
        if self.generation is None:
            return math.inf
        predicted: Terms = getattr(self.generation, name)
        return predicted.total if self.measured is None else self.measured.parts.get(name, predicted.total)

    @property
    def relative_gap(self) -> float | None:
        """Measured over predicted seconds, minus 1: 0.1 is a tenth slower than predicted. None without measurement."""
        total = self.predicted.total
        return None if self.measured is None or total <= 0 else self.measured.median / total - 1


class PlannedMix(Struct, frozen=True, forbid_unknown_fields=True):
    """The division of requests over candidates that serves the most of them, none of the resources used twice at once.

    `rate` is requests a second, `shares` each candidate's share. `used` is the utilisation of `edge`, `uplink`,
    `downlink` and `cloud` at that rate, `prices` the requests a second that a hundredth more of each would serve.
    `alone` is the rate of the plan's choice by itself.
    """

    rate: Amount
    alone: Amount
    shares: Annotated[Mapping[Text, Share], Meta(min_length=1, max_length=_MAX_ITEMS)]
    used: Annotated[Mapping[Text, Share], Meta(max_length=_MAX_ITEMS)]
    prices: Annotated[Mapping[Text, Amount], Meta(max_length=_MAX_ITEMS)]


class ProfileUsed(Struct, frozen=True, forbid_unknown_fields=True):
    """A profile behind the predictions."""

    tier: Text
    device: Text
    cpu: Text
    measured_at: Text
    steady: bool


class Plan(Struct, frozen=True, forbid_unknown_fields=True, dict=True, tag_field="format", tag="isthmus.plan/2"):
    """The plan of a bundle under given conditions. `subject` is the only bundle served by the plan.

    `why` holds sentences: the reasons for the choice, and all candidates omitted or not measured. `inputs` is the kind
    of inputs behind errors and sizes: `photo`, `tensors`, `text` or `random`. `generation` is what a language model is
    planned for.
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
    inputs: Annotated[str, one_of("photo", "tensors", "random", "text")] = "random"
    mix: PlannedMix | None = None
    generation: GenerationLoad | None = None

    @cached_property
    def choice(self) -> Candidate:
        """The chosen candidate."""
        return next(c for c in self.candidates if c.name == self.chosen)

    @property
    def measured(self) -> bool:
        """Whether the chosen candidate was measured, or only predicted."""
        return self.choice.measured is not None

    @property
    def typical_gap(self) -> float | None:
        """Median absolute `relative_gap` of the candidates; None without measurements."""
        gaps = [abs(c.relative_gap) for c in self.candidates if c.relative_gap is not None]
        return statistics.median(gaps) if gaps else None


def to_json(plan: Plan) -> bytes:
    """The plan as JSON; an unlimited rate is null.

    Raises:
        PlanMalformed: longer than MAX_PLAN_BYTES.
    """
    doc = builtins(plan)
    # Absent without a value, as in plans from before these fields: equal plans keep their digests.
    for candidate in doc["candidates"]:
        _drop_absent(candidate, "closer_looks", "generation", "exit", "head")
    _drop_absent(doc["constraints"], "first_token_s", "per_token_s", "private_ssim")
    _drop_absent(doc, "mix", "generation")
    data = canonical(doc)
    PLAN.check_size(len(data))
    return data


def _drop_absent(document: dict[str, object], *names: str) -> None:
    for name in names:
        if document[name] in (None, ""):
            del document[name]


def from_json(data: bytes | memoryview) -> Plan:
    """Parse a plan.

    Raises:
        PlanMalformed: not of this format or version; fact `where` names the field.
    """
    return PLAN.decode(data)


def _check(plan: Plan) -> None:
    names = [candidate.name for candidate in plan.candidates]
    if len(set(names)) != len(names):
        raise ValueError("has two candidates of one name")
    # The router serves the chosen candidate and reads no further.
    if plan.chosen not in names:
        raise ValueError(f"has chosen {plan.chosen[:80]!r}, which is no candidate")
    if plan.choice.refused:
        raise ValueError(f"has chosen {plan.chosen[:80]!r}, which was refused: {plan.choice.refused}")
    if plan.mix is not None and (unknown := set(plan.mix.shares) - {c.name for c in plan.candidates if not c.refused}):
        raise ValueError(f"has a mix with {min(unknown)[:80]!r}, which is no candidate, or a refused one")
    for i, candidate in enumerate(plan.candidates):
        where = f"has candidates[{i}], {candidate.name[:80]!r},"
        if (candidate.kind == "split") != bool(candidate.cuts):
            raise ValueError(f"{where} of kind {candidate.kind} with cuts {list(candidate.cuts)}")
        if (candidate.generation is None) != (plan.generation is None):
            raise ValueError(f"{where} with costs by token in a plan without generation, or without them in one with")
        _check_exit_and_head(where, candidate)
        if candidate.looks is not None:
            _check_looks(f"{where} with closer_looks", candidate, candidate.looks)


def _check_exit_and_head(where: str, candidate: Candidate) -> None:
    if candidate.exit is not None and not candidate.cuts:
        raise ValueError(f"{where} with an exit, and no cut")
    if not candidate.head:
        return
    if not is_cut_name(candidate.head):
        raise ValueError(f"{where} with {candidate.head[:80]!r}, which can name no variant")
    if candidate.kind == "cloud" or candidate.variant is not None:
        raise ValueError(f"{where} with the head {candidate.head!r}, and no such segment at the edge")
    # The gate was measured on the head as it was extracted.
    if candidate.exit is not None:
        raise ValueError(f"{where} with the head {candidate.head!r} and an exit, whose bound is another head's")


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
    # A look is taken only after the preceding look, so that shares fall.
    if any(before < after for before, after in itertools.pairwise((1.0, *looks.shares))):
        raise ValueError(f"{where} of shares {', '.join(map(str, looks.shares))}; no share exceeds the one before")


PLAN = DocumentKind(Plan, "plan", MAX_PLAN_BYTES, PlanMalformed, _check, hint="plan again: isthmus plan NAME …")
FORMAT = PLAN.format


def read_plan(bundle: Bundle, blob: Callable[[Blob], bytes]) -> Plan | None:
    """The plan of a bundle; None without a plan.

    Raises:
        PlanMismatch: the plan is for another bundle.
        PlanMalformed: not a plan, or written by another version.
        RegistryError: the blob is unreadable.
    """
    if bundle.plan is None:
        return None
    hint = f"plan again: isthmus plan {bundle.name} …; or serve without it: the setting plan=false"
    try:
        # The manifest states the size: refuse before the download.
        PLAN.check_size(bundle.plan.size)
        plan = from_json(blob(bundle.plan))
    except PlanMalformed as e:
        raise PlanMalformed(f"in {bundle.name}: {e.message}", **{**e.facts, "hint": hint}) from e
    if plan.subject != (subject := subject_digest(bundle)):
        raise PlanMismatch(
            f"the plan in {bundle.name} was made for {plan.model} {plan.subject[:19]}…, and this is {subject[:19]}…",
            subject=plan.subject,
            expected=subject,
            hint=hint,
        )
    return plan
