"""What tables of both forms of `transform/4` store, as named arrays, and how they are checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.levels import Models


def common_arrays(
    scale: float, synthesis: Array, deviations: Array, steps: tuple[int, int], models: Models
) -> dict[str, Array]:
    """What tables of both forms store, as named arrays."""
    return {
        "scale": np.array([scale], np.float32),
        "synthesis": synthesis,
        "deviations": deviations,
        "thirteenths": np.array(steps, np.int32),
        "zero": models.zero,
        "magnitudes": models.magnitudes,
    }


def common_parts(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """What `common_arrays` was given.

    Raises:
        ValueError: an array is of another dtype or shape.
    """
    check("thirteenths", arrays["thirteenths"], np.int32, (2,))
    check("scale", arrays["scale"], np.float32, (1,))
    coarsest, finest = arrays["thirteenths"].tolist()
    return {
        "scale": float(arrays["scale"][0]),
        "synthesis": arrays["synthesis"],
        "deviations": arrays["deviations"],
        "steps": (coarsest, finest),
        "models": Models(arrays["zero"], arrays["magnitudes"]),
    }


def check(name: str, array: Array, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """Check an array of a table.

    Raises:
        ValueError: it is of another dtype or shape.
    """
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"a table's {name} is {array.dtype}{list(array.shape)}, not {np.dtype(dtype)}{list(shape)}")


def check_numbers(arrays: Iterable[Array], scale: float, steps: tuple[int, int]) -> None:
    """Check what tables of both forms have.

    Raises:
        ValueError: a number is not finite, or out of range.
    """
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("a table holds finite numbers")
    if not 1e-30 < scale < 1e30:
        raise ValueError(f"a table's scale is {scale}")
    coarsest, finest = steps
    if not -128 < finest <= coarsest <= 127:
        raise ValueError(f"steps from {coarsest} to {finest}")
