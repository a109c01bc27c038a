"""Post-training quantisation by onnxruntime's own tools: an int8 variant of a model, or weights alone in blocks.

The only importer of onnxruntime.quantization. Source: onnxruntime.ai/docs/performance/model-optimizations/quantization.
"""

from __future__ import annotations

import logging
import platform
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus_tools.graph.channel_groups import constant_of, is_flag, is_plain_gemm
from isthmus_tools.graph.hard_swish import fuse_hard_swishes
from isthmus_tools.graph.node_writer import MICROSOFT, NodeWriter, initialiser

_LOGGERS = ("onnxruntime.quantization", "root")
# Nearly all of the work. Quantised softmax, normalisations and sums change predictions and save no time.
_OPERATORS = ("Conv", "MatMul", "Gemm")
# Quantised to, they vanish: the range of 8 bits does what they do. Otherwise the layer before would be quantised over
# values that they cut off; the head of EfficientNet-Lite0 at node 65 had an error of 49% at its cut.
_CLIPS = ("Clip", "Relu")
BLOCK = 32
"""Weights of a matrix's inputs that share a scale and a zero point, as in GGUF's 4-bit formats."""
# The first opset whose QuantizeLinear has a scale per channel.
_MIN_OPSET = 13
_MAX_REASON = 300


class Quantiser:
    """A model prepared for int8, calibrated once: activation ranges are measured at the first write.

    8-bit weights and activations stand between QDQ pairs; weights of convolutions and matrix products are quantised
    per channel. Where this CPU would saturate sums of 8-bit products, weights have 7 bits.
    """

    def __init__(
        self, whole: Path, inputs: Iterable[Mapping[str, Array]], folder: Path, *, reduce_range: bool | None = None
    ) -> None:
        """Prepare the ONNX model at `whole`; `inputs` are real samples, read once, `folder` is empty.

        `reduce_range` says whether weights have 7 bits; None asks this machine's CPU.

        Raises:
            ModelError: onnxruntime's tools are missing, or cannot read this model.
        """
        self._tools, self._inputs, self._folder = _quantization(), inputs, folder
        self._reduce_range = saturates() if reduce_range is None else reduce_range
        self._prepared = folder / "prepared.onnx"
        single = folder / "whole.onnx"
        with _refusals(), _quiet():
            # In a single file: the tools treat weights beside the graph differently by folder.
            onnx.save(onnx.load(whole), single)
            self._tools.shape_inference.quant_pre_process(str(single), str(self._prepared), skip_symbolic_shape=True)
            _raise_opset(self._prepared)
            fuse_hard_swishes(self._prepared)
            nodes = onnx.load(self._prepared, load_external_data=False).graph.node
        single.unlink()
        self.layers = tuple(node.name for node in nodes if node.op_type in _OPERATORS and node.name)
        """Names of the operators that are quantised."""

    def write(self, out: Path, in_float: int = 0) -> Path:
        """Write the int8 model to `out`; so many of its first layers stay in float.

        Layers in float elsewhere would take the int8 of their neighbours: two in the middle of EfficientNet-Lite0's
        head cost 80% more time, the first two none.

        Raises:
            ModelError: the tools cannot quantise this model.
        """
        if not self.layers:
            raise ModelError(f"the graph has no layers to quantise: {', '.join(_OPERATORS)}")
        with _refusals(), _quiet():
            self._tools.quantize_static(
                str(self._prepared),
                str(out),
                _reader(self._tools, self._inputs),
                quant_format=self._tools.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=self._reduce_range,
                op_types_to_quantize=[*_OPERATORS, *_CLIPS],
                nodes_to_exclude=list(self.layers[:in_float]),
                activation_type=self._tools.QuantType.QUInt8,
                weight_type=self._tools.QuantType.QInt8,
                # Ranges do not depend on which layers are quantised.
                calibration_cache_path=self._folder / "ranges.json",
            )
            if in_float:
                _read_unquantised(out, self.layers[:in_float])
        return out


def quantise(whole: Path, inputs: Sequence[Mapping[str, Array]], out: Path) -> Path:
    """Write the int8 variant of the ONNX model at `whole` to `out`: see `Quantiser`.

    `inputs` calibrate the activation ranges; pass at least a handful of real samples.

    Raises:
        ModelError: onnxruntime's tools are missing, `inputs` is empty, or the tools cannot quantise this model.
    """
    if not inputs:
        raise ModelError("quantising needs inputs to calibrate with")
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        return Quantiser(whole, inputs, Path(folder)).write(out)


def _read_unquantised(path: Path, layers: Collection[str]) -> None:
    """Let layers in float read values that were not quantised.

    Behind a DequantizeLinear onnxruntime 1.31 quantises the weights of such a layer itself, for the whole tensor: a
    depthwise convolution of EfficientNet-Lite0 raised the error at the cut from 11% to 39%.
    """
    model = onnx.load(path)
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        dequantised = producers.get(node.input[0]) if node.name in layers and node.input else None
        if dequantised is not None and dequantised.op_type == "DequantizeLinear":
            node.input[0] = producers[dequantised.input[0]].input[0]
    _drop_unread(model.graph, ("DequantizeLinear", "QuantizeLinear"))
    onnx.save(model, path)


