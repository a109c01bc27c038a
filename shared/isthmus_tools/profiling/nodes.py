"""Attribution of a runtime's kernel times to the model's nodes, across fusion, renaming and layout changes.

A value that keeps its name in the optimised graph ties a kernel to the node that computes the value: the kernel does
the node's work, and the work of the nodes before it whose values are gone. A kernel without such a value, such as a
layout change, belongs to its reader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

from isthmus_tools.graph.load import OptimisedNode
from isthmus_tools.graph.model import Model

# onnxruntime names a node in blocked channel layout after the value that the node computes.
_BLOCKED_LAYOUT = re.compile(r"(.+)_nchwc(_token_\d+)?")


def node_seconds(
    model: Model, optimised: Sequence[OptimisedNode], kernels: Mapping[str, float], total_s: float
) -> tuple[float, ...]:
    """Seconds of each of `model.nodes` from `kernels`, by the names of `optimised`, scaled to `total_s` in all.

    Static nodes take none: they are computed once, when a segment is loaded. A kernel's time is divided among its
    nodes by their work (see `work`); without kernels `total_s` is divided among all nodes.
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
    if not (attributed := sum(seconds)):
        seconds = [share if model.dynamic[i] else 0.0 for i, share in enumerate(shares)]
        attributed = sum(seconds)
    return tuple(s * total_s / attributed for s in seconds)


def work(model: Model, node: int) -> float:
    """The work of a node, relative to the nodes fused with it: its multiply-accumulates and its output elements."""
    shapes = (model.shapes.get(str(value.name), ()) for value in model.nodes[node].outputs)
    # An operator on shapes alone has no elements, and still takes some time.
    return float(model.macs[node] + sum(map(math.prod, shapes)) + 1)


def matched(model: Model, optimised: Sequence[OptimisedNode], kernels: Mapping[str, float]) -> float:
    """The share of the kernels' time that a value's name ties to a node."""
    producers = _producers(model)
    tied = sum(kernels.get(node.name, 0.0) for node in optimised if _values_of(node, producers))
    total = sum(kernels.get(node.name, 0.0) for node in optimised)
    return tied / total if total else 0.0


def _regions(model: Model, optimised: Sequence[OptimisedNode]) -> dict[str, list[int]]:
    """The model's nodes in each optimised node, by its name; none where no value ties."""
    producers = _producers(model)
    values_of = {node.name: _values_of(node, producers) for node in optimised}
    tied_values = {value for values in values_of.values() for value in values}
    own = {name: _upstream(model, producers, values, tied_values) for name, values in values_of.items() if values}
    readers: dict[str, list[str]] = {}
    writer = {value: node for node in optimised for value in node.outputs}
    for node in optimised:
        for value in node.inputs:
            readers.setdefault(value, []).append(node.name)
    regions = {name: region for name, region in own.items() if region}
    # Backwards first, so that readers have their regions; then forwards for outputs without a reader.
    for node in reversed(optimised):
        if node.name not in regions:
            after = (r for value in node.outputs for r in readers.get(value, ()) if r in regions)
            if (reader := next(after, None)) is not None:
                regions[node.name] = regions[reader]
    for node in optimised:
        if node.name not in regions:
            before = (writer[v].name for v in node.inputs if v in writer and writer[v].name in regions)
            if (source := next(before, None)) is not None:
                regions[node.name] = regions[source]
    return regions


def _producers(model: Model) -> dict[str, int]:
    """The index of the dynamic node that computes each value."""
    return {
        str(value.name): i
        for i, node in enumerate(model.nodes)
        if model.dynamic[i]
        for value in node.outputs
        if value.name
    }


def _values_of(node: OptimisedNode, producers: Collection[str]) -> tuple[str, ...]:
    """The model's values that an optimised node computes."""
    if values := tuple(v for v in node.outputs if v in producers):
        return values
    match = _BLOCKED_LAYOUT.fullmatch(node.name)
    return (match[1],) if match and match[1] in producers else ()


def _upstream(
    model: Model, producers: Mapping[str, int], values: Sequence[str], tied_values: Collection[str]
) -> list[int]:
    """The nodes that `values` depend on, up to the values of other kernels."""
    stack = [producers[v] for v in values]
    region = set(stack)
    while stack:
        for value in model.uses[stack.pop()]:
            i = producers.get(str(value.name))
            if i is not None and value.name not in tied_values and i not in region:
                region.add(i)
                stack.append(i)
    return sorted(region)
