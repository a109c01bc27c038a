"""Export of TorchScript files, as torch.jit.save writes, by torch's exporter for TorchScript.

torch.export takes no TorchScript, and torch keeps its older exporter for it. A file holds TorchScript code, which torch
interprets; a pickled checkpoint is refused.

Source: docs.pytorch.org/docs/stable/onnx_torchscript.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import ModelError
from isthmus_tools.graph.exporting import ModelInputs, Named, failures, missing_package, quiet, reason_of

# The newest that torch's exporter for TorchScript writes without conversion by the runtime.
_OPSET = 17


def export(model: str, out: Path, inputs: ModelInputs) -> Path:
    """Write a TorchScript file as ONNX; inputs are named after its forward's parameters.

    Inputs without an example are traced with float32 zeros of `inputs.shapes`.

    Raises:
        ModelError: torch is missing, the file is no TorchScript, an input has neither, or the export failed.
    """
    try:
        import torch
    except ImportError as e:
        raise missing_package(model, "torch", "torch") from e
    with quiet(), failures("torch", model), torch.no_grad():
        program = _load(model, torch).eval()
        names = [argument.name for argument in program.forward.schema.arguments[1:]]
        arrays = {name: np.zeros(shape, np.float32) for name, shape in inputs.shapes.items()} | dict(inputs.examples)
        _check_inputs(model, names, arrays, program.forward.schema.arguments[1:])
        names = [name for name in names if name in arrays]
        tensors = tuple(torch.from_numpy(np.array(arrays[name])) for name in names)
        torch.onnx.export(
            program,
            tensors,
            str(out),
            dynamo=False,
            opset_version=_OPSET,
            input_names=names,
            output_names=_output_names(program(*tensors)),
            dynamic_axes={name: dict(axes) for name, axes in inputs.free.items()},
        )
    return out


def _load(model: str, torch: Any) -> Any:
    try:
        return torch.jit.load(model, map_location="cpu")
    except Exception as e:  # a zip file of code and tensors, each possibly broken
        raise ModelError(
            f"{model} is no TorchScript program: {reason_of(e)}",
            spec=model,
            hint="write one with torch.jit.save(torch.jit.script(model), file); weights alone (a state_dict) need their"
            " model: package.module:factory",
        ) from e


def _check_inputs(model: str, names: Sequence[str], arrays: Named, arguments: Sequence[Any]) -> None:
    """Check that each input is known and has a shape or an example, unless it has a default."""
    if unknown := [name for name in arrays if name not in names]:
        raise ModelError(
            f"{model} has no input {unknown[0]}; its forward takes {', '.join(names)}", input=unknown[0], inputs=names
        )
    if missing := [a.name for a in arguments if a.name not in arrays and not a.has_default_value()]:
        raise ModelError(
            f"{model} needs an example of {', '.join(missing)}",
            inputs=names,
            hint=f"for floats give a shape, --shape {missing[0]}=1x3x224x224; for others an array,"
            f" --example {missing[0]}=FILE.npy",
        )


def _output_names(outputs: Any) -> list[str]:
    if not isinstance(outputs, tuple | list):
        return ["output"]
    return [f"output_{i}" for i in range(len(outputs))]
