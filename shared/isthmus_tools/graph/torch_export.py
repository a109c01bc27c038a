"""Export of torch models to ONNX; the only importer of torch.

A spec is `package.module:factory`, a callable without arguments that returns an nn.Module, or the path of a program
written by torch.export.save (.pt2). Both execute code: export trusted models only.

Source: docs.pytorch.org/docs/stable/onnx_export.html.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.tensors import Dim
from isthmus.errors import ModelError
from isthmus_tools.graph.exporting import (
    FactoryResult,
    ModelInputs,
    Named,
    call_factory,
    check_package,
    current_folder,
    failures,
    missing_package,
    quiet,
    reason_of,
)
from isthmus_tools.graph.inputs import bind_shapes, check_size

# Serialisation copies weights inside the file, which doubles the memory of large ones; a single file is handier.
_MAX_INLINE_BYTES = 128 * 2**20
# torch may specialise a dimension of size 1 in the example to the constant 1, depending on the operators.
_MIN_FREE = 2

Spec: TypeAlias = str | Callable[[], Any] | FactoryResult


def is_torch_spec(spec: str) -> bool:
    """Whether `spec` names a torch model rather than an ONNX file."""
    module, colon, factory = spec.partition(":")
    return spec.endswith(".pt2") or bool(colon and factory.isidentifier() and not module.endswith(".onnx"))


def export(
    spec: Spec,
    out_path: str | os.PathLike[str],
    *,
    shapes: Sequence[Sequence[int]] = (),
    examples: Sequence[Array] = (),
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> Path:
    """Write `spec`'s model, in eval mode, to `out_path` as ONNX; large weights go to a file beside it.

    The model is traced with `examples`, or with float32 zeros of `shapes`, in the order of `forward`'s parameters,
    which `input_names` rename; a .pt2 program needs neither. `dynamic` names free dimensions: input name -> axis ->
    dimension name. `export_named` uses the parameters' own names.

    Raises:
        ModelError: torch or the factory is missing, or the export failed.
    """

    def arguments(model: Any, torch: Any) -> dict[str, Any]:
        tensors = tuple(torch.from_numpy(np.array(a)) for a in examples or [np.zeros(s, np.float32) for s in shapes])
        is_module = isinstance(model, torch.nn.Module)
        if is_module and not tensors:
            raise _missing_examples(spec, _parameters(model))
        return {
            "args": tensors if is_module else (),
            "input_names": input_names,
            "output_names": output_names,
            "dynamic_shapes": _dynamic_shapes(dynamic, input_names, torch),
        }

    return _export(spec, Path(out_path), arguments)


def export_named(spec: Spec, out_path: str | os.PathLike[str], inputs: ModelInputs) -> Path:
    """Write `spec`'s model as `export` does, with inputs named after `forward`'s parameters.

    A module is traced with `examples`, whose dtypes become the inputs', and with float32 zeros of `shapes` for inputs
    without an example. `free` names the free dimensions by input and axis; all others are fixed. A .pt2 program
    declares its inputs and free dimensions: shapes and examples are checked against its declarations first.

    Raises:
        ModelError: torch or the factory is missing, the names are not the inputs', or the export failed.
    """
    shapes, examples, free = inputs.shapes, inputs.examples, inputs.free

    def arguments(model: Any, torch: Any) -> dict[str, Any]:
        if not isinstance(model, torch.nn.Module):
            bind_shapes(_program_inputs(model, torch), shapes, examples)
            return {"args": ()}
        arrays = _in_order(spec, model, _widened({**_zeros(shapes, free, examples), **examples}, free))
        dims = {name: torch.export.Dim(name) for axes in free.values() for name in axes.values()}
        axes = {n: {axis: dims[d] for axis, d in free.get(n, {}).items()} or None for n in arrays}
        return {
            "args": (),
            "kwargs": {name: _tensor(array, torch) for name, array in arrays.items()},
            "dynamic_shapes": axes if dims else None,
        }

    traced_with_zeros = [name for name in shapes if name not in examples]
    hint = (
        f"{', '.join(traced_with_zeros)}: float32, as no example was given;"
        f" --example {traced_with_zeros[0]}=FILE.npy gives one"
        if traced_with_zeros
        else ""
    )
    return _export(spec, Path(out_path), arguments, hint)


def _export(spec: Spec, out: Path, arguments: Callable[[Any, Any], dict[str, Any]], hint: str = "") -> Path:
    if isinstance(spec, str) and not spec.endswith(".pt2"):
        check_package(spec)
    try:
        import torch
    except ImportError as e:
        raise missing_package("a torch model", "torch", "torch") from e
    hint = hint or "torch.onnx.export(..., dynamo=True, report=True) writes down what is in its way"
    with quiet(), current_folder(), failures("torch", _name(spec), hint):
        model = _model(spec, torch)
        if isinstance(model, torch.nn.Module):
            model.eval()
        with torch.no_grad():
            options = arguments(model, torch)
            program = torch.onnx.export(model, **options, dynamo=True, verbose=False)
        if program is None:
            raise ModelError(f"torch exported nothing for {_name(spec)}")
        _check_names(spec, program, options.get("kwargs", {}))
        size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value)
        program.save(str(out), external_data=size > _MAX_INLINE_BYTES)
        # torch 2.13 keeps a reference to the program, and so its weights in memory.
        for value in program.model.graph.initializers.values():
            value.const_value = None
    return out


def _check_names(spec: Spec, program: Any, inputs: Mapping[str, Any]) -> None:
    names = [str(v.name) for v in program.model.graph.inputs]
    if inputs and not set(inputs) <= set(names):
        lost = [n for n in inputs if n not in names]
        raise ModelError(
            f"torch exported {_name(spec)} without its inputs {', '.join(lost)}; it has {', '.join(names)}",
            inputs=names,
            hint="leave out what forward does not use",
        )


def _parameters(model: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


def _in_order(spec: Spec, model: Any, arrays: Named) -> Named:
    """`arrays` in the order of `forward`'s parameters."""
    parameters = _parameters(model)
    kinds = {p.kind for p in parameters.values()}
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        names += [n for n in arrays if n not in names]
    if unknown := [n for n in arrays if n not in names]:
        raise ModelError(
            f"{_name(spec)} has no input {', '.join(unknown)}; its forward takes {', '.join(names) or 'none by name'}",
            input=unknown[0],
            inputs=names,
            hint="" if names else "give each input a parameter with a name of its own in forward",
        )
    if any(n not in arrays and parameters[n].default is inspect.Parameter.empty for n in names if n in parameters):
        raise _missing_examples(spec, parameters, arrays)
    return {n: arrays[n] for n in names if n in arrays}


