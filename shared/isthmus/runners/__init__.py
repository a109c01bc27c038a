"""Running a segment: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from isthmus.bundle import ANY, Segment, TensorSpec
from isthmus.codecs import TensorType
from isthmus.errors import ShapeMismatch

Array = np.ndarray[Any, np.dtype[Any]]


class Runner(Protocol):
    """A loaded segment, ready to run any number of times, from any thread."""

    @property
    def segment(self) -> Segment:
        """What it runs."""
        ...

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The segment's outputs by name.

        Shapes: as `segment.inputs` and `segment.outputs` declare; free dimensions take any size.

        Raises:
            ShapeMismatch: a tensor is missing, unknown, or of another dtype or shape; or the graph refused the shapes.
            ValueRefused: the graph refused a tensor's values, such as an index beyond a table.
            RunFailed: the runtime failed for a reason of its own.
        """
        ...


_name = lru_cache(64)(lambda dtype: dtype.name)  # numpy makes it anew whenever it is asked


def check_tensors(specs: tuple[TensorSpec, ...], arrays: Mapping[str, Array]) -> None:
    """Refuse arrays that are not what `specs` declare; a free dimension of one name has one size everywhere.

    Raises:
        ShapeMismatch: names the tensor, what was expected and what came.
    """
    check_types(specs, {name: TensorType(_name(array.dtype), array.shape) for name, array in arrays.items()})


def check_types(specs: tuple[TensorSpec, ...], types: Mapping[str, TensorType]) -> None:
    """`check_tensors` of tensors that are not there yet, by what is declared of them.

    Raises:
        ShapeMismatch: as `check_tensors`.
    """
    expected = {s.name: s for s in specs}
    if expected.keys() != types.keys():
        absent, extra = sorted(expected.keys() - types.keys()), sorted(types.keys() - expected.keys())
        parts = [f"missing {', '.join(absent)}"] * bool(absent) + [f"unknown {', '.join(extra)}"] * bool(extra)
        raise ShapeMismatch(
            f"the tensors do not fit: {'; '.join(parts)}",
            tensor=(absent or extra)[0],
            expected=[describe(s.dtype, s.shape, s.name) for s in specs],
            got=sorted(types),
        )
    free: dict[str, int] = {}
    for name, spec in expected.items():
        dtype, shape = types[name]
        fits = dtype == spec.dtype and len(shape) == len(spec.shape)
        if fits and shape != spec.shape:
            fits = all(
                dim == ANY or size == (free.setdefault(dim, size) if isinstance(dim, str) else dim)
                for dim, size in zip(spec.shape, shape, strict=True)
            )
        if not fits:
            wanted, came = describe(spec.dtype, spec.shape), describe(dtype, shape)
            bound = ", ".join(f"{dim} is {size}" for dim, size in free.items() if dim in spec.shape)
            raise ShapeMismatch(
                f"{name} is {came}; expected {wanted}" + (f" where {bound}" if bound else ""),
                tensor=name,
                expected=wanted,
                got=came,
            )


def describe(dtype: str, shape: tuple[int | str, ...], name: str = "") -> str:
    """`float32[1, 3, h, w]`, after its name where one is given."""
    return f"{name + ' ' if name else ''}{dtype}[{', '.join(map(str, shape))}]"
