"""A normalised graph with the facts that cuts need, each computed once, in time linear in the graph."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import onnx_ir as ir

from isthmus.arrays import Array
from isthmus.artifacts.state import State
from isthmus.artifacts.tensors import TensorSpec
from isthmus_tools.graph import free_batch as batches
from isthmus_tools.graph import inputs, load, macs, opset_conversion, shapes

Examples: TypeAlias = Mapping[str, Array]
Binding: TypeAlias = Mapping[str, Sequence[int]]

# Two segments with a copy each would draw different values.
_RANDOM_OPS = {
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
    *static* when no graph input and no random operator reaches it: constant for all inputs, so segments recompute
    static values and cuts never carry them. `dynamic[i]`: node i is not static. `specs` hold every dynamic value and
    output that a frame carries, with free dimensions; `shapes` the same values' shapes under `binding`, the basis of
    bytes and MACs. `state` names the inputs and outputs that stay with the segments, and so cross no cut. `refused`,
    `claims`: see `shapes.Types`.
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
    state: State | None = None
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
    def local(self) -> frozenset[str]:
        """Inputs and outputs of the state: no frame carries them."""
        return frozenset() if self.state is None else frozenset((*self.state.inputs, *self.state.outputs))

    @cached_property
    def positions(self) -> Mapping[ir.Node, int]:
        """Each node's index in `nodes`."""
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def values(self) -> Mapping[str, ir.Value]:
        """The main graph's values by name, initialisers included."""
        by_name = {str(v.name): v for v in (*self.inputs, *self.graph.initializers.values())}
        by_name.update((v.name, v) for node in self.nodes for v in node.outputs if v.name)
        return by_name

    def is_static(self, value: ir.Value) -> bool:
        """Whether `value` is the same for every input: an initialiser, or computed from static values only."""
        producer = value.producer()
        if producer is None:
            return value.is_initializer()
        return not self.dynamic[self.positions[producer]]

    def nbytes(self, value: ir.Value) -> int:
        """Bytes of a dynamic value under the model's binding."""
        name = str(value.name)
        return inputs.nbytes(self.specs[name].dtype, self.shapes[name])

    @cached_property
    def is_random(self) -> bool:
        """Whether two runs with equal inputs may give different predictions."""
        return any(map(_is_random, self.nodes))

    @cached_property
    def total_macs(self) -> int:
        return sum(self.macs)

    def initialisers(self) -> Iterator[ir.Value]:
        """All initialisers, in order of first use by a dynamic node, directly or through static nodes."""
        done: set[ir.Value] = set()
        users = [i for i, dynamic in enumerate(self.dynamic) if dynamic]
        # Static nodes last: some compute constant outputs that no dynamic node reads.
        users += [i for i, dynamic in enumerate(self.dynamic) if not dynamic]
        for i in users:
            stack = list(reversed(self.uses[i]))
            while stack:
                value = stack.pop()
                if value in done or not self.is_static(value):
                    continue
                done.add(value)
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
    free_batch: bool = False,
    normalise: bool = True,
    state: State | None = None,
) -> Model:
    """Read an ONNX file, normalise its graph and infer every value's dtype and shape.

    `bind` gives inputs their shapes for bytes and MACs; `examples` give shapes too, and values for the run where shapes
    depend on values. An unbound free first dimension counts as 1. The graph keeps its free dimensions unless `freeze`,
    which declares the bound shapes and folds shape computations to constants. With `free_batch` a first dimension of 1
    becomes free.

    Raises:
        ModelError: not an ONNX model, unsupported, or an unbound free dimension; the batch dimension cannot be free.
    """
    with load.refusals(path):
        model = load.read(path, normalise=normalise)
        bound = inputs.bind_inputs(model.graph, bind or {}, examples or {})
        # onnx's converter is known to err silently, so each conversion is verified.
        if opset_conversion.converted_from(model) is not None:
            trials = inputs.trial_inputs(model.graph, bound, examples or {})
            opset_conversion.check_same(Path(path), model, trials, random=any(map(_is_random, model.graph)))
        if free_batch:
            batches.free_batch(model, examples or {})
        return _analysed(model, bound, examples or {}, freeze, state)


def _analysed(
    model: ir.Model, bound: Mapping[str, tuple[int, ...]], examples: Examples, freeze: bool, state: State | None
) -> Model:
    # Before the analysis: folding removes nodes, and positions count the remaining nodes.
    if freeze:
        shapes.freeze(model, bound)
    nodes = tuple(model.graph)
    uses = tuple(tuple(_uses(node, model.graph)) for node in nodes)
    dynamic = _dynamic(nodes, uses)
    values = [
        v
        for node, is_dynamic in zip(nodes, dynamic, strict=True)
        for v in node.outputs
        if v.name and (is_dynamic or v.is_graph_output())
    ]
    types = shapes.infer(model, values, bound, examples)
    return Model(
        document=model,
        nodes=nodes,
        uses=uses,
        dynamic=dynamic,
        specs=types.specs,
        shapes=types.shapes,
        macs=tuple(macs.of_node(n, types.bound) if d else 0 for n, d in zip(nodes, dynamic, strict=True)),
        binding=bound,
        examples=examples,
        state=state,
        refused=types.refused,
        claims=types.claims,
    )


def _uses(node: ir.Node, graph: ir.Graph) -> dict[ir.Value, None]:
    # A dict, not a set: the order of initialisers in the weights file follows.
    uses = dict.fromkeys(v for v in node.inputs if v is not None)
    for body in load.bodies(node):
        for inner in ir.traversal.RecursiveGraphIterator(body):
            uses.update(dict.fromkeys(v for v in inner.inputs if v is not None and v.graph is graph))
        uses.update(dict.fromkeys(v for v in body.outputs if v.graph is graph))
    return uses


def _dynamic(nodes: Sequence[ir.Node], uses: Sequence[Sequence[ir.Value]]) -> tuple[bool, ...]:
    reached: set[ir.Value] = set()
    flags = []
    for node, values in zip(nodes, uses, strict=True):
        is_dynamic = _is_random(node) or any(v in reached or v.is_graph_input() for v in values)
        if is_dynamic:
            reached.update(node.outputs)
        flags.append(is_dynamic)
    return tuple(flags)


def _is_random(node: ir.Node) -> bool:
    return node.op_type in _RANDOM_OPS or any(
        inner.op_type in _RANDOM_OPS
        for body in load.bodies(node)
        for inner in ir.traversal.RecursiveGraphIterator(body)
    )
