"""Exit branches of a decoder: the graph of a branch behind a cut, and the values that it is fitted on.

A branch normalises the residual stream at its cut, maps it linearly to what the final norm gives, and multiplies by
rows of the model's own output matrix, which stays in the weights file.

Source: logit lens with learned maps: Belrose et al., arXiv 2303.08112 (tuned lens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus.artifacts.bundle import EXIT_PROBABILITIES, EXIT_TOKENS, Blob, Bundle, Segment, WeightTensor, digest_of
from isthmus.artifacts.segment_id import SegmentId
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ModelError
from isthmus_tools.graph.node_writer import NodeWriter, initialiser, written_model
from isthmus_tools.graph.weights import LOCATION

FINAL = "output_norm.out"
# Where a decoder's output matrix is in its weights file: of its own, or the tied embedding.
_MATRICES = ("output.weight", "token_embd.weight")
EPSILON = 1e-5
"""Added to the mean square of a residual stream, by the branch as by its fit."""


@dataclass(frozen=True)
class FittedExit:
    """The linear map of a branch, and the ids of the tokens that it chooses among. Shapes: (width, width), (width,)."""

    weights: Array
    bias: Array
    tokens: Array


def observed_values(bundle: Bundle, cuts: Sequence[str]) -> list[TensorSpec]:
    """The values that branches are fitted on: the boundary tensor of each of `cuts`, and what the final norm gives.

    Raises:
        ModelError: a cut carries no residual stream.
    """
    width = _boundary(bundle, cuts[0]).shape[-1]
    return [TensorSpec(name, "float32", ("batch", "tokens", width)) for name in (*cuts, FINAL)]


def exit_segment(bundle: Bundle, cut: str, fitted: FittedExit) -> tuple[bytes, Segment]:
    """The graph of the branch behind `cut`, and its declaration as a segment `CUT..CUT`.

    Raises:
        ModelError: the output matrix is not float32.
    """
    boundary = _boundary(bundle, cut)
    index, place = _matrix(bundle)
    document = _model(boundary, place, _vocabulary(bundle), fitted)
    data = ir.serde.serialize_model(document).SerializeToString(deterministic=True)
    rows = boundary.shape[:2]
    outputs = (TensorSpec(EXIT_TOKENS, "int64", rows), TensorSpec(EXIT_PROBABILITIES, "float32", rows))
    width, tokens = int(boundary.shape[-1]), len(fitted.tokens)
    # Of one position, as those of segments.
    macs = width * (width + tokens)
    return data, Segment(
        SegmentId(cut, cut), Blob(digest_of(data), len(data)), (boundary,), outputs, ((index, index + 1),), macs
    )


def matrix_of(weights: Path, bundle: Bundle) -> Array:
    """The model's output matrix, mapped. Shapes: (vocabulary, width).

    Raises:
        ModelError: as `exit_segment`.
    """
    _, place = _matrix(bundle)
    shape = (_vocabulary(bundle), place.length // 4 // _vocabulary(bundle))
    # Mapped: the matrix of a large model has gigabytes, and rows of it are used.
    return np.memmap(weights, np.float32, "r", place.offset, shape)


def _model(boundary: TensorSpec, place: WeightTensor, vocabulary: int, fitted: FittedExit) -> ir.Model:
    width = int(boundary.shape[-1])
    batch, count = ir.SymbolicDim("batch"), ir.SymbolicDim("tokens")
    x = ir.Value(name=boundary.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([batch, count, width]))
    matrix = ir.ExternalTensor(
        LOCATION, place.offset, place.length, ir.DataType.FLOAT, shape=ir.Shape([vocabulary, width]), name=place.name
    )
    arrays: dict[str, Array] = {
        "scale": np.ones(width, np.float32),
        "map": fitted.weights.astype(np.float32),
        "bias": fitted.bias.astype(np.float32),
        "ids": fitted.tokens.astype(np.int64),
    }
    constants = {name: initialiser(ir.tensor(array, name=name)) for name, array in arrays.items()}
    constants[place.name] = initialiser(matrix)
    writer = NodeWriter()
    op = writer.node
    normed = op("SimplifiedLayerNormalization", [x, constants["scale"]], "normed", axis=-1, epsilon=EPSILON)
    final = op("Add", [op("MatMul", [normed, constants["map"]], "mapped"), constants["bias"]], "final")
    # Constants: folded when the session is made, so that only these rows are in memory.
    rows = op("Transpose", [op("Gather", [constants[place.name], constants["ids"]], "rows")], "columns", perm=[1, 0])
    shares = op("Softmax", [op("MatMul", [final, rows], "scores")], "shares", axis=-1)
    best = op("ArgMax", [shares], "best", axis=-1, keepdims=0)
    tokens = op("Gather", [constants["ids"], best], EXIT_TOKENS)
    axes = initialiser(ir.tensor(np.array([-1], np.int64), name="axes"))
    probabilities = op("ReduceMax", [shares, axes], EXIT_PROBABILITIES, keepdims=0)
    for value, dtype in ((tokens, ir.DataType.INT64), (probabilities, ir.DataType.FLOAT)):
        value.type, value.shape = ir.TensorType(dtype), ir.Shape([batch, count])
    return written_model([x], [tokens, probabilities], writer.nodes, [*constants.values(), axes], "exit")


def _boundary(bundle: Bundle, cut: str) -> TensorSpec:
    tensors = bundle.cuts[cut].tensors
    if len(tensors) != 1 or tensors[0].dtype != "float32" or len(tensors[0].shape) != 3:
        raise ModelError(f"the cut {cut} of {bundle.name} carries no residual stream", cut=cut)
    return tensors[0]


def _matrix(bundle: Bundle) -> tuple[int, WeightTensor]:
    places = {tensor.name: (i, tensor) for i, tensor in enumerate(bundle.weights.tensors)}
    index, place = next((places[name] for name in _MATRICES if name in places), (0, None))
    width = int(_boundary(bundle, next(iter(bundle.cuts))).shape[-1])
    if place is None or place.length != 4 * width * _vocabulary(bundle):
        raise ModelError(f"the output matrix of {bundle.name} is not in its weights file as float32")
    return index, place


def _vocabulary(bundle: Bundle) -> int:
    logits = next(spec for spec in bundle.outputs if bundle.text is not None and spec.name == bundle.text.logits)
    return int(logits.shape[-1])
