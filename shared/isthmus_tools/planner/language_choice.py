"""The plan of a language model: the candidates worth a measurement, the choice, and its reasons in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from isthmus.artifacts.choice import Choice
from isthmus.artifacts.conditions import Conditions, Constraints, Objective
from isthmus.artifacts.plan import Candidate, Plan
from isthmus.codecs import is_exact
from isthmus.units import format_duration, format_size
from isthmus_tools.planner.choice import VALUES, plan_of_choice, profile_caveats, violations, without_deadlines
from isthmus_tools.planner.costs import Prices
from isthmus_tools.planner.language_candidates import LanguageCandidates

# A generation takes seconds, and so does the run that tells a codec's error.
MAX_CODECS = 4
_TERM_NAMES = {
    "edge_run": "edge",
    "edge_hop": "calls at the edge",
    "pack": "codec",
    "up": "uplink",
    "rtt": "round trip",
    "down": "downlink",
    "unpack": "codec",
    "cloud_run": "cloud",
    "cloud_hop": "calls to the cloud",
}


def generation_contenders(
    candidates: Sequence[Candidate], objective: Objective, constraints: Constraints
) -> list[Candidate]:
    """The candidates to run: the model whole on each side, and the most promising splits.

    At the best cut these are the raw one and up to MAX_CODECS codecs predicted better, whose error a run tells; further
    the best cut beside it, sent raw.
    """
    value = VALUES[objective]
    limits = without_deadlines(constraints)
    splits = sorted((c for c in candidates if c.cuts and not c.refused and not violations(c, limits)), key=value)
    names = {c.name for c in candidates if not c.cuts}
    if splits:
        at_best = [c for c in splits if c.cuts == splits[0].cuts]
        raw = next((i for i, c in enumerate(at_best) if not c.codecs), len(at_best))
        beside = next((c for c in splits if c.cuts != splits[0].cuts and not c.codecs), None)
        # A codec that is predicted no better than raw saves nothing for its error.
        promising = at_best[: min(raw, MAX_CODECS)]
        names |= {c.name for c in (*promising, *at_best[raw : raw + 1], beside) if c is not None}
    return [c for c in candidates if c.name in names]


def without_unknown_errors(candidates: Sequence[Candidate], constraints: Constraints) -> list[Candidate]:
    """The candidates, those refused whose codec changes an unknown share of tokens; none where any share is allowed."""
    if constraints.max_disagreement is not None and constraints.max_disagreement >= 1:
        return list(candidates)
    why = "nothing has told how many tokens its codec changes: measure it, or calibrate the model"
    return [replace(c, refused=why) if _has_unknown_error(c) and not c.refused else c for c in candidates]


def _has_unknown_error(candidate: Candidate) -> bool:
    choices = (Choice(coding.codec, coding.quality) for coding in candidate.codecs.values())
    return not candidate.error.inputs and not all(map(is_exact, choices))


def language_plan(
    candidate_set: LanguageCandidates,
    candidates: Sequence[Candidate],
    conditions: Conditions,
    objective: Objective,
    constraints: Constraints,
    prices: Prices | None = None,
) -> Plan:
    """The plan under `conditions`; `candidates` are the set's predictions, some with measurements.

    Raises:
        Infeasible: as `choose`.
    """
    judged = without_unknown_errors(candidates, constraints)
    plan = plan_of_choice(candidate_set, judged, conditions, objective, constraints, prices)
    whether = _whether_to_split(plan.candidates, plan.choice, objective)
    why = (*plan.why, *whether, *_caveats(candidate_set, plan.choice))
    return replace(plan, why=why, generation=candidate_set.load)


def binding_term(candidate: Candidate) -> tuple[str, float]:
    """The largest part of a further token's predicted time, in words, and its share."""
    if candidate.generation is None:
        return "", 0.0
    costs = candidate.generation.per_token
    merged: dict[str, float] = {}
    for term, seconds in costs.seconds.items():
        if term in _TERM_NAMES:
            merged[_TERM_NAMES[term]] = merged.get(_TERM_NAMES[term], 0.0) + seconds
    name = max(merged, key=lambda n: merged[n])
    return name, merged[name] / costs.total if costs.total else 0.0


def _whether_to_split(candidates: Sequence[Candidate], best: Candidate, objective: Objective) -> Iterator[str]:
    """The choice against the best of the other kind: the costs of a cut, or the reasons for one."""
    value = VALUES[objective]
    rivals = [c for c in candidates if bool(c.cuts) != bool(best.cuts) and not c.refused]
    # As in the choice: a prediction is not compared with measurements.
    rivals = [c for c in rivals if c.measured is not None] or rivals
    if best.cuts:
        whole = min((c for c in candidates if not c.cuts), key=value)
        why = whole.refused or f"{format_duration(whole.per_token_s)} a token"
        yield f"without a split, {whole.name}: {why}"
        return
    yield "do not split: no cut beats the model whole on one side here"
    if rivals:
        split = min(rivals, key=value)
        # Memory and the cloud's time are the reasons for a cut, so the sentence has both.
        first, each = (split.first_token_s - best.first_token_s, split.per_token_s - best.per_token_s)
        yield (
            f"the best split, {split.name}, takes {format_duration(abs(first))} {_more(first)} to the first token and"
            f" {format_duration(abs(each))} {_more(each)} a token; it has {format_size(split.edge_memory_bytes)} at the"
            f" edge and {format_duration(_cloud_s(split))} of the cloud's time a token, {best.name}"
            f" {format_size(best.edge_memory_bytes)} and {format_duration(_cloud_s(best))}"
        )
    yield (
        "reasons to split all the same: token ids that stay at the edge (--private-depth 1), memory at the edge"
        " (--edge-memory), the cloud's cost (--objective cost)"
    )


def _more(seconds: float) -> str:
    return "more" if seconds >= 0 else "less"


def _cloud_s(candidate: Candidate) -> float:
    return 0.0 if candidate.generation is None else candidate.generation.per_token.cloud_busy


def _caveats(candidate_set: LanguageCandidates, best: Candidate) -> Iterator[str]:
    yield from candidate_set.notes
    if candidate_set.private_layers:
        count = candidate_set.private_layers
        layers = "layer" if count == 1 else f"{count} layers"
        yield f"the first {layers} and the token ids stay at the edge, so cloud-whole is no candidate"
    if best.measured is None:
        yield "predicted only: no generation ran over the link, so nothing here is measured of it"
    for tier, profile in candidate_set.profiles.items():
        yield from profile_caveats(tier, profile)
