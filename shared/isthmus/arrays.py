"""Arrays: the dtypes of frames, validation of arrays against tensor specs, and the inputs of declared state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from msgspec import UNSET

from isthmus.artifacts.state import State
from isthmus.artifacts.tensors import DTYPE_NAMES, TensorSpec, TensorType, check_types

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# The dtypes of frames by name, little-endian as on the wire.
DTYPES: Mapping[str, np.dtype[Any]] = {
    # numpy itself has no bfloat16.
    name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name).newbyteorder("<").str)
    for name in DTYPE_NAMES
}


def restore_bfloat16(array: Array) -> Array:
    """The array before numpy wrote a .npy file, in which bfloat16 is an unnamed two-byte type."""
    if array.dtype.kind == "V" and array.dtype.names is None and array.dtype.itemsize == 2:
        return array.view(DTYPES["bfloat16"])
    return array


# numpy computes a dtype's name at every access.
_name = lru_cache(64)(lambda dtype: dtype.name)


def check_tensors(specs: tuple[TensorSpec, ...], arrays: Mapping[str, Array]) -> None:
    """Check arrays against `specs`; a named free dimension has one size throughout.

    Raises:
        ShapeMismatch: the message names the tensor, the expected type and the received type.
    """
    check_types(specs, {name: TensorType(_name(array.dtype), array.shape) for name, array in arrays.items()})


def supplied_inputs(state: State, lengths: Array, scored: int) -> dict[str, Array]:
    """The inputs of a step beside the state's memory and the step's own; a segment takes those that it has.

    Shapes: lengths (rows,) int32: the tokens of each row with the new ones, less one. `scored` is how many of the last
    positions get scores, where the model has the input for it.
    """
    inputs = {state.lengths: lengths, state.total: np.array(lengths.max() + 1, np.int32)}
    return inputs if state.scored is UNSET else {**inputs, state.scored: np.array(scored, np.int64)}


def empty_state(state: State, specs: Iterable[TensorSpec]) -> dict[str, Array]:
    """The state of one row before its first step: of `specs`, the inputs with a past."""
    pasts = {pair.past for pair in state.pairs}
    empty: dict[str, Array] = {}
    for spec in specs:
        if spec.name in pasts:
            # The free size beside the past is the batch.
            sizes = [size if isinstance(size, int) else 1 for size in spec.shape]
            sizes[state.axis] = 0
            empty[spec.name] = np.zeros(sizes, DTYPES[spec.dtype])
    return empty
