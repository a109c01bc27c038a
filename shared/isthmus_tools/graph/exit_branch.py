"""The branch of a classifier's exit as a graph: boundary tensors in, `exit_scores` and `exit_confidence` out.

The weights are inside the graph: a branch has some thousand, and functions load these with the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from isthmus.arrays import DTYPES, Array
from isthmus.artifacts.bundle import Blob, Segment, digest_of
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES
from isthmus.artifacts.segment_id import SegmentId
from isthmus.artifacts.tensors import TensorSpec
from isthmus_tools.graph.node_writer import NodeWriter, declare, initialiser, written_model


@dataclass(frozen=True)
class TokenMask:
    """A boundary tensor whose values above `above` mark real tokens, any of them along the axes between.

    With `is_trailing` the last axis is of size 1, and tokens are along the second.
    """

    tensor: str
    dtype: str
    above: float
    is_trailing: bool = False


@dataclass(frozen=True, eq=False)
class TensorPool:
    """How a boundary tensor becomes `width` features.

    `channels_last` moves channels to the second axis first, and `magnitudes` appends absolute values as further
    channels. `rows` and `columns` are matrices of means over cells of the last two axes; without, the mean over all
    places. `extremes` adds the maximum over places, `first` the first place of a sequence. With `mask` means and maxima
    are those of a sequence's real tokens. Shapes: rows (cells, height), columns (places, cells), both float32.
    """

    tensor: str
    dtype: str
    width: int
    rows: Array | None = None
    columns: Array | None = None
    channels_last: bool = False
    magnitudes: bool = False
    extremes: bool = False
    first: bool = False
    mask: TokenMask | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The boundary tensors that it reads."""
        return (self.tensor,) if self.mask is None else (self.tensor, self.mask.tensor)


PADDED: Array = np.array(-1e9, np.float32)
"""What padded tokens are to a maximum: below any activation, and finite where a text has no token at all."""
LEAST_REAL: Array = np.array(1e-6, np.float32)
"""The least share of real tokens in a mean: a cell without any is 0."""


@dataclass(frozen=True, eq=False)
class BranchWeights:
    """The numbers of a branch: a standardised linear map to logits, and weights of the logits' statistics.

    `statistics` weigh margin, top probability and entropy of the logits; the confidence is their sum and `offset`.
    Shapes: mean and scale (features,), weights (features, classes), bias (classes,), statistics (3,).
    """

    mean: Array
    scale: Array
    weights: Array
    bias: Array
    statistics: Array
    offset: float


def branch_segment(
    cut: str,
    inputs: Sequence[TensorSpec],
    pools: Sequence[TensorPool],
    branch: BranchWeights,
    output: TensorSpec,
    *,
    probabilities: bool = False,
) -> tuple[bytes, Segment]:
    """The graph of the branch at `cut`, and its declaration as a segment `CUT..CUT`.

    `inputs` are the boundary tensors that `pools` read, `output` is the model's output that the scores stand for;
    with `probabilities` a softmax, as the model's own are.
    """
    writer = _BranchWriter()
    values = {spec.name: declare(ir.Value(name=spec.name), spec) for spec in inputs}
    parts = [writer.pool(pool, values) for pool in pools]
    features = parts[0] if len(parts) == 1 else writer.op("Concat", parts, "features", axis=1)
    logits = writer.linear(features, branch)
    confidence = writer.confidence(logits, branch)
    scores = writer.scores(logits, output, probabilities=probabilities)
    batch = inputs[0].shape[0]
    specs = (
        TensorSpec(EXIT_SCORES, output.dtype, (batch, *output.shape[1:])),
        TensorSpec(EXIT_CONFIDENCE, "float32", (batch,)),
    )
    for value, spec in zip((scores, confidence), specs, strict=True):
        declare(value, spec)
    model = written_model(list(values.values()), [scores, confidence], writer.nodes, writer.constants, "exit")
    data = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    declared = {spec.name: spec for spec in inputs}
    macs = int(branch.weights.size) + sum(_pool_macs(pool, declared[pool.tensor]) for pool in pools)
    return data, Segment(SegmentId(cut, cut), Blob(digest_of(data), len(data)), tuple(inputs), specs, (), macs)


