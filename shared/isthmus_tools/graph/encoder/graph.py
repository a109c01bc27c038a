"""The ONNX graph of a sentence encoder of BERT's family: token ids and mask in, one vector for each text out.

A cut between two layers carries the residual stream `layer_N` (batch, tokens, width) and the mask. Pooling and
normalisation are nodes of the graph: the last segment responds with a vector and not with its tokens.

Sources: Devlin et al., arXiv 1810.04805; Reimers and Gurevych, arXiv 1908.10084.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus.artifacts.cuts import layer_cut
from isthmus_tools.graph.encoder.folder import EncoderSource, EncoderWeights
from isthmus_tools.graph.node_writer import NodeWriter, initialiser, written_model

IDS, MASK, VECTOR = "input_ids", "attention_mask", "embedding"
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
        model = _EncoderBuilder(source, weights).model()
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


class _EncoderBuilder(NodeWriter):
    def __init__(self, source: EncoderSource, weights: EncoderWeights) -> None:
        super().__init__()
        self._source, self._config, self._weights = source, source.config, weights
        self._constants: dict[str, ir.Value] = {}
        self._batch, self._tokens = ir.SymbolicDim("batch"), ir.SymbolicDim("tokens")

    def model(self) -> ir.Model:
        rows = ir.Shape([self._batch, self._tokens])
        ids, mask = (ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=rows) for name in (IDS, MASK))
        x = self._embedded(ids, mask)
        for i in range(self._config.num_hidden_layers):
            x = self._layer(i, x, mask)
        vector = self._vector(self._pooled(x, mask))
        vector.type = ir.TensorType(ir.DataType.FLOAT)
        vector.shape = ir.Shape([self._batch, self._config.hidden_size])
        return written_model([ids, mask], [vector], self.nodes, self._constants.values(), "sentence_encoder")

    def _embedded(self, ids: ir.Value, mask: ir.Value) -> ir.Value:
        words = self.node("Gather", [self._weight("embeddings.word_embeddings.weight"), ids], "words")
        axis, one = self._array("axis_one", np.array(1)), self._array("one", np.array(1))
        if first := self._config.first_position:
            # RoBERTa counts the tokens that are no padding.
            seen = self.node("Mul", [self.node("CumSum", [mask, axis], "counted"), mask], "counted_seen")
            places = self.node("Add", [seen, self._array("padding_position", np.array(first - 1))], "positions")
        else:
            # Of the ids' own shape: a range of their number would have a dimension without a name.
            ones = self.node("Add", [self.node("Sub", [ids, ids], "zeros"), one], "ones")
            places = self.node("CumSum", [ones, axis], "positions", exclusive=1)
        # All tokens are of the first kind, whose embedding joins that of the position.
        placed = self.node("Gather", [self._array("places.weight", self._places), places], "placed")
        return self._norm(self.node("Add", [words, placed], "embedded"), "embeddings.LayerNorm", layer_cut(0))

    def _places(self) -> Array:
        positions = self._weights.get("embeddings.position_embeddings.weight")
        table: Array = positions + self._weights.get("embeddings.token_type_embeddings.weight")[0]
        return table

    def _layer(self, i: int, x: ir.Value, mask: ir.Value) -> ir.Value:
        at = f"encoder.layer.{i}."
        output = self._linear(self._attended(x, mask, at), f"{at}attention.output.dense")
        residual = self.node("Add", [x, output], f"{at}residual")
        x = self._norm(residual, f"{at}attention.output.LayerNorm", f"{at}attention.out")
        fed = self._linear(self._activated(self._linear(x, f"{at}intermediate.dense"), at), f"{at}output.dense")
        return self._norm(self.node("Add", [x, fed], f"{at}fed"), f"{at}output.LayerNorm", layer_cut(i + 1))

    def _attended(self, x: ir.Value, mask: ir.Value, at: str) -> ir.Value:
        c = self._config
        size = c.hidden_size // c.num_attention_heads
        split = self._array("split_heads", np.array([0, 0, c.num_attention_heads, size]))
        # (batch, heads, tokens, size), keys with the last two turned
        query, key, value = (
            self.node(
                "Transpose",
                [self.node("Reshape", [self._linear(x, f"{at}attention.self.{name}"), split], f"{at}{name}_heads")],
                f"{at}{name}",
                perm=order,
            )
            for name, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
        )
        scale = self._array("scale", np.array(1 / math.sqrt(size), np.float32))
        scores = self.node("Mul", [self.node("MatMul", [query, key], f"{at}products"), scale], f"{at}scores")
        # The mask as a bias in each layer anew, since a common one would cross every cut beside the mask.
        columns = self.node("Unsqueeze", [mask, self._array("head_axes", np.array([1, 2]))], f"{at}mask_columns")
        is_seen = self.node("Cast", [columns], f"{at}is_seen", to=int(ir.DataType.BOOL))
        bounds = (self._array(name, np.array(n, np.float32)) for name, n in (("no_bias", 0), ("unseen", _UNSEEN)))
        biased = self.node("Add", [scores, self.node("Where", [is_seen, *bounds], f"{at}bias")], f"{at}biased")
        mixed = self.node("MatMul", [self.node("Softmax", [biased], f"{at}shares", axis=-1), value], f"{at}mixed")
        turned = self.node("Transpose", [mixed], f"{at}mixed_tokens", perm=[0, 2, 1, 3])
        return self.node("Reshape", [turned, self._array("join_heads", np.array([0, 0, c.hidden_size]))], f"{at}joined")

    def _activated(self, x: ir.Value, at: str) -> ir.Value:
        if (kind := self._config.hidden_act) == "relu":
            return self.node("Relu", [x], f"{at}relu")
        return self.node("Gelu", [x], f"{at}gelu", approximate=_GELU[kind])

    def _pooled(self, x: ir.Value, mask: ir.Value) -> ir.Value:
        """(batch, width) of (batch, tokens, width)."""
        if self._source.pooling == "cls":
            return self.node("Gather", [x, self._array("first_token", np.array(0))], "pooled", axis=1)
        axis = self._array("token_axis", np.array([1]))
        column = self.node("Unsqueeze", [mask, self._array("last_axis", np.array([-1]))], "mask_column")
        if self._source.pooling == "max":
            is_token = self.node("Cast", [column], "is_token", to=int(ir.DataType.BOOL))
            least = self._array("least", np.array(-1e9, np.float32))
            return self.node(
                "ReduceMax", [self.node("Where", [is_token, x, least], "tokens_alone"), axis], "pooled", keepdims=0
            )
        weights = self.node("Cast", [column], "token_weights", to=int(ir.DataType.FLOAT))
        total = self.node("ReduceSum", [self.node("Mul", [x, weights], "weighted"), axis], "total", keepdims=0)
        count = self.node("ReduceSum", [weights, axis], "seen_tokens", keepdims=0)
        divisor = self.node("Max", [count, self._array("min_count", np.array(_MIN_COUNT, np.float32))], "divisor")
        return self.node("Div", [total, divisor], "pooled")

    def _vector(self, pooled: ir.Value) -> ir.Value:
        if not self._source.normalized:
            return self.node("Identity", [pooled], VECTOR)
        length = self.node("ReduceL2", [pooled, self._array("width_axis", np.array([1]))], "length", keepdims=1)
        bounded = self.node("Max", [length, self._array("min_norm", np.array(_MIN_NORM, np.float32))], "norm")
        return self.node("Div", [pooled, bounded], VECTOR)

    def _norm(self, x: ir.Value, name: str, output: str) -> ir.Value:
        scale, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return self.node("LayerNormalization", [x, scale, bias], output, axis=-1, epsilon=self._config.layer_norm_eps)

    def _linear(self, x: ir.Value, name: str) -> ir.Value:
        matrix = self._array(f"{name}.weight", lambda: np.ascontiguousarray(self._weights.get(f"{name}.weight").T))
        y = self.node("MatMul", [x, matrix], f"{name}.out")
        return self.node("Add", [y, self._weight(f"{name}.bias")], f"{name}.biased")

    def _weight(self, name: str) -> ir.Value:
        return self._array(name, lambda: self._weights.get(name))

    def _array(self, name: str, array: Array | Callable[[], Array]) -> ir.Value:
        """A constant, read once."""
        if name not in self._constants:
            self._constants[name] = initialiser(ir.tensor(array() if callable(array) else array, name=name))
        return self._constants[name]
