"""Tensor declarations: dtypes, shapes, and validation against each other. Independent of numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple, TypeAlias

from msgspec import Meta, Struct

from isthmus.artifacts.constraints import Count, Text
from isthmus.errors import ShapeMismatch

Dim: TypeAlias = Count | Text
DTYPE_NAMES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16"),
)
"""The dtypes of frames, by numpy's names."""
# numpy's own bound on axes.
MAX_RANK = 64
# An anonymous free dimension, unrelated to all other dimensions.
ANY = "?"


class TensorType(NamedTuple):
    """The dtype, by numpy's name, and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """The dtype (numpy's name, or bfloat16) and shape of a named tensor; a str dimension is free."""

    name: Text
    dtype: Text
    shape: Annotated[tuple[Dim, ...], Meta(max_length=MAX_RANK)]


def check_types(specs: tuple[TensorSpec, ...], types: Mapping[str, TensorType]) -> None:
    """Check dtypes and shapes against `specs`, before any tensor is decoded; a named free dimension has one size
    throughout.

    Raises:
        ShapeMismatch: a tensor is absent, unknown, or of another dtype or shape.
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
            # A named dimension takes the size of its first occurrence.
            matches = all(
                dim == ANY or size == (free.setdefault(dim, size) if isinstance(dim, str) else dim)
                for dim, size in zip(spec.shape, shape, strict=True)
            )
        if not matches:
            expected_type, received = describe(spec.dtype, spec.shape), describe(dtype, shape)
            bound = ", ".join(f"{dim} is {size}" for dim, size in free.items() if dim in spec.shape)
            raise ShapeMismatch(
                f"{name} is {received}; expected {expected_type}" + (f" where {bound}" if bound else ""),
                tensor=name,
                expected=expected_type,
                got=received,
            )


def describe(dtype: str, shape: tuple[int | str, ...], name: str = "") -> str:
    """`float32[1, 3, h, w]`, after `name` if given."""
    return f"{name + ' ' if name else ''}{dtype}[{', '.join(map(str, shape))}]"