class _BranchWriter:
    """Nodes and constants of a branch, each under a name of its own."""

    def __init__(self) -> None:
        self._writer = NodeWriter()
        self.constants: list[ir.Value] = []

    @property
    def nodes(self) -> list[ir.Node]:
        return self._writer.nodes

    def op(self, kind: str, inputs: Sequence[ir.Value], name: str, **attributes: object) -> ir.Value:
        """A node; its name must not meet a boundary tensor's, of any name."""
        own = name if name in (EXIT_SCORES, EXIT_CONFIDENCE) else f"isthmus_exit_{len(self.nodes)}_{name}"
        return self._writer.node(kind, inputs, own, **attributes)

    def constant(self, array: Array, name: str) -> ir.Value:
        # Not `ascontiguousarray`: a scalar would get an axis.
        value = initialiser(ir.tensor(np.array(array, order="C"), name=f"isthmus_exit_c{len(self.constants)}_{name}"))
        self.constants.append(value)
        return value

    def numbers(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, np.int64), "numbers")

    def pool(self, pool: TensorPool, tensors: Mapping[str, ir.Value]) -> ir.Value:
        """Features of a tensor, as `learning.exits.features.pooled` computes."""
        tensor = tensors[pool.tensor]
        rank = len(tensor.shape or ())
        x = tensor if pool.dtype == "float32" else self.op("Cast", [tensor], "float", to=ir.DataType.FLOAT)
        if pool.channels_last:
            x = self.op("Transpose", [x], "channels_first", perm=[0, rank - 1, *range(1, rank - 1)])
        if rank == 2:
            return x if pool.columns is None else self.op("MatMul", [x, self.constant(pool.columns, "cells")], "cells")
        if pool.magnitudes:
            x = self.op("Concat", [x, self.op("Abs", [x], "abs")], "signed_and_absolute", axis=1)
        places = self.numbers(*range(2, rank))  # the axes behind (batch, channels)
        real = None if pool.mask is None else self._real_tokens(pool.mask, tensors[pool.mask.tensor])
        summed = (
            x
            if real is None
            else self.op("Where", [real, x, self.constant(np.array(0, np.float32), "none")], "real_only")
        )
        cells = self._means(pool, summed, places)
        if real is not None:
            shares = self._means(pool, self.op("Cast", [real], "real_ones", to=ir.DataType.FLOAT), places)
            cells = self.op("Div", [cells, self.op("Max", [shares, self.constant(LEAST_REAL, "least")], "real")], "of")
        parts = [self.op("Flatten", [cells], "cells", axis=1)]
        if pool.extremes:
            # The first token stays what it is, with padding before the text too.
            above = x if real is None else self.op("Where", [real, x, self.constant(PADDED, "padded")], "padded")
            parts.append(self.op("ReduceMax", [above, places], "max", keepdims=0))
        if pool.first:
            parts.append(self.op("Gather", [x, self.constant(np.array(0, np.int64), "zero")], "first", axis=2))
        return parts[0] if len(parts) == 1 else self.op("Concat", parts, "pooled", axis=1)

    def _means(self, pool: TensorPool, x: ir.Value, places: ir.Value) -> ir.Value:
        """Means over cells, or over all places. Shapes: (batch, channels, cells…)."""
        if pool.columns is None:
            return self.op("ReduceMean", [x, places], "mean", keepdims=1)
        cells = self.op("MatMul", [x, self.constant(pool.columns, "columns")], "columns")
        return cells if pool.rows is None else self.op("MatMul", [self.constant(pool.rows, "rows"), cells], "rows")

    def _real_tokens(self, mask: TokenMask, tensor: ir.Value) -> ir.Value:
        """Whether tokens are real, as `learning.exits.padding.real_tokens`. Shapes: (batch, 1, tokens) bool."""
        x = self.op("Cast", [tensor], "mask", to=ir.DataType.FLOAT)
        rank = len(tensor.shape or ())
        if mask.is_trailing:
            x = self.op("Squeeze", [x, self.numbers(2)], "tokens")
        elif rank > 2:
            x = self.op("ReduceMax", [x, self.numbers(*range(1, rank - 1))], "attended", keepdims=0)
        real = self.op("Greater", [x, self.constant(np.array(mask.above, np.float32), "above")], "is_real")
        return self.op("Unsqueeze", [real, self.numbers(1)], "by_channel")

    def linear(self, features: ir.Value, branch: BranchWeights) -> ir.Value:
        """Logits. The mean is subtracted first: folded into the bias, large means would cost digits of float32."""
        mean, scale, weights, bias = (
            self.constant(getattr(branch, name).astype(np.float32), name)
            for name in ("mean", "scale", "weights", "bias")
        )
        standard = self.op("Mul", [self.op("Sub", [features, mean], "centred"), scale], "standard")
        return self.op("Add", [self.op("MatMul", [standard, weights], "mapped"), bias], "logits")

    def confidence(self, logits: ir.Value, branch: BranchWeights) -> ir.Value:
        """The weighted sum of the statistics; a weight of 0 costs nothing."""
        margin_weight, top_weight, entropy_weight = (float(weight) for weight in branch.statistics)
        top = self.numbers(2)
        largest = self._top(logits, top)  # (batch, 2)
        first, second = (
            self.op("Gather", [largest, self.constant(np.array(i, np.int64), "place")], "place", axis=1) for i in (0, 1)
        )
        terms = [(margin_weight, self.op("Sub", [first, second], "margin"))]
        # The margin alone, the usual rule, needs no softmax at the edge.
        if top_weight or entropy_weight:
            shares = self.op("Softmax", [logits], "shares", axis=1)
            logs = self.op("LogSoftmax", [logits], "logs", axis=1)
            axis = self.numbers(1)
            terms.append((top_weight, self.op("ReduceMax", [shares, axis], "top_share", keepdims=0)))
            products = self.op("Mul", [shares, logs], "products")
            terms.append((-entropy_weight, self.op("ReduceSum", [products, axis], "entropy", keepdims=0)))
        total = self.constant(np.array(branch.offset, np.float32), "offset")
        for index, (weight, term) in enumerate(terms):
            weighted = self.op("Mul", [term, self.constant(np.array(weight, np.float32), "weight")], "weighted")
            total = self.op("Add", [total, weighted], EXIT_CONFIDENCE if index == len(terms) - 1 else "sum")
        return total

    def _top(self, logits: ir.Value, count: ir.Value) -> ir.Value:
        # TopK has two outputs, and NodeWriter's nodes a single output.
        values, indices = (ir.Value(name=f"isthmus_exit_top_{name}") for name in ("values", "indices"))
        node = ir.node("TopK", [logits, count], {"axis": 1}, outputs=[values, indices], name="isthmus_exit_top")
        self.nodes.append(node)
        return values

    def scores(self, logits: ir.Value, output: TensorSpec, *, probabilities: bool) -> ir.Value:
        """The logits, or their softmax, in the shape and dtype of the model's output."""
        x = self.op("Softmax", [logits], "probabilities", axis=1) if probabilities else logits
        if further := len(output.shape) - 2:
            x = self.op("Unsqueeze", [x, self.numbers(*range(2, 2 + further))], "shaped")
        dtype = ir.DataType.from_numpy(DTYPES[output.dtype])
        return self.op("Cast", [x], EXIT_SCORES, to=dtype)


def _pool_macs(pool: TensorPool, spec: TensorSpec) -> int:
    """Multiplications of the cells' means, in a batch of 1; free sizes count as 1."""
    size = math.prod(size for size in spec.shape[1:] if isinstance(size, int))
    if pool.columns is None:
        return 0
    places, cells = pool.columns.shape
    rows = 0 if pool.rows is None else pool.rows.shape[0]
    return int((1 + pool.magnitudes) * (size * cells + size // places * cells * rows))
