"""Post-training quantisation by onnxruntime's own tools: an int8 variant of a model, or weights alone in blocks.

The only importer of onnxruntime.quantization. Source: onnxruntime.ai/docs/performance/model-optimizations/quantization.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx

from isthmus.arrays import Array
from isthmus.errors import ModelError

_LOGGERS = ("onnxruntime.quantization", "root")
# Nearly all of the work. Quantised softmax, normalisations and sums change predictions and save no time.
_OPERATORS = ("Conv", "MatMul", "Gemm")
BLOCK = 32
"""Weights of a matrix's inputs that share a scale and a zero point, as in GGUF's 4-bit formats."""
# The first opset whose QuantizeLinear has a scale per channel.
_MIN_OPSET = 13
_MAX_REASON = 300


def quantise(whole: Path, inputs: Sequence[Mapping[str, Array]], out: Path) -> Path:
    """Write the int8 variant of the ONNX model at `whole` to `out`: 8-bit weights and activations between QDQ pairs.

    `inputs` calibrate the activation ranges; pass at least a handful of real samples. Weights of convolutions and
    matrix products are quantised per channel.

    Raises:
        ModelError: onnxruntime's tools are missing, `inputs` is empty, or the tools cannot quantise this model.
    """
    try:
        from isthmus.runtime import ort as runtime

        quantization = runtime.quantization()
    except ImportError as e:
        raise ModelError(f"quantising needs {e.name}", hint="pip install isthmus_tools") from e
    if not inputs:
        raise ModelError("quantising needs inputs to calibrate with")
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        try:
            # In a single file: the tools treat weights beside the graph differently by folder.
            single = Path(folder) / "whole.onnx"
            onnx.save(onnx.load(whole), single)
            quantization.shape_inference.quant_pre_process(str(single), str(prepared), skip_symbolic_shape=True)
            _raise_opset(prepared)
            quantization.quantize_static(
                str(prepared),
                str(out),
                _reader(quantization, inputs),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                op_types_to_quantize=list(_OPERATORS),
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        except Exception as e:  # the tools raise nearly anything on graphs that they do not know
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:_MAX_REASON]
            raise ModelError(f"onnxruntime cannot quantise this model: {reason}") from e
    return out


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


def _raise_opset(path: Path) -> None:
    model = onnx.load(path)
    if any(entry.domain in ("", "ai.onnx") and entry.version < _MIN_OPSET for entry in model.opset_import):
        onnx.save(onnx.version_converter.convert_version(model, _MIN_OPSET), path)


def _reader(quantization: Any, inputs: Sequence[Mapping[str, Array]]) -> Any:
    # A local class: its base exists only where the optional quantisation tools are installed.
    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._remaining = iter([dict(arrays) for arrays in inputs])

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
