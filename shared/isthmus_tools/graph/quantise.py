"""An int8 variant of a model, made by onnxruntime's own tools: static quantisation, calibrated with inputs.

The only place that uses onnxruntime.quantization.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.errors import ModelError

_WARNED = ("onnxruntime.quantization", "root")
_OPERATORS = ("Conv", "MatMul", "Gemm")
"""What is quantised: nearly all of the work. Softmax, normalisations and sums lose answers and gain no time."""
_MIN_OPSET = 13
"""Of scales by channel."""


def quantise(whole: Path, inputs: Sequence[Mapping[str, npt.NDArray[np.generic]]], out: Path) -> Path:
    """Write the int8 variant of the ONNX model at `whole` to `out`: 8-bit weights and activations between QDQ pairs.

    `inputs` calibrate the ranges of activations; a handful of real ones is the least. Weights are quantised by channel,
    in convolutions and matrix products only.

    Raises:
        ModelError: onnxruntime's tools are missing, or cannot quantise this model; says why.
    """
    try:
        from isthmus.runtime import ort as runtime

        quantization = runtime.quantization()
    except ImportError as e:
        raise ModelError(f"quantising needs {e.name}", hint="pip install 'isthmus[cli]'") from e
    if not inputs:
        raise ModelError("quantising needs inputs to calibrate with")
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        try:
            import onnx

            # In one file: what these tools do with weights beside the graph depends on where they lie.
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
        except Exception as e:  # these tools raise nearly anything on graphs that they do not know
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
            raise ModelError(f"onnxruntime cannot quantise this model: {reason}") from e
    return out


def _raise_opset(path: Path) -> None:
    import onnx

    model = onnx.load(path)
    if any(entry.domain in ("", "ai.onnx") and entry.version < _MIN_OPSET for entry in model.opset_import):
        onnx.save(onnx.version_converter.convert_version(model, _MIN_OPSET), path)


def _reader(quantization: Any, inputs: Sequence[Mapping[str, npt.NDArray[np.generic]]]) -> Any:
    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter([dict(arrays) for arrays in inputs])

        def get_next(self) -> dict[str, npt.NDArray[np.generic]] | None:
            return next(self._left, None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Its advice on pre-processing is for people who call it by hand."""
    loggers = [logging.getLogger(None if name == "root" else name) for name in _WARNED]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
