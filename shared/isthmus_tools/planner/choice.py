"""The choice of a candidate: constraints, objectives, reasons in words, and the best candidate over a grid of links."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from msgspec.structs import replace

import isthmus
from isthmus.artifacts.conditions import MAX_ERROR, Conditions, Constraints, Objective
from isthmus.artifacts.plan import Candidate, Measured, Plan, PlannedExit, ProfileUsed, Terms
from isthmus.artifacts.profile import Profile
from isthmus.errors import ConstraintMalformed, Infeasible
from isthmus.units import format_duration, format_size
from isthmus_tools.planner.candidates import CandidateSet, PlannedBundle
from isthmus_tools.planner.costs import HEADERS_DOWN, HEADERS_UP, Prices, with_prices
from isthmus_tools.planner.throughput import mix_reason, planned_mix, slowest_stage

# Logarithmic steps from a weak mobile uplink to a local network, and from a switch to another continent.
RATES = (0.5e6, 1e6, 2e6, 5e6, 10e6, 20e6, 50e6, 100e6, 200e6, 500e6, 1e9)
MAP_RATES = (0.1e6, 0.2e6, 0.5e6, 1e6, 2e6, 5e6, 10e6, 30e6, 100e6)
"""Rates of the map of regions, in bit/s: from narrow-band radio to a local network."""
ROUND_TRIPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
# Reasons name all candidates within this share of the best, since the order among these is within noise.
_TIE = 0.02
# As calibration's limit of agreement: a codec that changes more tokens needs a bound of its own.
MAX_TOKEN_DISAGREEMENT = 0.01
# A link faster than the measured link must not turn a measurement to zero or less.
_MIN_SECONDS = 1e-6


@dataclass(frozen=True)
class Violation:
    """A constraint that a candidate violates: name, limit, the candidate's value, and a sentence."""

    constraint: str
    limit: float
    value: float
    message: str

    @property
    def excess(self) -> float:
        """The excess as a share of the limit."""
        return (self.value - self.limit) / self.limit if self.limit else float("inf")


def check_prices(objective: Objective, constraints: Constraints, prices: Prices | None) -> None:
    """Check that the objective has its prices.

    Raises:
        ConstraintMalformed: names the missing prices.
    """
    available = prices or Prices()
    missing = {"cost": available.missing_for_cost, "energy": available.missing_for_energy}.get(objective, ())
    if missing:
        hint = "give them in a TOML file with --prices; docs/reference/plan.md has one"
        if objective == "cost" and constraints.latency_s is not None:
            hint += ". Without prices, ask for another --objective beside --latency"
        raise ConstraintMalformed(
            f"the objective {objective} needs prices: {', '.join(missing)}", what="prices", missing=missing, hint=hint
        )


def violations(candidate: Candidate, constraints: Constraints) -> list[Violation]:
    """The constraints that `candidate` violates, except the private depth, which the search enforces."""
    error, broken = candidate.error, []
    if (limit := constraints.edge_memory_bytes) is not None and candidate.edge_memory_bytes > limit:
        size = candidate.edge_memory_bytes
        message = f"it needs {format_size(size)} at the edge, of {format_size(limit)}"
        broken.append(Violation("edge-memory", limit, size, message))
    for name, limit_s, seconds, doing in (
        ("latency", constraints.latency_s, candidate.seconds, "it takes"),
        ("first-token", constraints.first_token_s, candidate.first_token_s, "its first token takes"),
        ("per-token", constraints.per_token_s, candidate.per_token_s, "a token takes"),
    ):
        if limit_s is not None and seconds > limit_s:
            message = f"{doing} {format_duration(seconds)}, of {format_duration(limit_s)}"
            broken.append(Violation(name, limit_s, seconds, message))
    # Calibration has approved its codecs by agreement, so MAX_ERROR is for errors of a few trial inputs only.
    default = math.inf if error.calibrated else MAX_ERROR
    max_error = constraints.max_error if constraints.max_error is not None else default
    relative = error.relative
    if candidate.exit is not None and constraints.max_error is not None:
        # An exit's scores are from another function: by default its bound on predictions counts.
        relative = max(relative, candidate.exit.error)
    if relative > max_error:
        message = f"its error is {relative:.2g}, of {max_error:g}"
        broken.append(Violation("max-error", max_error, relative, message))
    share = constraints.max_disagreement
    if share is None and candidate.generation is not None and not error.calibrated:
        # Of a language model tokens are compared, and no outputs.
        share = MAX_TOKEN_DISAGREEMENT
    if share is not None and error.disagreement > share:
        message = f"{error.disagreement:.1%} of its {_compared(candidate)} differ, of {share:.1%}"
        broken.append(Violation("max-disagreement", share, error.disagreement, message))
    return broken


