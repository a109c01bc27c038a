"""A normalised graph and the facts that cutting it needs, each computed once, in time linear in the graph."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from isthmus.artifacts.tensors import TensorSpec
from isthmus_tools.graph import load, macs, old_opsets, shapes

Examples: TypeAlias = Mapping[str, npt.NDArray[np.generic]]
Binding: TypeAlias = Mapping[str, Sequence[int]]

# Copying one of these into two segments would draw two different values.
_RANDOM = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
}


@dataclass(frozen=True, eq=False)
class Model:
    """A normalised ONNX model.

    `nodes` are in topological order; `uses[i]` are the graph's values that node i or its bodies read. A value is
    *static* when no graph input and no random operator reaches it: whoever needs one computes it anew, so it never
    crosses a cut. `dynamic[i]` says that node i is not static. `specs` hold every dynamic value and output that a
    frame carries, with its free dimensions; `shapes` the same values' shapes under `binding`, for which bytes and MACs
    are counted. `refused`, `claims`: see `shapes.Types`.
    """

    document: ir.Model
    nodes: tuple[ir.Node, ...]
    uses: tuple[tuple[ir.Value, ...], ...]
    dynamic: tuple[bool, ...]
    specs: Mapping[str, TensorSpec]
    shapes: Mapping[str, tuple[int, ...]]
    macs: tuple[int, ...]
    binding: Mapping[str, tuple[int, ...]]
    examples: Examples
    refused: Mapping[str, str] = field(default_factory=dict)
    claims: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    @property
    def graph(self) -> ir.Graph:
        return self.document.graph

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        return tuple(self.graph.inputs)

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        return tuple(self.graph.outputs)

    @cached_property
    def positions(self) -> Mapping[ir.Node, int]:
        """Each node's place in `nodes`."""
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def values(self) -> Mapping[str, ir.Value]:
        """The graph's values by name, initialisers included, those inside bodies not."""
        found = {str(v.name): v for v in (*self.inputs, *self.graph.initializers.values())}
        found.update((v.name, v) for node in self.nodes for v in node.outputs if v.name)
        return found

    def is_static(self, value: ir.Value) -> bool:
        """Whether `value` is the same for every input: an initialiser, or computed from nothing else."""
        producer = value.producer()
        if producer is None:
            return value.is_initializer()
        return not self.dynamic[self.positions[producer]]

    def nbytes(self, value: ir.Value) -> int:
        """Bytes of a dynamic value under the model's binding."""
        name = str(value.name)
        return shapes.nbytes(self.specs[name].dtype, self.shapes[name])

    @cached_property
    def is_random(self) -> bool:
        """Whether two runs with the same inputs may give two answers."""
        return any(map(_is_random, self.nodes))

    @cached_property
    def total_macs(self) -> int:
        return sum(self.macs)

    def initialisers(self) -> Iterator[ir.Value]:
        """All initialisers, in the order in which a dynamic node first needs them, directly or by static nodes."""
        seen: set[ir.Value] = set()
        users = [i for i, dynamic in enumerate(self.dynamic) if dynamic]
        users += [i for i, dynamic in enumerate(self.dynamic) if not dynamic]
        for i in users:
            stack = list(reversed(self.uses[i]))
            while stack:
                value = stack.pop()
                if value in seen or not self.is_static(value):
                    continue
                seen.add(value)
                producer = value.producer()
                if producer is None:
                    yield value
                else:
                    stack.extend(reversed(self.uses[self.positions[producer]]))


def open_model(
    path: str | os.PathLike[str],
    *,
    bind: Binding | None = None,
    examples: Examples | None = None,
    freeze: bool = False,
    normalise: bool = True,
) -> Model:
    """Read an ONNX file, normalise it, and find every value's dtype and shape.

    `bind` gives inputs their shapes for the counting of bytes and MACs, `examples` arrays to take them from and to run
    once with where shapes depend on values. A free first dimension counts as 1 otherwise. The graph keeps its free
    dimensions unless `freeze`, which makes the bound shapes the model's own and folds what only depends on them.

    Raises:
        ModelError: not an ONNX model, unsupported, or a free dimension that nothing binds.
    """
    with load.refusals(path):
        model = load.read(path, normalise=normalise)
        bound = shapes.bind_inputs(model.graph, bind or {}, examples or {})
        if old_opsets.converted_from(model) is not None:
            inputs = shapes.trial_inputs(model.graph, bound, examples or {})
            old_opsets.check_same(Path(path), model, inputs, random=any(map(_is_random, model.graph)))
        return _opened(model, bound, examples or {}, freeze)


def _opened(model: ir.Model, bound: Mapping[str, tuple[int, ...]], examples: Examples, freeze: bool) -> Model:
    if freeze:
        shapes.freeze(model, bound)
    nodes = tuple(model.graph)
    uses = tuple(tuple(_uses(node, model.graph)) for node in nodes)
    dynamic = _dynamic(nodes, uses)
    wanted = [
        v
        for node, keep in zip(nodes, dynamic, strict=True)
        for v in node.outputs
        if v.name and (keep or v.is_graph_output())
    ]
    types = shapes.infer(model, wanted, bound, examples)
    counts = tuple(macs.of_node(node, types.bound) if keep else 0 for node, keep in zip(nodes, dynamic, strict=True))
    return Model(
        model,
        nodes,
        uses,
        dynamic,
        types.specs,
        types.shapes,
        counts,
        bound,
        examples,
        types.refused,
        types.claims,
    )


def _uses(node: ir.Node, graph: ir.Graph) -> dict[ir.Value, None]:
    found = dict.fromkeys(v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        bodies: Sequence[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = attribute.as_graphs()
        for body in bodies:
            for inner in ir.traversal.RecursiveGraphIterator(body):
                found.update(dict.fromkeys(v for v in inner.inputs if v is not None and v.graph is graph))
            found.update(dict.fromkeys(v for v in body.outputs if v.graph is graph))
    return found


def _dynamic(nodes: Sequence[ir.Node], uses: Sequence[Sequence[ir.Value]]) -> tuple[bool, ...]:
    reached: set[ir.Value] = set()
    found = []
    for node, used in zip(nodes, uses, strict=True):
        dynamic = _is_random(node) or any(v in reached or v.is_graph_input() for v in used)
        if dynamic:
            reached.update(node.outputs)
        found.append(dynamic)
    return tuple(found)


def _is_random(node: ir.Node) -> bool:
    if node.op_type in _RANDOM:
        return True
    bodies = [a for a in node.attributes.values() if a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)]
    for attribute in bodies:
        graphs = (attribute.as_graph(),) if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
        if any(inner.op_type in _RANDOM for g in graphs for inner in ir.traversal.RecursiveGraphIterator(g)):
            return True
    return False
