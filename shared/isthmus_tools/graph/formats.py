"""Formats of models beside ONNX: which export takes a file, a folder or a factory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from isthmus.errors import ModelError
from isthmus_tools.graph import (
    sklearn_export,
    tensorflow_export,
    torch_export,
    torchscript_export,
    transformers_export,
)
from isthmus_tools.graph.exporting import Export, ModelInputs, call_factory

_BY_SUFFIX: Mapping[str, tuple[str, Export]] = {
    ".pt2": ("torch", torch_export.export_named),
    ".pt": ("TorchScript", torchscript_export.export),
    ".pth": ("TorchScript", torchscript_export.export),
    ".torchscript": ("TorchScript", torchscript_export.export),
    ".keras": ("Keras", tensorflow_export.export_keras),
    ".skops": ("scikit-learn", sklearn_export.export),
}
_REFUSED = {
    **dict.fromkeys(
        (".pkl", ".pickle", ".joblib"),
        "a pickle is executed when it is read; write the estimator with skops.io.dump, or give package.module:factory",
    ),
    **dict.fromkeys((".h5", ".hdf5"), "load it with Keras and save it anew: model.save('model.keras')"),
    ".safetensors": "weights alone are no model; give the folder with config.json, or package.module:factory",
    ".tflite": "give the model that it was converted from: a .keras file or a SavedModel",
}
"""Suffixes of files that are not taken, and what to do."""


def export_of(model: str) -> tuple[str, Export] | None:
    """The framework's name and the export for a model that is not an ONNX file; None for one that is.

    Raises:
        ModelError: a format that is not taken, or a folder of no known layout.
    """
    if torch_export.is_torch_spec(model) and not model.endswith(".pt2"):
        return "Python", _export_factory
    path = Path(model)
    if path.is_dir():
        return _of_folder(path)
    suffix = path.suffix.lower()
    if suffix in _REFUSED:
        raise ModelError(f"{model} is of a format that is not imported", spec=model, hint=_REFUSED[suffix])
    return _BY_SUFFIX.get(suffix)


def _of_folder(path: Path) -> tuple[str, Export]:
    if (path / "saved_model.pb").is_file():
        return "TensorFlow", tensorflow_export.export_saved_model
    if (path / "config.json").is_file():
        return "transformers", transformers_export.export
    raise ModelError(
        f"the folder {path} holds neither saved_model.pb (TensorFlow) nor config.json (Hugging Face)", spec=str(path)
    )


def _export_factory(model: str, out: Path, inputs: ModelInputs) -> Path:
    """Write what a factory returns: an nn.Module, or a fitted scikit-learn estimator."""
    made = call_factory(model)
    if sklearn_export.is_estimator(made.value):
        return sklearn_export.convert(made, out)
    return torch_export.export_named(made, out, inputs)
