"""Export of Keras files and TensorFlow's SavedModels, in a process of its own: TensorFlow stays for a process's life.

Keras exports by itself; SavedModels take tf2onnx's command. Source: keras.io/api/models/model_saving_apis/export,
github.com/onnx/tensorflow-onnx.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from isthmus.errors import ModelError
from isthmus_tools.graph.exporting import ModelInputs, missing_package

_OPSET = "18"
# The last lines of a traceback hold its reason.
_REASON_LINES, _MAX_REASON = 3, 500


def export_keras(model: str, out: Path, inputs: ModelInputs) -> Path:
    """Write a .keras file as ONNX; its inputs keep their names, and its free dimensions stay free.

    Raises:
        ModelError: Keras or TensorFlow is missing, the file holds code, or the export failed.
    """
    _require(model, "keras", "tensorflow", "tf2onnx")
    return _run(model, out, ["isthmus_tools.graph.keras_program", model, str(out)])


def export_saved_model(model: str, out: Path, inputs: ModelInputs) -> Path:
    """Write a SavedModel's default signature as ONNX.

    Raises:
        ModelError: TensorFlow or tf2onnx is missing, or the export failed.
    """
    _require(model, "tensorflow", "tf2onnx")
    return _run(model, out, ["tf2onnx.convert", "--saved-model", model, "--opset", _OPSET, "--output", str(out)])


def _require(model: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise missing_package(model, package, "tensorflow")


def _run(model: str, out: Path, arguments: Sequence[str]) -> Path:
    variables = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *arguments], env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode or not out.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = " ".join(lines[-_REASON_LINES:])[-_MAX_REASON:] or f"status {done.returncode}"
        raise ModelError(f"TensorFlow cannot export {model}: {reason}", spec=model)
    return out
