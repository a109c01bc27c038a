"""Runs of a model in onnxruntime, to see its inner values, or their types where inference could not tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from isthmus.arrays import DTYPES
from isthmus.errors import ModelError
from isthmus.runtime.ort import ort, time_limit
from isthmus.runtime.ort_runner import reason_of
from isthmus_tools.graph.weights import read_into

MAX_RUN_S = 600.0
"""For one run of a model while it is imported."""
_RENAMED = {"float": "float32", "double": "float64"}
"""onnxruntime's names of dtypes that numpy names otherwise."""


def types(
    model: ir.Model, values: Mapping[ir.Value, str | None], feeds: Mapping[str, npt.NDArray[np.generic]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape that each of `values` has in one run with `feeds`; those that are no tensors are left out.

    `values` come with their dtype, or None where onnxruntime is to tell it too. Only the shapes leave the run, so
    memory stays that of a plain run however many values are asked for.

    Raises:
        ModelError: onnxruntime cannot load the model, or cannot run it with `feeds`.
    """
    try:
        untyped = [v for v, dtype in values.items() if dtype is None]
        found = dict(_dtypes(model, untyped)) if untyped else {}
        dtypes = {v: dtype or found.get(str(v.name)) for v, dtype in values.items()}
        shapes = _shapes(model, [v for v, dtype in dtypes.items() if dtype is not None], feeds)
    except ModelError:
        raise
    # onnxruntime raises bare RuntimeErrors and subclasses of Exception that it does not export.
    except Exception as e:
        raise ModelError(
            f"{reason_of(e)}: the model does not run with the inputs given, and only a run tells some of its shapes",
            hint="give inputs that the model accepts: --example NAME=FILE.npy, or --shape NAME=1x3x320x640",
        ) from e
    return {n: (dtype, shapes[n]) for v, dtype in dtypes.items() if dtype is not None and (n := str(v.name)) in shapes}


def values(
    model: ir.Model, names: Sequence[str], feeds: Mapping[str, npt.NDArray[np.generic]]
) -> dict[str, npt.NDArray[np.generic]]:
    """The values of those names in one run with `feeds`; they lie in memory all at once.

    Raises:
        ModelError: onnxruntime cannot load the model, or cannot run it with `feeds`.
    """
    try:
        graph = model.graph.clone()
        named = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
        asked = [named[name] for name in names if name not in feeds]
        graph.outputs.extend(v for v in asked if not v.is_graph_output())
        wanted = [str(v.name) for v in asked]
        arrays = _run(graph, model, wanted, feeds)
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(
            f"{reason_of(e)}: the model does not run with the inputs given", hint="give inputs that the model accepts"
        ) from e
    return {**{n: feeds[n] for n in names if n in feeds}, **dict(zip(wanted, arrays, strict=True))}


def _dtypes(model: ir.Model, values: Sequence[ir.Value]) -> Iterator[tuple[str, str]]:
    graph = model.graph.clone()
    named = {v.name: v for node in graph for v in node.outputs}
    graph.outputs.extend(v for value in values if not (v := named[value.name]).is_graph_output())
    with _session(graph, model) as session:
        for output in session.get_outputs():
            kind = output.type.removeprefix("tensor(").removesuffix(")")
            if output.type.startswith("tensor(") and (dtype := _RENAMED.get(kind, kind)) in DTYPES:
                yield output.name, dtype


def _shapes(
    model: ir.Model, values: Sequence[ir.Value], feeds: Mapping[str, npt.NDArray[np.generic]]
) -> dict[str, tuple[int, ...]]:
    graph = model.graph.clone()
    named = {v.name: v for node in graph for v in node.outputs}
    asked = {}
    for i, value in enumerate(values):
        node = ir.node("Shape", [named[value.name]], name=f"isthmus_shape_{i}")
        node.outputs[0].name, node.outputs[0].type = f"isthmus_shape_{i}", ir.TensorType(ir.DataType.INT64)
        graph.append(node)
        graph.outputs.append(node.outputs[0])
        asked[node.outputs[0].name] = str(value.name)
    arrays = _run(graph, model, list(asked), feeds)
    return {name: tuple(int(n) for n in a) for name, a in zip(asked.values(), arrays, strict=True)}


def _run(
    graph: ir.Graph, model: ir.Model, wanted: Sequence[str], feeds: Mapping[str, npt.NDArray[np.generic]]
) -> Sequence[npt.NDArray[np.generic]]:
    if not wanted:
        return []
    with _session(graph, model) as session, time_limit(MAX_RUN_S) as options:
        return session.run(wanted, dict(feeds), options)  # type: ignore[no-any-return]


@contextmanager
def _session(graph: ir.Graph, model: ir.Model) -> Iterator[ort.InferenceSession]:
    """A session of `graph`, for as long as the block lasts: its external weights lie in arrays of this function."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    outside = {n: t for n, v in graph.initializers.items() if isinstance(t := v.const_value, ir.ExternalTensor)}
    arrays = []
    folders = {str(t.base_dir) for t in outside.values()}
    if len(folders) == 1 and all(_is_aligned(t) for t in outside.values()):
        # onnxruntime maps the files, without a copy, of one folder.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", *folders)
    else:
        arrays = [_packed(t) for t in outside.values()]
        values = [
            ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(t.dtype))
            for array, t in zip(arrays, outside.values(), strict=True)
        ]
        options.add_external_initializers(list(outside), values)
    # Weights that are laid out anew for one run would be another copy of them.
    options.add_session_config_entry("session.disable_prepacking", "1")
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=model.ir_version))
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise ModelError(
            f"{reason_of(e)}: onnxruntime {ort.__version__} cannot load the model",
            hint="export it for operators and an opset that this onnxruntime knows",
        ) from e
    yield session


def _is_aligned(tensor: ir.ExternalTensor) -> bool:
    return (tensor.offset or 0) % max(1, math.ceil(tensor.dtype.itemsize)) == 0


def _packed(tensor: ir.ExternalTensor) -> npt.NDArray[np.generic]:
    """The tensor's bytes as onnxruntime takes them: in an array of its shape, from the start, whatever its dtype is."""
    dtype = np.dtype(f"u{max(1, math.ceil(tensor.dtype.itemsize))}")
    shape = tensor.shape.numpy()
    if tensor.nbytes == math.prod(shape) * dtype.itemsize:
        # Mapped: onnxruntime copies them, and then these pages can go.
        return np.memmap(tensor.path, dtype, "r", tensor.offset or 0, shape)
    array = np.zeros(shape, dtype)
    read_into(tensor, array.data.cast("B")[: tensor.nbytes])
    return array
