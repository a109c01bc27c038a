"""The ONNX graph of a sentence encoder of BERT's family: token ids and mask in, one vector for each text out.

A cut between two layers carries the residual stream `layer_N` (batch, tokens, width) and the mask. Pooling and
normalisation are nodes of the graph: the last segment responds with a vector and not with its tokens.

Sources: Devlin et al., arXiv 1810.04805; Reimers and Gurevych, arXiv 1908.10084.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus.artifacts.cuts import layer_cut
from isthmus_tools.graph.encoder.folder import EncoderSource, EncoderWeights

IDS, MASK, VECTOR = "input_ids", "attention_mask", "embedding"
_OPSET, _IR_VERSION = 21, 10
# sentence-transformers' own: a row without tokens gives zeros and no division by zero.
_MIN_COUNT, _MIN_NORM = 1e-9, 1e-12
# Added to the scores of padding: a share of exactly zero behind the softmax.
_UNSEEN = -1e9
_GELU = {"gelu": "none", "gelu_new": "tanh"}


def write(source: EncoderSource, path: Path) -> None:
    """Write the encoder's graph to `path`, and its weights beside it.

    Shapes: input_ids and attention_mask (batch, tokens) int64; embedding (batch, width) float32.

    Raises:
        ModelError: a tensor is missing.
        OSError: the files cannot be written.
    """
    with source.weights() as weights:
        model = ir.Model(_EncoderBuilder(source, weights).graph(), ir_version=_IR_VERSION, producer_name="isthmus")
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


class _EncoderBuilder:
    def __init__(self, source: EncoderSource, weights: EncoderWeights) -> None:
        self._source, self._config, self._weights = source, source.config, weights
        self._nodes: list[ir.Node] = []
        self._constants: dict[str, ir.Value] = {}
        self._batch, self._tokens = ir.SymbolicDim("batch"), ir.SymbolicDim("tokens")

    def graph(self) -> ir.Graph:
        rows = ir.Shape([self._batch, self._tokens])
        ids, mask = (ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=rows) for name in (IDS, MASK))
        x = self._embedded(ids, mask)
        for i in range(self._config.num_hidden_layers):
            x = self._layer(i, x, mask)
        vector = self._vector(self._pooled(x, mask))
        vector.type = ir.TensorType(ir.DataType.FLOAT)
        vector.shape = ir.Shape([self._batch, self._config.hidden_size])
        return ir.Graph(
            [ids, mask],
            [vector],
            nodes=self._nodes,
            initializers=list(self._constants.values()),
            opset_imports={"": _OPSET},
            name="sentence_encoder",
        )

    def _embedded(self, ids: ir.Value, mask: ir.Value) -> ir.Value:
        words = self._op("Gather", [self._weight("embeddings.word_embeddings.weight"), ids], "words")
        axis, one = self._array("axis_one", np.array(1)), self._array("one", np.array(1))
        if first := self._config.first_position:
            # RoBERTa counts the tokens that are no padding.
            seen = self._op("Mul", [self._op("CumSum", [mask, axis], "counted"), mask], "counted_seen")
            places = self._op("Add", [seen, self._array("padding_position", np.array(first - 1))], "positions")
        else:
            # Of the ids' own shape: a range of their number would have a dimension without a name.
            ones = self._op("Add", [self._op("Sub", [ids, ids], "zeros"), one], "ones")
            places = self._op("CumSum", [ones, axis], "positions", exclusive=1)
        # All tokens are of the first kind, whose embedding joins that of the position.
        placed = self._op("Gather", [self._array("places.weight", self._places), places], "placed")
        return self._norm(self._op("Add", [words, placed], "embedded"), "embeddings.LayerNorm", layer_cut(0))

    def _places(self) -> Array:
        positions = self._weights.get("embeddings.position_embeddings.weight")
        table: Array = positions + self._weights.get("embeddings.token_type_embeddings.weight")[0]
        return table

    def _layer(self, i: int, x: ir.Value, mask: ir.Value) -> ir.Value:
        at = f"encoder.layer.{i}."
        output = self._linear(self._attended(x, mask, at), f"{at}attention.output.dense")
        residual = self._op("Add", [x, output], f"{at}residual")
        x = self._norm(residual, f"{at}attention.output.LayerNorm", f"{at}attention.out")
        fed = self._linear(self._activated(self._linear(x, f"{at}intermediate.dense"), at), f"{at}output.dense")
        return self._norm(self._op("Add", [x, fed], f"{at}fed"), f"{at}output.LayerNorm", layer_cut(i + 1))

    def _attended(self, x: ir.Value, mask: ir.Value, at: str) -> ir.Value:
        c = self._config
        size = c.hidden_size // c.num_attention_heads
        split = self._array("split_heads", np.array([0, 0, c.num_attention_heads, size]))
        # (batch, heads, tokens, size), keys with the last two turned
        query, key, value = (
            self._op(
                "Transpose",
                [self._op("Reshape", [self._linear(x, f"{at}attention.self.{name}"), split], f"{at}{name}_heads")],
                f"{at}{name}",
                perm=order,
            )
            for name, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
        )
        scale = self._array("scale", np.array(1 / math.sqrt(size), np.float32))
        scores = self._op("Mul", [self._op("MatMul", [query, key], f"{at}products"), scale], f"{at}scores")
        # The mask as a bias in each layer anew, since a common one would cross every cut beside the mask.
        columns = self._op("Unsqueeze", [mask, self._array("head_axes", np.array([1, 2]))], f"{at}mask_columns")
        is_seen = self._op("Cast", [columns], f"{at}is_seen", to=int(ir.DataType.BOOL))
        bounds = (self._array(name, np.array(n, np.float32)) for name, n in (("no_bias", 0), ("unseen", _UNSEEN)))
        biased = self._op("Add", [scores, self._op("Where", [is_seen, *bounds], f"{at}bias")], f"{at}biased")
        mixed = self._op("MatMul", [self._op("Softmax", [biased], f"{at}shares", axis=-1), value], f"{at}mixed")
        turned = self._op("Transpose", [mixed], f"{at}mixed_tokens", perm=[0, 2, 1, 3])
        return self._op("Reshape", [turned, self._array("join_heads", np.array([0, 0, c.hidden_size]))], f"{at}joined")

    def _activated(self, x: ir.Value, at: str) -> ir.Value:
        if (kind := self._config.hidden_act) == "relu":
            return self._op("Relu", [x], f"{at}relu")
        return self._op("Gelu", [x], f"{at}gelu", approximate=_GELU[kind])

    def _pooled(self, x: ir.Value, mask: ir.Value) -> ir.Value:
        """(batch, width) of (batch, tokens, width)."""
        if self._source.pooling == "cls":
            return self._op("Gather", [x, self._array("first_token", np.array(0))], "pooled", axis=1)
        axis = self._array("token_axis", np.array([1]))
        column = self._op("Unsqueeze", [mask, self._array("last_axis", np.array([-1]))], "mask_column")
        if self._source.pooling == "max":
            is_token = self._op("Cast", [column], "is_token", to=int(ir.DataType.BOOL))
            least = self._array("least", np.array(-1e9, np.float32))
            return self._op(
                "ReduceMax", [self._op("Where", [is_token, x, least], "tokens_alone"), axis], "pooled", keepdims=0
            )
        weights = self._op("Cast", [column], "token_weights", to=int(ir.DataType.FLOAT))
        total = self._op("ReduceSum", [self._op("Mul", [x, weights], "weighted"), axis], "total", keepdims=0)
        count = self._op("ReduceSum", [weights, axis], "seen_tokens", keepdims=0)
        divisor = self._op("Max", [count, self._array("min_count", np.array(_MIN_COUNT, np.float32))], "divisor")
        return self._op("Div", [total, divisor], "pooled")

    def _vector(self, pooled: ir.Value) -> ir.Value:
        if not self._source.normalized:
            return self._op("Identity", [pooled], VECTOR)
        length = self._op("ReduceL2", [pooled, self._array("width_axis", np.array([1]))], "length", keepdims=1)
        bounded = self._op("Max", [length, self._array("min_norm", np.array(_MIN_NORM, np.float32))], "norm")
        return self._op("Div", [pooled, bounded], VECTOR)

    def _norm(self, x: ir.Value, name: str, output: str) -> ir.Value:
        scale, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return self._op("LayerNormalization", [x, scale, bias], output, axis=-1, epsilon=self._config.layer_norm_eps)

    def _linear(self, x: ir.Value, name: str) -> ir.Value:
        matrix = self._array(f"{name}.weight", lambda: np.ascontiguousarray(self._weights.get(f"{name}.weight").T))
        y = self._op("MatMul", [x, matrix], f"{name}.out")
        return self._op("Add", [y, self._weight(f"{name}.bias")], f"{name}.biased")

    def _weight(self, name: str) -> ir.Value:
        return self._array(name, lambda: self._weights.get(name))

    def _array(self, name: str, array: Array | Callable[[], Array]) -> ir.Value:
        """A constant, read once."""
        if name not in self._constants:
            tensor = ir.tensor(array() if callable(array) else array, name=name)
            self._constants[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self._constants[name]

    def _op(self, kind: str, inputs: Sequence[ir.Value], output: str, **attributes: Any) -> ir.Value:
        value = ir.Value(name=output)
        self._nodes.append(ir.node(kind, inputs, attributes, outputs=[value], name=output))
        return value
