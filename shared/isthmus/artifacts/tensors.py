"""Declarations of tensors: dtypes and shapes, and the check of one against another. Without numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple, TypeAlias

from msgspec import Meta, Struct

from isthmus.artifacts.constraints import Count, Text
from isthmus.errors import ShapeMismatch

Dim: TypeAlias = Count | Text
MAX_RANK = 64
"""Axes of a tensor: numpy's own bound."""
ANY = "?"
"""A free dimension without a name: it need not agree with any other."""


class TensorType(NamedTuple):
    """A tensor's dtype, by numpy's name, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A named tensor's dtype (numpy's name, or bfloat16) and shape; a str dimension is free."""

    name: Text
    dtype: Text
    shape: Annotated[tuple[Dim, ...], Meta(max_length=MAX_RANK)]


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
        matches = dtype == spec.dtype and len(shape) == len(spec.shape)
        if matches and shape != spec.shape:
            matches = all(
                dim == ANY or size == (free.setdefault(dim, size) if isinstance(dim, str) else dim)
                for dim, size in zip(spec.shape, shape, strict=True)
            )
        if not matches:
            expected_type, came = describe(spec.dtype, spec.shape), describe(dtype, shape)
            bound = ", ".join(f"{dim} is {size}" for dim, size in free.items() if dim in spec.shape)
            raise ShapeMismatch(
                f"{name} is {came}; expected {expected_type}" + (f" where {bound}" if bound else ""),
                tensor=name,
                expected=expected_type,
                got=came,
            )


def describe(dtype: str, shape: tuple[int | str, ...], name: str = "") -> str:
    """`float32[1, 3, h, w]`, after its name where one is given."""
    return f"{name + ' ' if name else ''}{dtype}[{', '.join(map(str, shape))}]"
