"""A plan from a draft and its candidates: judged, chosen from, and with the reasons in words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import isthmus
from isthmus.artifacts.conditions import Conditions, Constraints, Objective
from isthmus.artifacts.plan import Candidate, Plan, ProfileUsed
from isthmus_tools.planner.choose import choose
from isthmus_tools.planner.costs import priced
from isthmus_tools.planner.draft import Draft
from isthmus_tools.planner.prices import Prices


def make_plan(
    draft: Draft,
    candidates: Sequence[Candidate],
    conditions: Conditions,
    objective: Objective,
    constraints: Constraints,
    prices: Prices | None = None,
) -> Plan:
    """The plan for the draft's bundle under `conditions`; `candidates` are as predicted, some of them measured.

    Raises:
        Infeasible: no candidate keeps the constraints; names the one that fails and by how much.
    """
    cpus = {tier: profile.device.threads for tier, profile in draft.profiles.items()}
    every, best, why = choose([priced(c, prices, cpus) for c in candidates], objective, constraints)
    return Plan(
        model=draft.bundle.name,
        subject=draft.subject,
        objective=objective,
        conditions=conditions,
        constraints=constraints,
        profiles=tuple(
            ProfileUsed(tier, p.device.id, p.device.cpu, p.measured_at, p.steady)
            for tier, p in sorted(draft.profiles.items())
        ),
        candidates=every,
        chosen=best.name,
        why=(*why, *_caveats(draft, every, best)),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        isthmus=isthmus.__version__,
        currency=prices.currency if prices else "",
        inputs=draft.inputs,
    )


def merged(candidates: Sequence[Candidate], measured: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """`candidates`, those of `measured` in their place."""
    by_name = {c.name: c for c in measured}
    return tuple(by_name.get(c.name, c) for c in candidates)


def _caveats(draft: Draft, candidates: Sequence[Candidate], best: Candidate) -> list[str]:
    said = [*draft.notes]
    whole = _input_bytes(draft)
    if not any(c.kind == "split" for c in candidates) and not draft.untried:
        said.append("no cut is a candidate: one side of the link takes everything")
    elif draft.crossing_least >= whole and best.kind != "split":
        said.append(
            f"every cut lets {draft.crossing_least:.0f} bytes or more cross, and the input has {whole:.0f}: splitting"
            " sends more than not splitting"
        )
    if best.measured is None:
        said.append("predicted only: no candidate was run over the link, so nothing here is measured of it")
    if draft.inputs == "random":
        said.append("sizes and errors are of random inputs; real ones pack otherwise")
    shapes = {name: tuple(a.shape) for name, a in draft.examples[0].arrays.items()}
    for tier, profile in draft.profiles.items():
        if profile.warnings:
            more = f"; and {len(profile.warnings) - 1} more like it" if len(profile.warnings) > 1 else ""
            said.append(f"the profile of tier {tier} is unsteady or incomplete: {profile.warnings[0]}{more}")
        if profile.shapes and profile.shapes != shapes:
            said.append(f"the profile of tier {tier} is of other shapes than these inputs: {_told(profile.shapes)}")
    return said


def _told(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _input_bytes(draft: Draft) -> float:
    """What not splitting would send: the photo where there is one, else the tensors."""
    photos = [len(e.photo) for e in draft.examples if e.photo is not None]
    if photos:
        return statistics.median(photos)
    return float(statistics.median(sum(a.nbytes for a in e.arrays.values()) for e in draft.examples))