def _drop_unread(graph: onnx.GraphProto, kinds: Sequence[str]) -> None:
    """Remove nodes of these kinds that nothing reads, and their constants; of a pair the second goes first."""
    results = {value.name for value in graph.output}
    for kind in kinds:
        read = {name for node in graph.node for name in node.input} | results
        for node in [n for n in graph.node if n.op_type == kind and not read & {*n.output}]:
            graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def saturates(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether sums of two products of uint8 and int8 saturate on this CPU: x86 without VNNI instructions.

    Source: github.com/microsoft/onnxruntime/issues/6004.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in cpuinfo.read_text()
    except OSError:  # no Linux: 7 bits are right everywhere
        return True


def linear_in_blocks(whole: Path, bits: int, out: Path) -> tuple[Path, int]:
    """Write the model with the weights of its matrix products as integers of `bits`, in blocks; and their number.

    Activations stay float: onnxruntime's MatMulNBits multiplies with the weights' own values.

    Raises:
        ModelError: no matrix product has constant float32 weights of a block's size, or the tools are missing.
    """
    model = ir.load(whole)
    layers = [layer for node in tuple(model.graph) if (layer := _linear(node)) is not None]
    if not layers:
        raise ModelError(
            "the graph has no linear layers (MatMul, Gemm) with float32 weights of their own",
            hint="convolutions take int8 or prune",
        )
    for node, matrix in layers:
        _replace_by_blocks(model.graph, node, matrix, bits)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    ir_passes.RemoveUnusedNodesPass()(model)
    ir.save(model, out)
    return out, len(layers)


def _linear(node: ir.Node) -> tuple[ir.Node, Array] | None:
    """A matrix product and its weights (inputs, rows); None for other nodes."""
    weight = constant_of(node, 1)
    plain_gemm = node.op_type == "Gemm" and is_plain_gemm(node)
    if node.domain or weight is None or weight.ndim != 2 or weight.dtype != np.float32:
        return None
    if node.op_type != "MatMul" and not plain_gemm:
        return None
    matrix = weight.T if plain_gemm and is_flag(node, "transB") else weight
    # Scales of a smaller matrix weigh as much as its weights.
    return (node, np.ascontiguousarray(matrix)) if min(matrix.shape) >= BLOCK else None


def _replace_by_blocks(graph: ir.Graph, node: ir.Node, matrix: Array, bits: int) -> None:
    packed, scales = quantise_blocks(matrix, bits)
    name, output = str(node.name), node.outputs[0]
    constants = [initialiser(ir.tensor(a, name=f"{name}_{kind}")) for kind, a in (("q", packed), ("scales", scales))]
    for constant in constants:
        graph.register_initializer(constant)
    writer = NodeWriter()
    sizes = {"K": matrix.shape[0], "N": matrix.shape[1], "bits": bits, "block_size": BLOCK}
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    product = writer.node("MatMulNBits", [node.inputs[0], *constants], f"{name}_product", **sizes)
    if bias is not None:
        product = writer.node("Add", [product, bias], f"{name}_sum")
    graph.insert_before(node, writer.nodes)
    replaced_name = str(output.name)
    ir.convenience.replace_all_uses_with(output, product, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    product.name = replaced_name


def quantise_blocks(matrix: Array, bits: int) -> tuple[Array, Array]:
    """A float32 matrix (inputs, rows) as packed integers of 4 or 8 bits and scales, by blocks of inputs.

    Shapes: as MatMulNBits takes them, (rows, blocks, BLOCK * bits / 8) uint8 and (rows, blocks) float32.

    Raises:
        ModelError: onnxruntime's tools are missing.
    """
    try:
        from isthmus.runtime import ort as runtime

        tools = runtime.block_quantization()
    except ImportError as e:
        raise ModelError(f"quantising needs {e.name}", hint="pip install isthmus_tools") from e
    # Symmetric: a rounded zero point shifts all 32 weights alike, an error that their sum does not average out.
    # SmolLM2 of Q4_1 in int4: perplexity 44.7 against 48.2 with zero points.
    config = tools.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    packed, scales, _ = tools.DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    return packed, scales


def _quantization() -> Any:
    try:
        from isthmus.runtime import ort as runtime

        return runtime.quantization()
    except ImportError as e:
        raise ModelError(f"quantising needs {e.name}", hint="pip install isthmus_tools") from e


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Exception as e:  # the tools raise nearly anything on graphs that they do not know
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:_MAX_REASON]
        raise ModelError(f"onnxruntime cannot quantise this model: {reason}") from e


def _raise_opset(path: Path) -> None:
    model = onnx.load(path)
    if any(entry.domain in ("", "ai.onnx") and entry.version < _MIN_OPSET for entry in model.opset_import):
        onnx.save(onnx.version_converter.convert_version(model, _MIN_OPSET), path)


def _reader(quantization: Any, inputs: Iterable[Mapping[str, Array]]) -> Any:
    # A local class: its base exists only where the optional quantisation tools are installed.
    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._remaining = (dict(arrays) for arrays in inputs)

        def get_next(self) -> dict[str, Array] | None:
            return next(self._remaining, None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tools' advice on pre-processing, which this module follows."""
    loggers = [logging.getLogger(None if name == "root" else name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
