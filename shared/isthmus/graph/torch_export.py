"""A torch model to an ONNX file. The only place that imports torch.

A spec is `package.module:factory`, a callable without arguments that returns an nn.Module, or the path of a program
that torch.export.save wrote (.pt2). Both run code: export only what you trust.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from isthmus.errors import ModelError

# A protobuf ends at 2 GiB; far below that a graph with its weights beside it is still easier to handle.
_INLINE_LIMIT = 512 * 2**20

Arrays: TypeAlias = Sequence[npt.NDArray[np.generic]]


def is_torch_spec(spec: str) -> bool:
    """Whether `spec` names a torch model rather than an ONNX file."""
    module, colon, factory = spec.partition(":")
    return spec.endswith(".pt2") or bool(colon and factory.isidentifier() and not module.endswith(".onnx"))


def export(
    spec: str | Callable[[], Any],
    out_path: str | os.PathLike[str],
    *,
    shapes: Sequence[Sequence[int]] = (),
    examples: Arrays = (),
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> Path:
    """Write `spec`'s model to `out_path` as ONNX, in eval mode; large weights go to a file beside it.

    `examples` are what the model is traced with, or float32 zeros of `shapes`; a .pt2 program needs neither.
    `dynamic` names free dimensions: input name -> axis -> dimension's name.

    Raises:
        ModelError: torch is missing, the factory is, or the export failed.
    """
    try:
        import torch
    except ImportError as e:
        raise ModelError("a torch model needs torch to export it", hint="pip install 'isthmus[torch]'") from e
    out = Path(out_path)
    with _quiet():
        try:
            model, arguments = (
                _model(spec, torch),
                tuple(torch.from_numpy(np.array(a)) for a in examples or [np.zeros(s, np.float32) for s in shapes]),
            )
            if isinstance(model, torch.nn.Module):
                if not arguments:
                    raise ModelError(
                        f"{_name(spec)} needs an example of its input", hint="give its shape, e.g. 1x3x224x224"
                    )
                model.eval()
            with torch.no_grad():
                program = torch.onnx.export(
                    model,
                    arguments if isinstance(model, torch.nn.Module) else (),
                    input_names=input_names,
                    output_names=output_names,
                    dynamic_shapes=_dynamic_shapes(dynamic, input_names, torch),
                    dynamo=True,
                    verbose=False,
                )
            if program is None:
                raise ModelError(f"torch exported nothing for {_name(spec)}")
            size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value)
            program.save(str(out), external_data=size > _INLINE_LIMIT)
        except ModelError:
            raise
        # An export runs the model's own code, which may raise anything.
        except Exception as e:
            raise ModelError(
                f"torch cannot export {_name(spec)}: {type(e).__name__}: {str(e).strip().partition(chr(10))[0]}",
                spec=_name(spec),
                hint="torch.onnx.export(..., dynamo=True, report=True) writes down what is in its way",
            ) from e
    return out


def _model(spec: str | Callable[[], Any], torch: Any) -> Any:
    if callable(spec):
        return spec()
    if spec.endswith(".pt2"):
        return torch.export.load(spec)
    module, _, factory = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as e:
        raise ModelError(
            f"there is no model factory {spec}: {e}",
            spec=spec,
            hint="give package.module:factory, importable from here, or a .pt2 file",
        ) from e
    model = found()
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{spec} returned a {type(model).__name__}, not an nn.Module", spec=spec)
    return model


def _dynamic_shapes(
    dynamic: Mapping[str, Mapping[int, str]] | None, input_names: Sequence[str] | None, torch: Any
) -> tuple[dict[int, Any] | None, ...] | None:
    if not dynamic:
        return None
    if not input_names or (unknown := set(dynamic) - set(input_names)):
        raise ModelError(
            f"free dimensions are named for {', '.join(sorted(unknown if input_names else dynamic))}, which is no input"
        )
    made = {name: torch.export.Dim(name) for axes in dynamic.values() for name in axes.values()}
    return tuple({axis: made[d] for axis, d in dynamic.get(n, {}).items()} or None for n in input_names)


def _name(spec: str | Callable[[], Any]) -> str:
    return spec if isinstance(spec, str) else str(getattr(spec, "__name__", spec))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notices (no torchvision, its own deprecations, its steps) out of a command's output."""
    # torch gives each of its many loggers a level of its own, so only this reaches them all.
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