def without_deadlines(constraints: Constraints) -> Constraints:
    """`constraints` but for their bounds on seconds, which are for measurements: a prediction may be wrong."""
    return replace(constraints, latency_s=None, first_token_s=None, per_token_s=None)


def choose(
    candidates: Sequence[Candidate], objective: Objective, constraints: Constraints
) -> tuple[tuple[Candidate, ...], Candidate, tuple[str, ...]]:
    """The candidates with refusals for every violation, the best admissible candidate, and the reasons.

    If any admissible candidate was measured, only measured candidates compete: a prediction never beats these.

    Raises:
        Infeasible: every candidate violates a constraint; names the constraint and the excess of the nearest candidate.
    """
    refused = tuple(
        c if c.refused else replace(c, refused="; ".join(v.message for v in violations(c, constraints)))
        for c in candidates
    )
    admissible = [c for c in refused if not c.refused]
    if not admissible:
        raise _infeasible(candidates, constraints)
    competing = [c for c in admissible if c.measured is not None] or admissible
    value = VALUES[objective]
    # Ties, such as equal prices, go to the lower latency and then to fewer bytes.
    best = min(competing, key=lambda c: (value(c), c.seconds, c.up_bytes))
    return refused, best, tuple(_reasons(best, competing, objective, value))


def _compared(candidate: Candidate) -> str:
    return "answers" if candidate.generation is None else f"{candidate.error.inputs} tokens"


VALUES: Mapping[Objective, Callable[[Candidate], float]] = {
    "latency": lambda c: c.seconds,
    "throughput": slowest_stage,
    "cost": lambda c: float("inf") if c.price is None else c.price,
    "energy": lambda c: float("inf") if c.energy_j is None else c.energy_j,
    "first-token": lambda c: c.first_token_s,
    "per-token": lambda c: c.per_token_s,
}
"""The value that each objective minimises."""


def _reasons(
    best: Candidate, competing: Sequence[Candidate], objective: Objective, value: Callable[[Candidate], float]
) -> list[str]:
    how = "measured" if best.measured is not None else "predicted only"
    reasons = [f"{best.name} is the best of {len(competing)} for {objective}, {how}: {_seconds_text(best)}"]
    rest = sorted((c for c in competing if c is not best), key=value)
    if rest and value(best) > 0:
        reasons.append(f"the next is {rest[0].name}, {behind_text(value(rest[0]) / value(best) - 1)}")
        if ties := [c.name for c in rest if value(c) <= value(best) * (1 + _TIE)]:
            reasons.append(f"within {_TIE:.0%} of it: {', '.join(ties)}")
    return reasons


def _seconds_text(best: Candidate) -> str:
    if best.generation is None:
        return f"{format_duration(best.seconds)} a request"
    first, each = format_duration(best.first_token_s), format_duration(best.per_token_s)
    return f"{first} to the first token, {each} a token, {format_duration(best.seconds)} an answer"


def behind_text(share: float) -> str:
    """How much worse a candidate's value is: in percent, from twice the value on as a multiple."""
    return f"{share:.1%} worse" if share < 1 else f"{1 + share:.1f} times as much"


def _infeasible(candidates: Sequence[Candidate], constraints: Constraints) -> Infeasible:
    """The error for the constraint that every candidate violates, else for the nearest candidate's worst."""
    pairs = [(c, broken) for c in candidates if not c.refused and (broken := violations(c, constraints))]
    if not pairs:
        # Nothing violates a constraint, yet all are refused: those that ran have failed.
        reasons = "; ".join(sorted({c.refused for c in candidates}))
        return Infeasible(f"no candidate is left: {reasons}", constraint="private-depth", nearest=None)
    names = sorted({v.constraint for _, broken in pairs for v in broken})
    common = [name for name in names if all(any(v.constraint == name for v in broken) for _, broken in pairs)]
    if common:
        alike = [(c, next(v for v in broken if v.constraint == common[0])) for c, broken in pairs]
        nearest, worst = min(alike, key=lambda pair: pair[1].value)
        sentence = f"no candidate meets {worst.constraint}"
    else:
        nearest, broken = min(pairs, key=lambda pair: max(v.excess for v in pair[1]))
        worst = max(broken, key=lambda v: v.excess)
        sentence = f"no candidate meets {' and '.join(names)} at once"
    return Infeasible(
        f"{sentence}; the nearest is {nearest.name}: {worst.message}",
        constraint=worst.constraint,
        limit=worst.limit,
        nearest=nearest.name,
        value=worst.value,
        by=worst.value - worst.limit,
        hint=f"ask for less of {worst.constraint}, or change the link",
    )


