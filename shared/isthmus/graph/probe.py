"""Runs of a model in onnxruntime, to see its inner values, or their types where inference could not tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from isthmus.dtypes import DTYPES
from isthmus.errors import ModelError
from isthmus.runners.runtime import ort

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
    # onnxruntime raises bare RuntimeErrors and subclasses of Exception that it does not export.
    except Exception as e:
        raise ModelError(
            f"some shapes are only known at run time, and the model does not run with the inputs given: {_first(e)}",
            hint="give example inputs that the model accepts, or shapes to make them from",
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
        arrays = _session(graph, model).run(wanted, dict(feeds)) if wanted else []
    except Exception as e:
        raise ModelError(
            f"the model does not run with the inputs given: {_first(e)}", hint="give inputs that the model accepts"
        ) from e
    return {**{n: feeds[n] for n in names if n in feeds}, **dict(zip(wanted, arrays, strict=True))}


def _dtypes(model: ir.Model, values: Sequence[ir.Value]) -> Iterator[tuple[str, str]]:
    graph = model.graph.clone()
    named = {v.name: v for node in graph for v in node.outputs}
    graph.outputs.extend(v for value in values if not (v := named[value.name]).is_graph_output())
    for output in _session(graph, model).get_outputs():
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
    arrays = _session(graph, model).run(list(asked), dict(feeds)) if asked else []
    return {name: tuple(int(n) for n in a) for name, a in zip(asked.values(), arrays, strict=True)}


def _session(graph: ir.Graph, model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    folders = {
        str(t.base_dir) for v in graph.initializers.values() if isinstance(t := v.const_value, ir.ExternalTensor)
    }
    for folder in folders:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=model.ir_version))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
