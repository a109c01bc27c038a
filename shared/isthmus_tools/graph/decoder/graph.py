"""The ONNX graph of a decoder: one graph for prefill and decoding, keys and values as pairs of inputs and outputs.

A cut between two layers carries one tensor, the residual stream `layer_N` (batch, tokens, width). Attention is
onnxruntime's GroupQueryAttention, which also rotates queries and keys, and takes rows of different lengths: row b of
the batch has `lengths[b]` + 1 tokens with the new ones, and its past fills the first places of `past_key.N`.

Sources: GroupQueryAttention of onnxruntime (ContribOperators); Touvron et al., arXiv 2302.13971 (Llama);
Radford et al., 2019 (GPT-2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from msgspec import UNSET

from isthmus.arrays import Array, supplied_inputs
from isthmus.artifacts.cuts import layer_cut
from isthmus.artifacts.state import State, StatePair
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ModelError
from isthmus_tools.graph.decoder.config import DecoderConfig, DecoderSource, Precision
from isthmus_tools.graph.decoder.initialisers import MatrixPart
from isthmus_tools.graph.decoder.products import Products
from isthmus_tools.graph.model import Model, open_model
from isthmus_tools.graph.node_writer import MICROSOFT, written_model

IDS, LENGTHS, TOTAL, SCORED, LOGITS = "input_ids", "lengths", "total", "scored", "logits"
_EMBEDDING = "token_embd.weight"
# Sizes of the example that bytes and work are counted for; 1 could be taken for a constant.
EXAMPLE_TOKENS, _EXAMPLE_PAST = 5, 3
_Shape: TypeAlias = list[int | ir.SymbolicDim]


def declared_state(config: DecoderConfig) -> State:
    """The state that the graph of such a decoder declares."""
    kinds = [(kind, layer) for layer in range(config.layers) for kind in ("key", "value")]
    pairs = tuple(StatePair(f"past_{kind}.{i}", f"present_{kind}.{i}") for kind, i in kinds)
    return State(pairs, IDS, LENGTHS, TOTAL, config.context, scored=SCORED)


def write(
    decoder: DecoderSource, precisions: Sequence[Precision], path: Path, progress: Callable[[int, int], None]
) -> None:
    """Write the decoder's graph to `path`, and its weights beside it, each read when it is written.

    `precisions` are of the layers; the embedding has that of the first, the output matrix that of the last, int8 in
    place of int4, and a tied matrix is stored once where these are the same.

    Shapes: input_ids (batch, tokens) int64; lengths (batch,) int32, tokens of each row less one; total () int32, the
    longest row; scored () int64, the last positions to score; past_key.N and past_value.N (batch, KV heads, past, head
    size); logits (batch, scored, vocabulary).

    Raises:
        ModelError: a tensor is missing, or has another shape than the configuration says.
        OSError: the files cannot be written.
    """
    model = _GraphBuilder(decoder, precisions).model()
    ir.save(
        model,
        path,
        external_data=f"{path.name}.data",
        size_threshold_bytes=1024,
        callback=lambda tensor, info: progress(info.index + 1, info.total),
    )


def opened(
    path: Path, state: State, width: int, vocabulary: int, head: tuple[int, int], *, normalise: bool = True
) -> Model:
    """A written graph; `head` are the heads of keys and values, and their size.

    Raises:
        ModelError: the graph cannot be read.
    """
    model = open_model(path, examples=_examples(state, *head), state=state, normalise=normalise)
    # ONNX's shape inference ends at GroupQueryAttention: sizes that the import knows complete the specs.
    rows = ("batch", "tokens")
    present = ("batch", head[0], "present", head[1])
    specs = {name: TensorSpec(name, "float32", present) for name in state.outputs}
    for layer in range(1, len(state.pairs) // 2):
        specs[layer_cut(layer)] = TensorSpec(layer_cut(layer), "float32", (*rows, width))
    # Bundles without the input score all positions.
    scored = "tokens" if state.scored is UNSET else SCORED
    specs[LOGITS] = TensorSpec(LOGITS, "float32", ("batch", scored, vocabulary))
    return replace(model, specs={**model.specs, **specs})


class _GraphBuilder:
    def __init__(self, decoder: DecoderSource, precisions: Sequence[Precision]) -> None:
        self._config, self._precisions = decoder.config, precisions
        self._products = Products(decoder.weights)
        self._node, self._constant = self._products.node, self._products.constant
        self._batch, self._tokens = ir.SymbolicDim("batch"), ir.SymbolicDim("tokens")

    def model(self) -> ir.Model:
        c = self._config
        ids = _value(IDS, ir.DataType.INT64, [self._batch, self._tokens])
        self._lengths = _value(LENGTHS, ir.DataType.INT32, [self._batch])
        self._total = _value(TOTAL, ir.DataType.INT32, [])
        self._scored = _value(SCORED, ir.DataType.INT64, [])
        inputs, outputs = [ids, self._lengths, self._total, self._scored], []
        x = self._embedded(ids)
        for i in range(c.layers):
            pasts, presents, x = self._layer(i, x)
            inputs += pasts
            outputs += presents
        logits = self._logits(self._last(x))
        # A bias or a norm that this graph lacks would be left out without a sign.
        if unknown := self._products.initialisers.unused():
            raise ModelError(
                f"the model has the tensor {unknown[0]}, which decoders of the family {c.family} do not have here",
                tensors=unknown[:8],
            )
        constants = self._products.initialisers.values.values()
        return written_model(inputs, [*outputs, logits], self._products.nodes, constants, "decoder")

    def _embedded(self, ids: ir.Value) -> ir.Value:
        c, precision = self._config, _of_tables(self._precisions[0])
        x = self._products.rows(_EMBEDDING, ids, (c.vocabulary, c.width), precision, "embedded")
        if c.family != "gpt2":
            return x
        # Learned positions: those of the new tokens end at each row's length.
        tokens = self._node("Shape", [ids], "token_shape", start=1, end=2)
        count = self._node("Squeeze", [tokens], "token_count")
        one = self._constant("one", np.array(1))
        steps = self._node("Range", [self._constant("zero", np.array(0)), count, one], "steps")
        last = self._node("Cast", [self._lengths], "last_positions", to=int(ir.DataType.INT64))
        rows = self._node("Unsqueeze", [last, self._constant("axis_1", np.array([1]))], "last_column")
        first = self._node("Sub", [self._node("Add", [rows, one], "row_lengths"), count], "first_positions")
        places = self._node("Add", [first, steps], "positions")
        # The positions of a context are few beside a vocabulary, so that these stay precise.
        half: Precision = "float32" if precision == "float32" else "float16"
        placed = self._products.rows("position_embd.weight", places, (c.context, c.width), half, "placed")
        return self._node("Add", [x, placed], "start")

    def _layer(self, i: int, x: ir.Value) -> tuple[list[ir.Value], list[ir.Value], ir.Value]:
        c, at, precision = self._config, f"blk.{i}.", self._precisions[i]
        queries, keys = c.heads * c.head_size, c.kv_heads * c.head_size
        qkv = self._joined_attention(self._norm(x, at + "attn_norm"), at, (queries, keys), precision)
        shape: _Shape = [self._batch, c.kv_heads, ir.SymbolicDim("past"), c.head_size]
        longer: _Shape = [self._batch, c.kv_heads, ir.SymbolicDim("present"), c.head_size]
        pasts = [_value(f"past_{k}.{i}", ir.DataType.FLOAT, shape) for k in ("key", "value")]
        presents = [_value(f"present_{k}.{i}", ir.DataType.FLOAT, longer) for k in ("key", "value")]
        # GPT-2 adds learned positions to the embedding instead.
        rotary = c.family != "gpt2"
        cosine = [self._rotation("cosine", np.cos), self._rotation("sine", np.sin)] if rotary else []
        attended = _value(at + "attended")
        self._products.nodes.append(
            ir.node(
                "GroupQueryAttention",
                [qkv, None, None, *pasts, self._lengths, self._total, *cosine],
                {"num_heads": c.heads, "kv_num_heads": c.kv_heads, "do_rotary": int(rotary), "rotary_interleaved": 0},
                domain=MICROSOFT,
                outputs=[attended, *presents],
                name=at + "attention",
            )
        )
        x = self._node(
            "Add", [x, self._linear(attended, at + "attn_output", c.width, queries, precision)], at + "residual"
        )
        feed = self._gpt2_ffn if c.family == "gpt2" else self._gated_ffn
        stream = _value(layer_cut(i + 1), ir.DataType.FLOAT, [self._batch, self._tokens, c.width])
        self._node("Add", [x, feed(self._norm(x, at + "ffn_norm"), at, precision)], stream)
        return pasts, presents, stream

    def _joined_attention(self, x: ir.Value, at: str, rows: tuple[int, int], precision: Precision) -> ir.Value:
        """Queries, keys and values by one product. Shapes: (batch, tokens, queries + keys + values)."""
        queries, keys = rows
        parts = [MatrixPart(at + f"attn_{k}", size) for k, size in zip("qkv", (queries, keys, keys), strict=True)]
        if self._config.family == "gpt2":
            parts = [MatrixPart(at + "attn_qkv", queries + 2 * keys)]
        weights, biases = ([MatrixPart(f"{p.name}.{kind}", p.rows) for p in parts] for kind in ("weight", "bias"))
        y = self._products.product(x, at + "attn_qkv", weights, self._config.width, precision)
        if not self._config.qkv_bias:
            return y
        bias = self._products.initialisers.vector(at + "attn_qkv.bias", biases)
        return self._node("Add", [y, bias], at + "qkv_biased")

    def _gated_ffn(self, x: ir.Value, at: str, precision: Precision) -> ir.Value:
        width, ffn = self._config.width, self._config.ffn
        gate, up = (self._linear(x, at + name, ffn, width, precision) for name in ("ffn_gate", "ffn_up"))
        silu = self._node("Mul", [gate, self._node("Sigmoid", [gate], at + "sigmoid")], at + "silu")
        return self._linear(self._node("Mul", [silu, up], at + "gated"), at + "ffn_down", width, ffn, precision)

    def _gpt2_ffn(self, x: ir.Value, at: str, precision: Precision) -> ir.Value:
        width, ffn = self._config.width, self._config.ffn
        up = self._linear(x, at + "ffn_up", ffn, width, precision)
        gelu = self._node("Gelu", [up], at + "gelu", approximate="tanh")
        return self._linear(gelu, at + "ffn_down", width, ffn, precision)

    def _last(self, x: ir.Value) -> ir.Value:
        """The last positions, to score: of a chunk of a prompt one is sampled. Shapes: (batch, scored, width)."""
        axis = self._constant("axis_1", np.array([1]))
        first = self._node("Neg", [self._node("Reshape", [self._scored, axis], "scored_row")], "first_scored")
        end = self._constant("no_end", np.array([np.iinfo(np.int64).max]))
        return self._node("Slice", [x, first, end, axis], "last")

    def _logits(self, x: ir.Value) -> ir.Value:
        c = self._config
        shape: _Shape = [self._batch, ir.SymbolicDim(SCORED), c.vocabulary]
        logits = _value(LOGITS, ir.DataType.FLOAT, shape)
        name = _EMBEDDING if c.tied else "output.weight"
        precision = _of_tables(self._precisions[-1])
        return self._products.scores(self._norm(x, "output_norm"), name, (c.vocabulary, c.width), precision, logits)

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        c = self._config
        scale = self._vector(f"{name}.weight", c.width)
        if c.family == "gpt2":
            inputs = [x, scale, self._vector(f"{name}.bias", c.width)]
            return self._node("LayerNormalization", inputs, f"{name}.out", axis=-1, epsilon=c.epsilon)
        # onnxruntime keeps this operator in the standard domain; RMSNormalization of opset 23 is the same.
        return self._node(
            "SimplifiedLayerNormalization", [x, scale], f"{name}.out", axis=-1, epsilon=c.epsilon, stash_type=1
        )

    def _linear(self, x: ir.Value, name: str, rows: int, inputs: int, precision: Precision) -> ir.Value:
        y = self._products.product(x, name, [MatrixPart(f"{name}.weight", rows)], inputs, precision)
        # Of the three families GPT-2 alone has biases here.
        if self._config.family != "gpt2":
            return y
        return self._node("Add", [y, self._vector(f"{name}.bias", rows)], f"{name}.biased")

    def _vector(self, name: str, size: int) -> ir.Value:
        return self._products.initialisers.vector(name, [MatrixPart(name, size)])

    def _rotation(self, name: str, function: Callable[[Array], Array]) -> ir.Value:
        c = self._config
        frequencies = 1 / c.rope_theta ** (np.arange(0, c.head_size, 2) / c.head_size)
        if c.rope_factors:
            frequencies /= np.array(c.rope_factors)
        return self._constant(name, function(np.outer(np.arange(c.context), frequencies)).astype(np.float32))


def _examples(state: State, kv_heads: int, head_size: int) -> dict[str, Array]:
    past = np.zeros((1, kv_heads, _EXAMPLE_PAST, head_size), np.float32)
    return {
        state.tokens: np.zeros((1, EXAMPLE_TOKENS), np.int64),
        **supplied_inputs(state, np.array([_EXAMPLE_PAST + EXAMPLE_TOKENS - 1], np.int32), EXAMPLE_TOKENS),
        **{pair.past: past for pair in state.pairs},
    }


def _of_tables(precision: Precision) -> Precision:
    """The precision of the embedding and the output matrix beside layers of `precision`.

    4 bits there cost nearly as much perplexity as 4 bits in all layers.
    """
    return "int8" if precision == "int4" else precision


def _value(name: str, dtype: ir.DataType | None = None, shape: _Shape | None = None) -> ir.Value:
    return ir.Value(
        name=name,
        type=None if dtype is None else ir.TensorType(dtype),
        shape=None if shape is None else ir.Shape(shape),
    )