def build_plan(
    candidate_set: CandidateSet,
    candidates: Sequence[Candidate],
    conditions: Conditions,
    objective: Objective,
    constraints: Constraints,
    prices: Prices | None = None,
) -> Plan:
    """The plan under `conditions`; `candidates` are the set's predictions, some with measurements.

    With the objective throughput it has a mix.

    Raises:
        Infeasible: as `choose`.
    """
    plan = plan_of_choice(candidate_set, candidates, conditions, objective, constraints, prices)
    plan = replace(plan, why=(*plan.why, *_caveats(candidate_set, plan)))
    if objective != "throughput" or (mix := planned_mix(plan)) is None:
        return plan
    return replace(plan, mix=mix, why=(plan.why[0], mix_reason(mix), *plan.why[1:]))


def plan_of_choice(
    candidate_set: PlannedBundle,
    candidates: Sequence[Candidate],
    conditions: Conditions,
    objective: Objective,
    constraints: Constraints,
    prices: Prices | None = None,
) -> Plan:
    """The plan of any kind of model, with the reasons of the choice alone.

    Raises:
        Infeasible: as `choose`.
    """
    with_costs = [with_prices(c, prices, candidate_set.cpus) for c in candidates]
    refused, best, reasons = choose(with_costs, objective, constraints)
    return Plan(
        model=candidate_set.bundle.name,
        subject=candidate_set.subject,
        objective=objective,
        conditions=conditions,
        constraints=constraints,
        profiles=tuple(
            ProfileUsed(tier, p.device.id, p.device.cpu, p.measured_at, p.steady)
            for tier, p in sorted(candidate_set.profiles.items())
        ),
        candidates=refused,
        chosen=best.name,
        why=reasons,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        isthmus=isthmus.__version__,
        currency=prices.currency if prices else "",
        inputs=candidate_set.input_kind,
    )


def profile_caveats(tier: str, profile: Profile) -> list[str]:
    """What a profile warns of, in at most one sentence."""
    if not profile.warnings:
        return []
    more = f"; and {len(profile.warnings) - 1} more like it" if len(profile.warnings) > 1 else ""
    return [f"the profile of tier {tier} is unsteady or incomplete: {profile.warnings[0]}{more}"]


def with_measurements(candidates: Sequence[Candidate], measured: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """`candidates`, replaced by the candidates of the same name in `measured`."""
    by_name = {c.name: c for c in measured}
    return tuple(by_name.get(c.name, c) for c in candidates)


def _caveats(candidate_set: CandidateSet, plan: Plan) -> list[str]:
    candidates, best = plan.candidates, plan.choice
    # With a bound on reconstructions the set's notes say why cuts are none.
    searched = not candidate_set.skipped_cuts and plan.constraints.private_ssim is None
    caveats = [*candidate_set.notes]
    whole, least = _input_bytes(candidate_set), candidate_set.min_boundary_bytes
    if not any(c.kind == "split" for c in candidates) and searched:
        caveats.append("no cut is a candidate: one side of the link takes everything")
    elif least >= whole and best.kind != "split":
        caveats.append(
            f"every cut lets {least:.0f} bytes or more cross, and the input has {whole:.0f}: splitting"
            " sends more than not splitting"
        )
    if best.exit is not None:
        caveats.append(_exit_sentence(best, best.exit))
    if best.measured is None:
        caveats.append("predicted only: no candidate was run over the link, so nothing here is measured of it")
    if candidate_set.input_kind == "random":
        caveats.append("sizes and errors are of random inputs; real ones pack otherwise")
    shapes = {name: tuple(a.shape) for name, a in candidate_set.inputs[0].arrays.items()}
    for tier, profile in candidate_set.profiles.items():
        caveats += profile_caveats(tier, profile)
        if profile.shapes and profile.shapes != shapes:
            text = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in profile.shapes.items())
            caveats.append(f"the profile of tier {tier} is of other shapes than these inputs: {text}")
    return caveats


