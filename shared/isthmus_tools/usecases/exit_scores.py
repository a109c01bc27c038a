"""Runs of a classifier's exit and tail on inputs, by the route that serves: the scores for a fusion's weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import RAW, Choice
from isthmus.artifacts.plan import Candidate, read_plan
from isthmus.codecs import Tables, encodings
from isthmus.context import Context
from isthmus.errors import LearningError
from isthmus.pipeline import Hop, Result, Route, execute, plan_route, planned_route
from isthmus.pipeline.agreement import are_probabilities
from isthmus.registry import Registry, Resolved
from isthmus.runtime.tables import tables_of
from isthmus_tools.learning.fusion import MemberScores
from isthmus_tools.learning.labelled import LabelledData
from isthmus_tools.progress import Progress

# The first run loads segments and fetches their weights.
_MAX_RUN_S = 600.0


@dataclass(frozen=True)
class ObservedExit:
    """Both members' scores for the inputs that do not exit, the exit's first; and the codec behind it."""

    scores: MemberScores
    exited: int
    codec: str


def exit_cut(bundle: Bundle, text: str) -> str:
    """The cut of the exit that `text` names, or of the only exit.

    Raises:
        LearningError: no such exit, or several and no name.
        Missing: no such cut.
    """
    # Branches without a gate draft tokens of a language model.
    gated = [each.cut for each in bundle.exits if each.gate is not None]
    names = bundle.cut_names(text) if text else tuple(gated)
    if len(names) == 1 and names[0] in gated:
        return names[0]
    if not gated:
        hint = f"learn one first: isthmus exits {bundle.name} --data FOLDER"
        raise LearningError(f"{bundle.name} has no exit whose scores could be fused", exists=[], hint=hint)
    asked = f", none at {'/'.join(names)}" if text else ", and a fusion is of one"
    raise LearningError(f"{bundle.name} has exits at {', '.join(gated)}{asked}", exists=gated, hint=f"--cut {gated[0]}")


def planned_choice(registry: Registry, bundle: Bundle, cut: str) -> Candidate | None:
    """The plan's choice, where it cuts at the exit."""
    plan = read_plan(bundle, registry.blob)
    return plan.choice if plan is not None and plan.choice.cuts[:1] == (cut,) else None


def fitting_route(
    model: Resolved, cut: str, planned: Candidate | None, choice: Choice, hop: Hop, tables: Tables
) -> Route:
    """The route of service: behind the exit at `cut`, boundary tensors as `planned`, else under `choice`.

    Raises:
        Missing: the bundle has no partition at `cut`.
    """
    if planned is not None:
        return planned_route(planned, model.digest, model.bundle, (hop, hop), tables, _no_variant).with_exit()
    route = plan_route(model.digest, model.bundle, (hop,), (cut,))
    table = tables_of(model.bundle, model.digest, choice.codec, tables)
    each = ({}, *(encodings(segment.inputs, choice, table) for segment in route.segments[1:]))
    return replace(route, encodings=each).with_exit()


def observe_exit(route: Route, data: LabelledData, output: str, progress: Progress) -> ObservedExit:
    """Run the inputs; without labels, the model's own predictions without codecs count as right.

    Raises:
        LearningError: every input exits, or an input cannot be used.
    """
    exits, tails, truth = list[Array](), list[Array](), list[int]()
    whole = route.raw().full()
    for index, inputs in enumerate(data.inputs()):
        progress("running exit and tail", index, len(data))
        result = _run(route, inputs)
        # Requests that exit have no second member.
        if result.exit is None or result.is_early:
            continue
        exits.append(_row(result.exit.scores))
        tails.append(_row(result.outputs[output]))
        own = int(_row(_run(whole, inputs).outputs[output]).argmax()) if data.labels is None else data.labels[index]
        truth.append(int(own))
    if not truth:
        raise LearningError(
            f"all {len(data)} inputs take the exit, and a fusion is of those that go on",
            inputs=len(data),
            hint="give further inputs; an exit that takes each of them leaves nothing to fuse",
        )
    scores = np.stack(exits), np.stack(tails)
    shares = are_probabilities(scores[1])
    members = MemberScores(("the exit", "the model"), scores, (shares, shares), np.array(truth, np.int64))
    return ObservedExit(members, len(data) - len(truth), _codec(route))


def _run(route: Route, inputs: dict[str, Array]) -> Result:
    return execute(route, inputs, Context.from_headers({}, longest_s=_MAX_RUN_S))


def _row(scores: Array) -> Array:
    """The scores of a batch of 1. Shapes: (1, classes, …) to (classes,)."""
    return np.asarray(scores.reshape(-1), np.float64)


def _codec(route: Route) -> str:
    """The coarsest encoding behind the exit, as settings write it."""
    choices = [Choice(e.codec, e.quality) for each in route.encodings for e in each.values()]
    return str(min(choices, key=lambda choice: choice.quality, default=RAW))


def _no_variant(digest: str) -> Bundle:
    # Candidates with cuts name no other bundle.
    raise LearningError(f"the plan's candidate runs another bundle, {digest[:19]}…, which has no exit")
