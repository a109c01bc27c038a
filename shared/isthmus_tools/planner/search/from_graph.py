"""From a model to a problem, and from a division of it back to cuts of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from isthmus.errors import CutError, ProblemMalformed
from isthmus_tools.graph.cuts import CutInfo, ancestors, crossing_values, cut_after, cut_at, prefix
from isthmus_tools.graph.model import Model
from isthmus_tools.planner.search.division import Labels
from isthmus_tools.planner.search.problem import Link, Problem, Tensor

_TOGETHER = "(outputs stay together)"


@dataclass(frozen=True)
class Boundary:
    """Where a division parts the model: the tensors that cross, passing inputs included, and the nodes before it.

    `upstream` are positions in `model.nodes`. Nothing crosses where no node lies beyond.
    """

    tensors: tuple[str, ...]
    upstream: frozenset[int]


def positions(model: Model) -> tuple[int, ...]:
    """The places in `model.nodes` of a problem's nodes: the dynamic ones, in order."""
    return tuple(i for i, dynamic in enumerate(model.dynamic) if dynamic)


def from_model(
    model: Model,
    seconds: Sequence[Sequence[float]],
    links: Sequence[Link],
    *,
    caller: int = 0,
    pins: Mapping[int, tuple[int, int]] | None = None,
    early_outputs: bool = False,
) -> Problem:
    """The problem of dividing `model`: its dynamic nodes, and their values with their bytes under the model's binding.

    `seconds[tier][i]` and `pins[i]` are for node i of `model.nodes`; those of static nodes are ignored, since every
    segment computes what is static for itself. What no frame can carry may not cross.

    A cut is known by its tensors, and whatever does not lead to one of them runs after it. So nodes that nothing reads
    are kept on one tier, the last in use: then every division is one that `cut_of` can make. With `early_outputs` they
    are free, and a division may leave a finished output behind; `cut_of` then makes it where it is a prefix.

    Raises:
        ProblemMalformed: not one time a node, or as `Problem`.
    """
    if any(len(row) != len(model.nodes) for row in seconds):
        raise ProblemMalformed(
            f"every tier needs one time for each of {len(model.nodes)} nodes", nodes=len(model.nodes)
        )
    places = positions(model)
    readers: dict[str, list[int]] = {}
    for v, i in enumerate(places):
        for value in dict.fromkeys(model.uses[i]):
            readers.setdefault(str(value.name), []).append(v)
    outputs = {str(value.name) for value in model.outputs}
    inputs = [value for value in model.inputs if not model.is_static(value)]
    made = [(v, value) for v, i in enumerate(places) for value in model.nodes[i].outputs if value.name]
    tensors = [
        Tensor(
            name=str(value.name),
            producer=producer,
            consumers=tuple(readers.get(str(value.name), ())),
            bytes=model.nbytes(value) if value.name in model.specs else math.inf,
            output=value.name in outputs,
        )
        for producer, value in [*((None, value) for value in inputs), *made]
    ]
    if not early_outputs:
        read = {t.producer for t in tensors if t.consumers}
        last = [v for v in range(len(places)) if v not in read]
        tensors += [Tensor(_TOGETHER, a, (b,), math.inf) for a, b in pairwise(last)]
    node_of = {i: v for v, i in enumerate(places)}
    return Problem(
        seconds=tuple(tuple(float(row[i]) for i in places) for row in seconds),
        tensors=tuple(tensors),
        links=tuple(links),
        caller=caller,
        pins={node_of[i]: pin for i, pin in (pins or {}).items() if i in node_of},
        names=tuple(str(model.nodes[i].name) for i in places),
    )


def boundaries(model: Model, labels: Labels, tiers: int) -> tuple[Boundary, ...]:
    """Where `labels`, a tier for each dynamic node, part the model: one boundary for each two neighbouring tiers."""
    placed = list(zip(positions(model), labels, strict=True))
    found = []
    for b in range(tiers - 1):
        upstream = frozenset(i for i, tier in placed if tier <= b)
        found.append(Boundary(tuple(str(v.name) for v in crossing_values(model, upstream)), upstream))
    return tuple(found)


def cut_of(model: Model, boundary: Boundary) -> CutInfo | None:
    """The cut that lies there, for `graph.extract`; None where all nodes are on one side of it.

    Two boundaries with no node between them give the same cut.

    Raises:
        CutError: nodes before it lead to no tensor that crosses, and it is no prefix; names them.
    """
    upstream = boundary.upstream
    if not upstream or len(upstream) == sum(model.dynamic):
        return None
    end = max(upstream)
    if upstream == prefix(model, end) and boundary.tensors:
        return cut_after(model, end)
    values = [model.values[name] for name in boundary.tensors]
    if behind := sorted(upstream - ancestors(model, values)):
        names = [str(model.nodes[i].name) for i in behind]
        raise CutError(
            f"{len(names)} nodes before the cut, such as {names[-1]}, lead to none of its tensors",
            nodes=names,
            hint="plan without early_outputs",
        )
    return cut_at(model, boundary.tensors)