def _exit_sentence(best: Candidate, planned: PlannedExit) -> str:
    """The share of requests that end at the edge, with its inputs."""
    inputs = f"{planned.inputs} {'examples' if planned.examples else 'held-out inputs'}"
    return f"{planned.share:.1%} of {inputs} exit at {best.cuts[0]}: bytes and times behind count for the rest alone"


def _input_bytes(candidate_set: CandidateSet) -> float:
    """Bytes sent without a split: the photo's where there are photos, else the tensors'."""
    photos = [len(i.photo) for i in candidate_set.inputs if i.photo is not None]
    if photos:
        return statistics.median(photos)
    return float(statistics.median(sum(a.nbytes for a in i.arrays.values()) for i in candidate_set.inputs))


@dataclass(frozen=True)
class GridCell:
    """One link of a grid and the best candidate there; "" where no candidate is admissible."""

    conditions: Conditions
    best: str
    seconds: float


def over_link(candidate: Candidate, conditions: Conditions) -> Candidate:
    """`candidate` over another link: the link terms follow from its bytes, all other terms stay.

    A measurement moves by the difference of the predictions, and so carries its deviation along.
    """
    t = candidate.predicted
    moved = t
    if candidate.up_bytes or candidate.down_bytes:
        moved = _moved(t, candidate.up_bytes, candidate.down_bytes, candidate.calls, conditions)
    measured = candidate.measured
    if measured is not None:
        shift = moved.total - t.total
        low, median, high = (max(_MIN_SECONDS, s + shift) for s in (measured.low, measured.median, measured.high))
        measured = Measured(median, low, high, measured.runs)
    if (costs := candidate.generation) is not None and costs.prompt_calls:
        first = _moved(
            costs.first_token, costs.prompt_up_bytes, costs.prompt_down_bytes, costs.prompt_calls, conditions
        )
        each = _moved(costs.per_token, costs.token_up_bytes, costs.token_down_bytes, 1, conditions)
        candidate = replace(candidate, generation=replace(costs, first_token=first, per_token=each))
    return replace(candidate, predicted=moved, measured=measured)


def _moved(t: Terms, up_bytes: int, down_bytes: int, calls: float, conditions: Conditions) -> Terms:
    return replace(
        t,
        up=(up_bytes + calls * HEADERS_UP) * conditions.up_byte_s,
        down=(down_bytes + calls * HEADERS_DOWN) * conditions.down_byte_s,
        rtt=calls * conditions.rtt_s,
    )


def sweep_links() -> list[Conditions]:
    """The links whose candidates a sweep needs: every rate of the grid and of the map."""
    # A round trip adds the same to every split, so rates alone decide between cuts.
    return [Conditions(rate, rate) for rate in sorted({*RATES, *MAP_RATES})]


def grid(
    candidates: Sequence[Candidate],
    objective: Objective,
    constraints: Constraints,
    *,
    rates: Sequence[float] = RATES,
    round_trips: Sequence[float] = ROUND_TRIPS,
    down_share: float = 1.0,
) -> list[list[GridCell]]:
    """The best candidate of every link: a row per round trip, a cell per rate.

    `down_share` is the downlink rate as a multiple of the uplink rate. All values are predictions, also of measured
    candidates: a measurement on one link compares with nothing on another.
    """
    value = VALUES[objective]
    # Refused by no constraint, and so on every link: it failed, or too few of its predictions agree.
    never = {c.name for c in candidates if c.refused and not violations(c, constraints)}
    candidates = [replace(c, measured=None) for c in candidates if c.name not in never]

    def cell(conditions: Conditions) -> GridCell:
        moved = [over_link(c, conditions) for c in candidates]
        admissible = [c for c in moved if not violations(c, constraints)]
        best = min(admissible, key=value, default=None)
        return GridCell(conditions, best.name if best else "", best.seconds if best else 0.0)

    return [[cell(Conditions(rate, rate * down_share, rtt_s)) for rate in rates] for rtt_s in round_trips]