def _missing_examples(
    spec: Spec, parameters: Mapping[str, inspect.Parameter], present: Collection[str] = ()
) -> ModelError:
    by_name = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    needed = [n for n in by_name if parameters[n].default is inspect.Parameter.empty and n not in present]
    first = needed[0] if needed else next(iter(parameters), "x")
    return ModelError(
        f"{_name(spec)} needs an example of {', '.join(needed) or 'its input'}",
        inputs=list(parameters),
        hint=f"for floats give a shape, --shape {first}=1x3x224x224; for others an array, --example {first}=FILE.npy",
    )


def _widened(arrays: Named, free: Mapping[str, Mapping[int, str]]) -> Named:
    """`arrays` with free dimensions of size 1 repeated."""
    widened = dict(arrays)
    for name, axes in free.items():
        for axis in axes:
            if name in widened and widened[name].shape[axis] < _MIN_FREE:
                widened[name] = widened[name].repeat(_MIN_FREE, axis)
    return widened


def _tensor(array: Array, torch: Any) -> Any:
    if array.dtype.name == "bfloat16":
        # torch.from_numpy does not know ml_dtypes' bfloat16.
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _zeros(shapes: Mapping[str, Sequence[int]], free: Mapping[str, Mapping[int, str]], examples: Named) -> Named:
    """Zeros for the inputs with a shape and without an example; equal dimension names get equal sizes."""
    sizes = {d: examples[n].shape[axis] for n, axes in free.items() if n in examples for axis, d in axes.items()}
    zeros: dict[str, Array] = {}
    for name in shapes.keys() - examples.keys():
        shape = list(shapes[name])
        for axis, dim in free.get(name, {}).items():
            shape[axis] = sizes.get(dim, max(shape[axis], _MIN_FREE))
        check_size(name, "float32", shape)
        zeros[name] = np.zeros(shape, np.float32)
    return zeros


def _program_inputs(program: Any, torch: Any) -> dict[str, tuple[str | None, tuple[Dim, ...] | None]]:
    """Dtype and shape of each input of a torch.export program; free dimensions are texts."""
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    inputs: dict[str, tuple[str | None, tuple[Dim, ...] | None]] = {}
    for name in program.graph_signature.user_inputs:
        value = values.get(name)
        if isinstance(value, torch.Tensor):
            shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
            inputs[str(name)] = (str(value.dtype).removeprefix("torch."), shape)
    return inputs


def _model(spec: Spec, torch: Any) -> Any:
    if isinstance(spec, FactoryResult):
        return _checked(spec, torch)
    if callable(spec):
        return spec()
    if spec.endswith(".pt2"):
        try:
            return torch.export.load(spec)
        except Exception as e:  # a zip file of pickles, JSON and tensors, each possibly broken
            raise ModelError(
                f"{spec} cannot be read: {reason_of(e)}",
                spec=spec,
                hint="give a file that torch.export.save of this torch wrote, or package.module:factory",
            ) from e
    return _checked(call_factory(spec), torch)


def _checked(made: FactoryResult, torch: Any) -> Any:
    if not isinstance(made.value, torch.nn.Module):
        raise ModelError(f"{made.name} returned a {type(made.value).__name__}, not an nn.Module", spec=made.name)
    return made.value


def _dynamic_shapes(
    dynamic: Mapping[str, Mapping[int, str]] | None, input_names: Sequence[str] | None, torch: Any
) -> tuple[dict[int, Any] | None, ...] | None:
    if not dynamic:
        return None
    if not input_names or (unknown := set(dynamic) - set(input_names)):
        raise ModelError(
            f"free dimensions are named for {', '.join(sorted(unknown if input_names else dynamic))}, which is no input"
        )
    dims = {name: torch.export.Dim(name) for axes in dynamic.values() for name in axes.values()}
    return tuple({axis: dims[d] for axis, d in dynamic.get(n, {}).items()} or None for n in input_names)


def _name(spec: Spec) -> str:
    if isinstance(spec, FactoryResult):
        return spec.name
    return spec if isinstance(spec, str) else str(getattr(spec, "__name__", spec))
