"""The ONNX graph of a decoder: one graph for prefill and decoding, keys and values as pairs of inputs and outputs.

A cut between two layers carries one tensor, the residual stream `layer_N` (batch, tokens, width). Attention is
onnxruntime's GroupQueryAttention, which also rotates queries and keys, and takes rows of different lengths: row b of
the batch has `lengths[b]` + 1 tokens with the new ones, and its past fills the first places of `past_key.N`.

Sources: GroupQueryAttention of onnxruntime (ContribOperators); Touvron et al., arXiv 2302.13971 (Llama);
Radford et al., 2019 (GPT-2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus_tools.graph.decoder.config import DecoderSource

IDS, LENGTHS, TOTAL, LOGITS = "input_ids", "lengths", "total", "logits"
BOUNDARY = "layer_"
_MICROSOFT = "com.microsoft"
_OPSET = 21
_IR_VERSION = 10
_Shape: TypeAlias = list[int | ir.SymbolicDim]


def boundary(layer: int) -> str:
    """The name of the residual stream behind the first `layer` layers, and so of the cut there."""
    return f"{BOUNDARY}{layer}"


def state_pairs(layers: int) -> list[tuple[str, str]]:
    """The names of the state: each input with past keys or values, and the output that extends it."""
    return [(f"past_{kind}.{i}", f"present_{kind}.{i}") for i in range(layers) for kind in ("key", "value")]


def write(decoder: DecoderSource, path: Path) -> None:
    """Write the decoder's graph to `path`, and its weights beside it, each read when it is written.

    Shapes: input_ids (batch, tokens) int64; lengths (batch,) int32, tokens of each row less one; total () int32, the
    longest row; past_key.N and past_value.N (batch, KV heads, past, head size); logits (batch, tokens, vocabulary).

    Raises:
        ModelError: a tensor is missing, or has another shape than the configuration says.
        OSError: the files cannot be written.
    """
    model = ir.Model(_GraphBuilder(decoder).graph(), ir_version=_IR_VERSION, producer_name="isthmus")
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


class _GraphBuilder:
    def __init__(self, decoder: DecoderSource) -> None:
        self._config, self._weights = decoder.config, decoder.weights
        self._nodes: list[ir.Node] = []
        self._constants: dict[str, ir.Value] = {}
        self._batch, self._tokens = ir.SymbolicDim("batch"), ir.SymbolicDim("tokens")

    def graph(self) -> ir.Graph:
        c = self._config
        ids = _value(IDS, ir.DataType.INT64, [self._batch, self._tokens])
        self._lengths = _value(LENGTHS, ir.DataType.INT32, [self._batch])
        self._total = _value(TOTAL, ir.DataType.INT32, [])
        inputs, outputs = [ids, self._lengths, self._total], []
        x = self._embedded(ids)
        for i in range(c.layers):
            pasts, presents, x = self._layer(i, x)
            inputs += pasts
            outputs += presents
        logits = self._logits(x)
        return ir.Graph(
            inputs,
            [*outputs, logits],
            nodes=self._nodes,
            initializers=list(self._constants.values()),
            opset_imports={"": _OPSET, _MICROSOFT: 1},
            name="decoder",
        )

    def _embedded(self, ids: ir.Value) -> ir.Value:
        x = self._op("Gather", [self._weight("token_embd.weight"), ids], "embedded")
        if self._config.family != "gpt2":
            return x
        # Learned positions: those of the new tokens end at each row's length.
        tokens = self._op("Shape", [ids], "token_shape", start=1, end=2)
        count = self._op("Squeeze", [tokens], "token_count")
        one = self._array("one", np.array(1))
        steps = self._op("Range", [self._array("zero", np.array(0)), count, one], "steps")
        last = self._op("Cast", [self._lengths], "last_positions", to=int(ir.DataType.INT64))
        rows = self._op("Unsqueeze", [last, self._array("axis_1", np.array([1]))], "last_column")
        first = self._op("Sub", [self._op("Add", [rows, one], "row_lengths"), count], "first_positions")
        places = self._op("Add", [first, steps], "positions")
        placed = self._op("Gather", [self._weight("position_embd.weight"), places], "placed")
        return self._op("Add", [x, placed], "start")

    def _layer(self, i: int, x: ir.Value) -> tuple[list[ir.Value], list[ir.Value], ir.Value]:
        c, at = self._config, f"blk.{i}."
        normed = self._norm(x, at + "attn_norm")
        if c.family == "gpt2":
            qkv = self._linear(normed, at + "attn_qkv", bias=True)
        else:
            names = [at + f"attn_{k}" for k in "qkv"]
            qkv = self._op(
                "MatMul", [normed, self._joined(at + "attn_qkv.weight", [f"{n}.weight" for n in names])], at + "qkv"
            )
            if c.qkv_bias:
                bias = self._joined(at + "attn_qkv.bias", [f"{n}.bias" for n in names])
                qkv = self._op("Add", [qkv, bias], at + "qkv_biased")
        shape: _Shape = [self._batch, c.kv_heads, ir.SymbolicDim("past"), c.head_size]
        longer: _Shape = [self._batch, c.kv_heads, ir.SymbolicDim("present"), c.head_size]
        pasts = [_value(f"past_{k}.{i}", ir.DataType.FLOAT, shape) for k in ("key", "value")]
        presents = [_value(f"present_{k}.{i}", ir.DataType.FLOAT, longer) for k in ("key", "value")]
        # GPT-2 adds learned positions to the embedding instead.
        rotary = c.family != "gpt2"
        cosine = [self._rotation("cosine", np.cos), self._rotation("sine", np.sin)] if rotary else []
        attended = _value(at + "attended")
        self._nodes.append(
            ir.node(
                "GroupQueryAttention",
                [qkv, None, None, *pasts, self._lengths, self._total, *cosine],
                {"num_heads": c.heads, "kv_num_heads": c.kv_heads, "do_rotary": int(rotary), "rotary_interleaved": 0},
                domain=_MICROSOFT,
                outputs=[attended, *presents],
                name=at + "attention",
            )
        )
        x = self._op("Add", [x, self._linear(attended, at + "attn_output", bias=c.family == "gpt2")], at + "residual")
        normed = self._norm(x, at + "ffn_norm")
        fed = self._gpt2_ffn(normed, at) if c.family == "gpt2" else self._gated_ffn(normed, at)
        stream = self._op("Add", [x, fed], boundary(i + 1))
        stream.type, stream.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([self._batch, self._tokens, c.width])
        return pasts, presents, stream

    def _gated_ffn(self, x: ir.Value, at: str) -> ir.Value:
        gate, up = self._linear(x, at + "ffn_gate"), self._linear(x, at + "ffn_up")
        silu = self._op("Mul", [gate, self._op("Sigmoid", [gate], at + "sigmoid")], at + "silu")
        return self._linear(self._op("Mul", [silu, up], at + "gated"), at + "ffn_down")

    def _gpt2_ffn(self, x: ir.Value, at: str) -> ir.Value:
        up = self._linear(x, at + "ffn_up", bias=True)
        return self._linear(self._op("Gelu", [up], at + "gelu", approximate="tanh"), at + "ffn_down", bias=True)

    def _logits(self, x: ir.Value) -> ir.Value:
        normed = self._norm(x, "output_norm")
        # Transposed when a session is made: the file holds a tied matrix once.
        matrix = self._weight("token_embd.weight" if self._config.tied else "output.weight")
        turned = self._op("Transpose", [matrix], "output_matrix", perm=[1, 0])
        logits = _value(LOGITS, ir.DataType.FLOAT, [self._batch, self._tokens, self._config.vocabulary])
        self._nodes.append(ir.node("MatMul", [normed, turned], outputs=[logits], name=LOGITS))
        return logits

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        c = self._config
        if c.family == "gpt2":
            scale, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
            return self._op("LayerNormalization", [x, scale, bias], f"{name}.out", axis=-1, epsilon=c.epsilon)
        # onnxruntime keeps this operator in the standard domain; RMSNormalization of opset 23 is the same.
        scale = self._weight(f"{name}.weight")
        return self._op(
            "SimplifiedLayerNormalization", [x, scale], f"{name}.out", axis=-1, epsilon=c.epsilon, stash_type=1
        )

    def _linear(self, x: ir.Value, name: str, *, bias: bool = False) -> ir.Value:
        y = self._op("MatMul", [x, self._joined(f"{name}.weight", [f"{name}.weight"])], f"{name}.out")
        return self._op("Add", [y, self._weight(f"{name}.bias")], f"{name}.biased") if bias else y

    def _joined(self, name: str, parts: list[str]) -> ir.Value:
        """The matrices of these parts side by side, (in, out)."""

        def read() -> Array:
            return np.ascontiguousarray(np.concatenate([self._weights.get(part) for part in parts]).T)

        return self._array(name, read)

    def _rotation(self, name: str, function: Callable[[Array], Array]) -> ir.Value:
        c = self._config
        frequencies = 1 / c.rope_theta ** (np.arange(0, c.head_size, 2) / c.head_size)
        return self._array(name, function(np.outer(np.arange(c.context), frequencies)).astype(np.float32))

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
        value = _value(output)
        self._nodes.append(ir.node(kind, inputs, attributes, outputs=[value], name=output))
        return value


def _value(name: str, dtype: ir.DataType | None = None, shape: _Shape | None = None) -> ir.Value:
    return ir.Value(
        name=name,
        type=None if dtype is None else ir.TensorType(dtype),
        shape=None if shape is None else ir.Shape(shape),
    )
