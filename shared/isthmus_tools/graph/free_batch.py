"""A fixed batch dimension of 1 made free, where a check shows that each row of a batch has the outputs of a run alone.

Exporters often write the batch of their example into the graph: in the inputs, the outputs, and the constants of
Reshape. With the first two free and the constants' leading 1 copied from the input instead, most graphs of images and
tokens take any batch. No rule tells the others apart, so the changed graph is run.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus_tools.graph import inputs, probe
from isthmus_tools.graph.load import constant
from isthmus_tools.graph.probe import difference

BATCH = "batch"
# As for a converted opset: rounding of another order of operations stays below.
MAX_DIFFERENCE = 1e-4
_ROWS = 3


def free_batch(model: ir.Model, examples: Mapping[str, Array]) -> None:
    """Make the first dimension of every input and output free; `model` is changed.

    Shapes: the first dimension of every input is 1, or free already in all. The original's outputs for three
    different inputs are compared with the changed graph's, alone and as a batch of three.

    Raises:
        ModelError: an input has another first dimension, or the changed graph does not run or computes something else.
    """
    names = [str(v.name) for v in model.graph.outputs]
    first = {str(v.name): (inputs.dims(v) or (None,))[0] for v in model.graph.inputs}
    if all(isinstance(size, str) for size in first.values()):
        return
    if wrong := [name for name, size in first.items() if size != 1]:
        raise ModelError(
            f"{wrong[0]} has no first dimension of 1 to make free", input=wrong[0], hint="leave out --free-batch"
        )
    rows = _rows(model, examples)
    expected = [probe.values(model, names, row) for row in rows]
    _change(model)
    try:
        alone = [probe.values(model, names, row) for row in rows]
        together = probe.values(model, names, {n: np.concatenate([row[n] for row in rows]) for n in rows[0]})
    except ModelError as e:
        raise _refused(f"with a batch of {_ROWS} {e.message}") from e
    for name in names:
        cut_apart = np.split(together[name], _ROWS) if together[name].shape[:1] == (_ROWS,) else [together[name]]
        got = [outputs[name] for outputs in alone] + cut_apart
        # Equal rows would hide that rows are mixed up.
        errors = [difference(e[name], g) for e, g in zip(expected * 2, got, strict=False)]
        if len(got) < 2 * _ROWS or max(errors) > MAX_DIFFERENCE:
            raise _refused(f"in a batch the rows of {name} differ from runs of each row alone")
        if difference(expected[0][name], expected[1][name]) <= MAX_DIFFERENCE:
            raise _refused(f"{name} is the same for different inputs, so a check of its rows shows nothing")


def _refused(reason: str) -> ModelError:
    return ModelError(
        f"the batch dimension cannot be made free: {reason}",
        hint="leave out --free-batch, or export the model anew with a free batch dimension",
    )


def _rows(model: ir.Model, examples: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Different inputs of a row: the example or a synthetic input, then noise with flipped integers."""
    bound = inputs.bind_inputs(model.graph, {}, examples)
    first = inputs.trial_inputs(model.graph, bound, examples)[0]
    return [first, *(inputs.noise(first, seed) for seed in range(_ROWS - 1))]


def _change(model: ir.Model) -> None:
    graph = model.graph
    for node in graph:
        _copy_leading_size(graph, node)
        for output in node.outputs:
            # Declared and inferred shapes of inner values hold the fixed size.
            output.shape = None
    for value in graph.inputs:
        value.shape = ir.Shape([BATCH, *value.shape[1:]]) if value.shape is not None else None
    for value in graph.outputs:
        value.shape = None


def _copy_leading_size(graph: ir.Graph, node: ir.Node) -> None:
    """Let a Reshape to a constant shape with a leading 1 take the size of its input's first dimension."""
    shape = node.inputs[1].const_value if node.op_type == "Reshape" and node.inputs[1] is not None else None
    if shape is None:
        return
    sizes = shape.numpy()
    if not sizes.size or sizes[0] != 1 or (sizes == 0).any():
        return
    name = f"{node.outputs[0].name}_free_batch_shape"
    # In a Reshape 0 is the input's size of that axis, unless allowzero is set.
    free = constant(np.concatenate([[0], sizes[1:]]).astype(np.int64), name)
    graph.register_initializer(free)
    node.replace_input_with(1, free)
    node.attributes.pop("allowzero", None)
