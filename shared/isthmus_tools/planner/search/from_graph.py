"""From a model to a partitioning problem, and from a division back to cuts of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from isthmus.errors import CutError, ProblemMalformed
from isthmus_tools.graph.cuts import CutInfo, ancestors, boundary_values, cut_after, cut_at, prefix
from isthmus_tools.graph.model import Model
from isthmus_tools.planner.search.problem import Labels, LinkTimes, Problem, Tensor

_TOGETHER = "(outputs stay together)"


@dataclass(frozen=True)
class TierBoundary:
    """A boundary between two tiers: the boundary tensors, passing inputs included, and the nodes before.

    `upstream` are positions in `model.nodes`. Without nodes beyond the boundary there are no tensors.
    """

    tensors: tuple[str, ...]
    upstream: frozenset[int]


def positions(model: Model) -> tuple[int, ...]:
    """Positions in `model.nodes` of a problem's nodes: the dynamic nodes, in order."""
    return tuple(i for i, dynamic in enumerate(model.dynamic) if dynamic)


def from_model(
    model: Model,
    seconds: Sequence[Sequence[float]],
    links: Sequence[LinkTimes],
    *,
    caller: int = 0,
    pins: Mapping[int, tuple[int, int]] | None = None,
    early_outputs: bool = False,
) -> Problem:
    """The problem of dividing `model`: the dynamic nodes, and their values with bytes under the model's binding.

    `seconds[tier][i]` and `pins[i]` are for node i of `model.nodes`. Entries of static nodes are ignored, since every
    segment computes static values itself. Values beyond a frame's dtypes must not be sent.

    A cut is defined by tensors, and every node that leads to none of these runs after the cut. Nodes without readers
    are therefore pinned together on the last tier in use, so that `cut_of` can construct every division. With
    `early_outputs` they are free, and a division may leave a finished output behind; `cut_of` then needs a prefix.

    Raises:
        ProblemMalformed: the number of times is not the number of nodes, or as `Problem`.
    """
    if any(len(row) != len(model.nodes) for row in seconds):
        raise ProblemMalformed(
            f"every tier needs one time for each of {len(model.nodes)} nodes", nodes=len(model.nodes)
        )
    dynamic = positions(model)
    readers: dict[str, list[int]] = {}
    for v, i in enumerate(dynamic):
        for value in dict.fromkeys(model.uses[i]):
            readers.setdefault(str(value.name), []).append(v)
    outputs = {str(value.name) for value in model.outputs}
    inputs = [value for value in model.inputs if not model.is_static(value)]
    computed = [(v, value) for v, i in enumerate(dynamic) for value in model.nodes[i].outputs if value.name]
    tensors = [
        Tensor(
            name=str(value.name),
            producer=producer,
            consumers=tuple(readers.get(str(value.name), ())),
            # A value without a tensor type, such as a sequence, fits no frame.
            bytes=model.nbytes(value) if value.name in model.specs else math.inf,
            output=value.name in outputs,
        )
        for producer, value in [*((None, value) for value in inputs), *computed]
    ]
    if not early_outputs:
        read = {t.producer for t in tensors if t.consumers}
        last = [v for v in range(len(dynamic)) if v not in read]
        # A tensor of infinite size cannot be sent, so producer and consumer share a tier.
        tensors += [Tensor(_TOGETHER, a, (b,), math.inf) for a, b in pairwise(last)]
    node_of = {i: v for v, i in enumerate(dynamic)}
    return Problem(
        seconds=tuple(tuple(float(row[i]) for i in dynamic) for row in seconds),
        tensors=tuple(tensors),
        links=tuple(links),
        caller=caller,
        pins={node_of[i]: pin for i, pin in (pins or {}).items() if i in node_of},
        names=tuple(str(model.nodes[i].name) for i in dynamic),
    )


def boundaries(model: Model, labels: Labels, tiers: int) -> tuple[TierBoundary, ...]:
    """The boundaries of the division `labels`, a tier for each dynamic node, between each two neighbouring tiers."""
    tier_of = list(zip(positions(model), labels, strict=True))
    upstreams = [frozenset(i for i, tier in tier_of if tier <= b) for b in range(tiers - 1)]
    return tuple(TierBoundary(tuple(str(v.name) for v in boundary_values(model, up)), up) for up in upstreams)


def cut_of(model: Model, boundary: TierBoundary) -> CutInfo | None:
    """The cut at a boundary, for `graph.extract`; None where all nodes are on one side.

    Two boundaries without a node in between give the same cut.

    Raises:
        CutError: nodes before the boundary lead to no boundary tensor, and are no prefix; names these nodes.
    """
    upstream = boundary.upstream
    if not upstream or len(upstream) == sum(model.dynamic):
        return None
    end = max(upstream)
    # A prefix may contain nodes that lead to no boundary tensor, which only a cut by position can express.
    if upstream == prefix(model, end) and boundary.tensors:
        return cut_after(model, end)
    values = [model.values[name] for name in boundary.tensors]
    if stray := sorted(upstream - ancestors(model, values)):
        names = [str(model.nodes[i].name) for i in stray]
        raise CutError(
            f"{len(names)} nodes before the cut, such as {names[-1]}, lead to none of its tensors",
            nodes=names,
            hint="plan without early_outputs",
        )
    return cut_at(model, boundary.tensors)
