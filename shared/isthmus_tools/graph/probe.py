"""Runs of a graph in onnxruntime for inner values, dtypes and shapes that inference left open; output differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

from isthmus.arrays import DTYPES, Array
from isthmus.errors import ModelError
from isthmus.runtime.ort import ort, reason_of, time_limit
from isthmus_tools.graph.weights import read_into

# For each run during an import; large language models take minutes on small machines.
MAX_RUN_S = 600.0
# onnxruntime's names of dtypes that numpy names otherwise.
_NUMPY_NAMES = {"float": "float32", "double": "float64"}


def types(
    model: ir.Model, values: Mapping[ir.Value, str | None], feeds: Mapping[str, Array]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each of `values` in a run with `feeds`, without values that are no tensors.

    `values` map to their dtypes; None asks onnxruntime for the dtype. The run returns shapes only, so its memory is
    that of a plain run for any number of values.

    Raises:
        ModelError: onnxruntime cannot load the model, or cannot run it with `feeds`.
    """
    try:
        untyped = [v for v, dtype in values.items() if dtype is None]
        inferred = dict(_dtypes(model, untyped)) if untyped else {}
        dtypes = {v: dtype or inferred.get(str(v.name)) for v, dtype in values.items()}
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


def values(model: ir.Model, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The values `names` in a run with `feeds`, all in memory at once.

    Raises:
        ModelError: onnxruntime cannot load the model, or cannot run it with `feeds`.
    """
    try:
        graph = model.graph.clone()
        by_name = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
        targets = [by_name[name] for name in names if name not in feeds]
        graph.outputs.extend(v for v in targets if not v.is_graph_output())
        target_names = [str(v.name) for v in targets]
        arrays = _run(graph, model, target_names, feeds)
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(
            f"{reason_of(e)}: the model does not run with the inputs given", hint="give inputs that the model accepts"
        ) from e
    return {**{n: feeds[n] for n in names if n in feeds}, **dict(zip(target_names, arrays, strict=True))}


def magnitude(array: Array) -> float:
    """The largest finite magnitude."""
    magnitudes = np.abs(np.asarray(array, np.float64))
    return float(magnitudes[np.isfinite(magnitudes)].max(initial=0))


def difference(expected: Array, actual: Array, scale: float | None = None) -> float:
    """The largest absolute difference divided by `scale`, by default the magnitude of `expected`.

    Infinite where shapes differ, or where non-finite values do not coincide.
    """
    if expected.shape != actual.shape:
        return float("inf")
    a, b = (np.asarray(x, np.float64) for x in (expected, actual))
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    unit = (magnitude(expected) if scale is None else scale) or 1.0
    return float(np.abs(a[finite] - b[finite]).max(initial=0)) / unit


def _dtypes(model: ir.Model, values: Sequence[ir.Value]) -> Iterator[tuple[str, str]]:
    graph = model.graph.clone()
    by_name = {v.name: v for node in graph for v in node.outputs}
    graph.outputs.extend(v for value in values if not (v := by_name[value.name]).is_graph_output())
    with _session(graph, model) as session:
        for output in session.get_outputs():
            kind = output.type.removeprefix("tensor(").removesuffix(")")
            if output.type.startswith("tensor(") and (dtype := _NUMPY_NAMES.get(kind, kind)) in DTYPES:
                yield output.name, dtype


def _shapes(model: ir.Model, values: Sequence[ir.Value], feeds: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    graph = model.graph.clone()
    by_name = {v.name: v for node in graph for v in node.outputs}
    probes = {}
    for i, value in enumerate(values):
        node = ir.node("Shape", [by_name[value.name]], name=f"isthmus_shape_{i}")
        node.outputs[0].name, node.outputs[0].type = f"isthmus_shape_{i}", ir.TensorType(ir.DataType.INT64)
        graph.append(node)
        graph.outputs.append(node.outputs[0])
        probes[node.outputs[0].name] = str(value.name)
    arrays = _run(graph, model, list(probes), feeds)
    return {name: tuple(int(n) for n in a) for name, a in zip(probes.values(), arrays, strict=True)}


def _run(graph: ir.Graph, model: ir.Model, names: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]:
    if not names:
        return []
    with _session(graph, model) as session, time_limit(MAX_RUN_S) as options:
        return session.run(names, dict(feeds), options)  # type: ignore[no-any-return]


@contextmanager
def _session(graph: ir.Graph, model: ir.Model) -> Iterator[ort.InferenceSession]:
    """A session of `graph`, valid within the block: its external weights are arrays of this function."""
    options = ort.SessionOptions()
    # Fusions would remove the values that the run is to show.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    outside = {n: t for n, v in graph.initializers.items() if isinstance(t := v.const_value, ir.ExternalTensor)}
    arrays = []
    folders = {str(t.base_dir) for t in outside.values()}
    if len(folders) == 1 and all(_is_aligned(t) for t in outside.values()):
        # onnxruntime maps the files of a single folder without a copy.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", *folders)
    else:
        arrays = [_external_array(t) for t in outside.values()]
        ort_values = [
            ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(t.dtype))
            for array, t in zip(arrays, outside.values(), strict=True)
        ]
        options.add_external_initializers(list(outside), ort_values)
    # Prepacking would hold a second copy of all weights for a single run.
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


def _external_array(tensor: ir.ExternalTensor) -> Array:
    """The tensor's bytes as onnxruntime expects any dtype: unsigned integers of its item size, in its shape."""
    dtype = np.dtype(f"u{max(1, math.ceil(tensor.dtype.itemsize))}")
    shape = tensor.shape.numpy()
    if tensor.nbytes == math.prod(shape) * dtype.itemsize:
        # Mapped: onnxruntime copies the bytes, and the pages can be dropped afterwards.
        return np.memmap(tensor.path, dtype, "r", tensor.offset or 0, shape)
    # Sub-byte dtypes are packed: fewer bytes than elements, at the start of the array.
    array = np.zeros(shape, dtype)
    read_into(tensor, array.data.cast("B")[: tensor.nbytes])
    return array
