"""What imports of other formats share: errors, output, files of a folder, and factories of the user's own code."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from isthmus.arrays import Array
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ModelError

Named: TypeAlias = Mapping[str, Array]
# torch's exporter colours its steps for a terminal.
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_MAX_REASON = 500
# The extra of isthmus_tools with each framework.
_EXTRAS = {"torch": "torch", "sklearn": "sklearn", "tensorflow": "tensorflow", "keras": "tensorflow"}


@dataclass(frozen=True)
class ModelInputs:
    """Declared inputs of a model by name: concrete shapes, names of free dimensions by axis, example arrays."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    free: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    examples: Named = field(default_factory=dict)

    def check_free(self, inputs: Mapping[str, TensorSpec]) -> None:
        """Check that each dimension declared free is free in the imported model.

        Raises:
            ModelError: a dimension is fixed.
        """
        for name, axes in self.free.items():
            for axis, dim in axes.items():
                if isinstance(size := inputs[name].shape[axis], int):
                    raise ModelError(
                        f"{dim} of {name} is not free: axis {axis} is {size} in the model",
                        input=name,
                        axis=axis,
                        hint=f"give the number {size} there, or export the model anew with that dimension free",
                    )


Export: TypeAlias = Callable[[str, Path, ModelInputs], Path]
"""Writes a model as ONNX to the path, and returns the path."""


@dataclass(frozen=True)
class FactoryResult:
    """What the factory `name` returned."""

    name: str
    value: Any


def call_factory(spec: str) -> FactoryResult:
    """Import and call `package.module:factory`, also from the current folder. It executes the user's code.

    Raises:
        ModelError: no such factory, or its code failed.
    """
    check_package(spec)
    with quiet(), current_folder(), failures("Python", spec):
        return FactoryResult(spec, _call(spec))


def _call(spec: str) -> Any:
    module, _, factory = spec.partition(":")
    try:
        create = getattr(importlib.import_module(module), factory)
    # TypeError: importlib's for a name that starts with a dot.
    except (ImportError, AttributeError, ValueError, TypeError) as e:
        raise no_factory(spec, str(e), getattr(e, "name", None) or "") from e
    # The module is the user's code, as the factory is.
    except Exception as e:
        raise ModelError(f"{module} raised {reason_of(e)}", spec=spec) from e
    try:
        return create()
    # The factory is the user's code, which may raise anything.
    except Exception as e:
        raise ModelError(f"{spec} raised {reason_of(e)}", spec=spec) from e


def check_package(spec: str) -> None:
    """Refuse a factory of an unknown package before its framework is imported, which takes seconds.

    Raises:
        ModelError: no such package.
    """
    package = spec.partition(":")[0].partition(".")[0]
    # ValueError: a module that was put into sys.modules without a spec.
    with current_folder(), contextlib.suppress(ValueError):
        if package and importlib.util.find_spec(package) is None:
            raise no_factory(spec, f"No module named {package!r}")


def no_factory(spec: str, reason: str, missing: str = "") -> ModelError:
    """The error for a factory that cannot be imported; `missing` is the package that its import lacks."""
    if missing in _EXTRAS:
        return ModelError(f"{spec} needs {missing}", spec=spec, hint=install(_EXTRAS[missing]))
    return ModelError(
        f"there is no model factory {spec}: {reason}",
        spec=spec,
        hint="give package.module:factory, importable from here, or a .pt2 file",
    )


def install(extra: str) -> str:
    """The hint that installs an extra."""
    return f'pip install "isthmus_tools[{extra}]"'


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a small file of a model's folder.

    Raises:
        ModelError: the file cannot be read, or has more than `limit` bytes.
    """
    try:
        if path.stat().st_size > limit:
            raise ModelError(f"{path} has more than {limit} bytes", file=str(path))
        return path.read_bytes()
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror}", file=str(path)) from e


def missing_package(model: str, package: str, extra: str) -> ModelError:
    """The error for a model whose framework is not installed."""
    return ModelError(f"{model} needs {package} to export it", package=package, hint=install(extra))


@contextlib.contextmanager
def failures(framework: str, model: str, hint: str = "") -> Iterator[None]:
    """Turn any exception of an export into a ModelError: it executes the framework's and the model's code.

    Raises:
        ModelError: the block raised, or called sys.exit.
    """
    try:
        yield
    except ModelError:
        raise
    except SystemExit as e:
        # The model's own code called sys.exit; subclasses are how a command ends on a signal.
        if type(e) is not SystemExit:
            raise
        raise ModelError(
            f"{model} called sys.exit({'' if e.code is None else e.code}) instead of giving a model",
            spec=model,
            hint="keep what a script does on its own below: if __name__ == '__main__'",
        ) from e
    except Exception as e:
        raise ModelError(f"{framework} cannot export {model}: {reason_of(e)}", spec=model, hint=hint) from e


def reason_of(error: BaseException) -> str:
    """The first error of the model's code or of the framework, without an exporter's pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = _ESCAPE.sub("", str(error)).partition("\n\nWhile executing")[0].partition("\nOriginal traceback")[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:_MAX_REASON]}"


@contextlib.contextmanager
def current_folder() -> Iterator[None]:
    """Import modules from the current folder, as `python -m` does; a console script's path has its own folder only."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        # The model's code may have removed the entry.
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep an exporter's notices (missing torchvision, own deprecations, steps) out of a command's output."""
    # torch sets a level on each of its many loggers, so only the global switch reaches all of these.
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
