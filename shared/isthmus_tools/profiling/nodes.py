"""From the times of a runtime's kernels, which it fused, renamed and laid out anew, to those of the model's nodes.

A value that the optimised graph still has under its name ties a kernel to the node that makes it: the kernel does that
node's work, and that of the nodes before it whose values are gone. A kernel that makes no such value, such as a change
of layout, belongs to what reads it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from isthmus_tools.graph.load import OptimisedNode
from isthmus_tools.graph.model import Model

_LAID_OUT = re.compile(r"(.+)_nchwc(_token_\d+)?")
"""How onnxruntime names a node that it lays out in blocks of channels: after the value which that node makes."""


def node_seconds(
    model: Model, optimised: Sequence[OptimisedNode], kernels: Mapping[str, float], total_s: float
) -> tuple[float, ...]:
    """Seconds for each of `model.nodes`: those of `kernels`, by the names of `optimised`, scaled to `total_s` in all.

    Static nodes take none: they are computed once, when a segment is loaded. A kernel's time is shared out among the
    nodes that it does, by their work (see `work`). Without kernels everything is.
    """
    shares = [work(model, i) for i in range(len(model.nodes))]
    seconds = [0.0] * len(model.nodes)
    regions = _regions(model, optimised)
    everything = [i for i, dynamic in enumerate(model.dynamic) if dynamic]
    for node in optimised:
        region = regions.get(node.name) or everything
        whole = sum(shares[i] for i in region)
        for i in region:
            seconds[i] += kernels.get(node.name, 0.0) * shares[i] / whole
    if not (found := sum(seconds)):
        seconds = [share if model.dynamic[i] else 0.0 for i, share in enumerate(shares)]
        found = sum(seconds)
    return tuple(s * total_s / found for s in seconds)


def work(model: Model, node: int) -> float:
    """What a node does, to compare it with those that it is fused with: its multiply-accumulates and its outputs.

    An element written counts as one of them; an operator that only looks at shapes counts a little.
    """
    written = 0
    for value in model.nodes[node].outputs:
        shape = model.shapes.get(str(value.name), ())
        size = 1
        for n in shape:
            size *= n
        written += size
    return float(model.macs[node] + written + 1)


def matched(model: Model, optimised: Sequence[OptimisedNode], kernels: Mapping[str, float]) -> float:
    """The share of the kernels' time that is tied to the model's nodes by a value's name."""
    known = _known(model)
    tied = sum(kernels.get(node.name, 0.0) for node in optimised if _makes(node, known))
    total = sum(kernels.get(node.name, 0.0) for node in optimised)
    return tied / total if total else 0.0


def _regions(model: Model, optimised: Sequence[OptimisedNode]) -> dict[str, list[int]]:
    """The model's nodes that each optimised one does, by its name; none where nothing tells."""
    known = _known(model)
    made = {node.name: _makes(node, known) for node in optimised}
    kept = {value for values in made.values() for value in values}
    own = {name: _upstream(model, known, values, kept) for name, values in made.items() if values}
    readers: dict[str, list[str]] = {}
    writer = {value: node for node in optimised for value in node.outputs}
    for node in optimised:
        for value in node.inputs:
            readers.setdefault(value, []).append(node.name)
    found = {name: region for name, region in own.items() if region}
    # Backwards first, so that what comes after is known; then forwards for ends that nothing reads.
    for node in reversed(optimised):
        if node.name not in found:
            after = (r for value in node.outputs for r in readers.get(value, ()) if r in found)
            if (reader := next(after, None)) is not None:
                found[node.name] = found[reader]
    for node in optimised:
        if node.name not in found:
            before = (writer[v].name for v in node.inputs if v in writer and writer[v].name in found)
            if (source := next(before, None)) is not None:
                found[node.name] = found[source]
    return found


def _known(model: Model) -> dict[str, int]:
    """The place of the dynamic node that makes each value."""
    return {
        str(value.name): i
        for i, node in enumerate(model.nodes)
        if model.dynamic[i]
        for value in node.outputs
        if value.name
    }


def _makes(node: OptimisedNode, known: Collection[str]) -> tuple[str, ...]:
    """The model's values that an optimised node makes."""
    if values := tuple(v for v in node.outputs if v in known):
        return values
    laid_out = _LAID_OUT.fullmatch(node.name)
    return (laid_out[1],) if laid_out and laid_out[1] in known else ()


def _upstream(model: Model, known: Mapping[str, int], values: Sequence[str], kept: Collection[str]) -> list[int]:
    """The nodes that `values` need beyond what other kernels make."""
    stack = [known[v] for v in values]
    region = set(stack)
    while stack:
        for value in model.uses[stack.pop()]:
            i = known.get(str(value.name))
            if i is not None and value.name not in kept and i not in region:
                region.add(i)
                stack.append(i)
    return sorted(region)
