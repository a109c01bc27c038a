"""Times of the model's nodes, from the times of a runtime's kernels after fusion, renaming and layout changes.

A value that the optimised graph still has under its original name ties a kernel to the node that produces the value:
the kernel computes that node and the nodes before it whose values fusion removed. A kernel without such a value, such
as a layout conversion, counts to its reader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

from isthmus_tools.graph.load import OptimisedNode
from isthmus_tools.graph.model import Model

# onnxruntime names a node in the NCHWc layout (channels in blocks) after the value that the node produces.
_BLOCKED_LAYOUT = re.compile(r"(.+)_nchwc(_token_\d+)?")


def node_seconds(
    model: Model, optimised: Sequence[OptimisedNode], kernels: Mapping[str, float], total_s: float
) -> tuple[float, ...]:
    """Seconds of each of `model.nodes`: the times of `kernels`, by names of `optimised`, scaled to the sum `total_s`.

    Static nodes take none: segments compute these once, when loaded. A kernel's time is distributed over its nodes in
    proportion to their `work`; without kernels, `total_s` is.
    """
    shares = [work(model, i) for i in range(len(model.nodes))]
    seconds = [0.0] * len(model.nodes)
    regions = _regions(model, optimised)
    all_dynamic = [i for i, dynamic in enumerate(model.dynamic) if dynamic]
    for node in optimised:
        region = regions.get(node.name) or all_dynamic
        whole = sum(shares[i] for i in region)
        for i in region:
            seconds[i] += kernels.get(node.name, 0.0) * shares[i] / whole
    if not (total := sum(seconds)):
        seconds = [share if model.dynamic[i] else 0.0 for i, share in enumerate(shares)]
        total = sum(seconds)
    return tuple(s * total_s / total for s in seconds)


def work(model: Model, node: int) -> float:
    """A node's relative work among nodes fused with it: its MACs plus the elements that it writes, at least 1."""
    # An element written costs about a MAC; 1 keeps shape computations above zero.
    written = sum(math.prod(model.shapes.get(str(value.name), ())) for value in model.nodes[node].outputs)
    return float(model.macs[node] + written + 1)


def _regions(model: Model, optimised: Sequence[OptimisedNode]) -> dict[str, list[int]]:
    """The model's nodes that each optimised node computes, by name; without an entry where no value ties the two."""
    producers = _producers(model)
    values = {node.name: _original_values(node, producers) for node in optimised}
    surviving = {value for names in values.values() for value in names}
    # Values in `surviving` have their own kernel, which bounds the region of another.
    regions = {name: _upstream(model, producers, names, surviving) for name, names in values.items() if names}
    readers: dict[str, list[str]] = {}
    writer = {value: node for node in optimised for value in node.outputs}
    for node in optimised:
        for value in node.inputs:
            readers.setdefault(value, []).append(node.name)
    # Backwards first, so that readers have their regions; then forwards, for ends without a reader.
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
    """The position of the dynamic node that produces each value."""
    return {
        str(value.name): i
        for i, node in enumerate(model.nodes)
        if model.dynamic[i]
        for value in node.outputs
        if value.name
    }


def _original_values(node: OptimisedNode, producers: Collection[str]) -> tuple[str, ...]:
    """The model's values that an optimised node produces."""
    if values := tuple(v for v in node.outputs if v in producers):
        return values
    blocked = _BLOCKED_LAYOUT.fullmatch(node.name)
    return (blocked[1],) if blocked and blocked[1] in producers else ()


def _upstream(
    model: Model, producers: Mapping[str, int], values: Sequence[str], surviving: Collection[str]
) -> list[int]:
    """The nodes that compute `values` from values that other kernels produce."""
    stack = [producers[v] for v in values]
    region = set(stack)
    while stack:
        for value in model.uses[stack.pop()]:
            i = producers.get(str(value.name))
            if i is not None and value.name not in surviving and i not in region:
                region.add(i)
                stack.append(i)
    return sorted(region)
