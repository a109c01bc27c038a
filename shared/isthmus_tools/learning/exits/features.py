"""Features of the activations at a cut: means over the cells of a grid, extremes and first tokens, of bounded width.

A pool is data: `graph.exit_branch` writes the same operations as nodes, in the same order and in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import LearningError
from isthmus_tools.calibration.layouts import plane_layout
from isthmus_tools.graph.exit_branch import LEAST_REAL, PADDED, TensorPool, TokenMask
from isthmus_tools.learning.exits.padding import real_tokens

MAX_FEATURES = 1280
"""Of a cut: the Gram matrix and its eigenvectors take 13 MB each, and the eigendecomposition a second."""
# Finer grids than 7 x 7 add features and no accuracy, as measured on digits after one and two blocks.
_MAX_CELLS = 7
_MAX_RANK = 4


def pools_for(
    specs: Sequence[TensorSpec], arrays: Mapping[str, Array], masks: Sequence[TokenMask] = ()
) -> list[TensorPool]:
    """The pools of a cut's float tensors but for `masks`; `arrays` are an example input's, in a batch of 1.

    Raises:
        LearningError: no tensor of floats with the batch first, or more channels than features.
    """
    hidden = {mask.tensor for mask in masks}
    usable = [spec for spec in specs if spec.name not in hidden and _is_usable(spec, arrays[spec.name])]
    if not usable:
        names = ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs)
        raise LearningError(f"nothing at this cut can be pooled: {names}")
    pools: dict[str, TensorPool] = {}
    left_over = MAX_FEATURES
    # Small tensors first, such as masks, so that the large ones share what is left of the features.
    for index, spec in enumerate(sorted(usable, key=lambda spec: arrays[spec.name].size)):
        with np.errstate(over="ignore", invalid="ignore"):
            pool = _pool(spec, arrays[spec.name], left_over // (len(usable) - index))
        pools[spec.name] = replace(pool, mask=_mask_of(pool, arrays, masks))
        left_over -= pool.width
    if left_over < 0:
        width = MAX_FEATURES - left_over
        raise LearningError(f"the cut has {width} features even as means; at most {MAX_FEATURES} are fitted")
    return [pools[spec.name] for spec in usable]


def features_of(pools: Sequence[TensorPool], arrays: Mapping[str, Array]) -> Array:
    """Features of a batch. Shapes: (batch, features) float32."""
    # A float too large for a mean is infinity, as in the graph: the fit leaves such features out.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.concatenate([pooled(pool, arrays) for pool in pools], axis=1)


def pooled(pool: TensorPool, arrays: Mapping[str, Array]) -> Array:
    """The features of a tensor. Shapes: (batch, width) float32."""
    x = arrays[pool.tensor].astype(np.float32)
    if pool.channels_last:
        x = np.moveaxis(x, -1, 1)  # (batch, channels, places…)
    batch = len(x)
    # Vectors have no places to take means over.
    if x.ndim == 2:
        return x if pool.columns is None else x @ pool.columns
    if pool.magnitudes:
        x = np.concatenate([x, np.abs(x)], axis=1)
    real = None if pool.mask is None else real_tokens(pool.mask, arrays[pool.mask.tensor])[:, None]
    cells = _means(pool, x if real is None else np.where(real, x, np.float32(0)))
    if real is not None:
        cells = cells / np.maximum(_means(pool, real.astype(np.float32)), LEAST_REAL)
    parts = [cells.reshape(batch, -1)]
    if pool.extremes:
        values = x if real is None else np.where(real, x, PADDED)
        parts.append(values.max(axis=tuple(range(2, x.ndim))))
    if pool.first:
        parts.append(x[:, :, 0])
    return np.concatenate(parts, axis=1)


def _means(pool: TensorPool, x: Array) -> Array:
    """Means over cells, or over all places. Shapes: (batch, channels, cells…)."""
    if pool.columns is None:
        means: Array = x.mean(axis=tuple(range(2, x.ndim)), dtype=np.float32, keepdims=True)
        return means
    cells: Array = x @ pool.columns
    # (batch, channels, cells, cells)
    return cells if pool.rows is None else np.matmul(pool.rows, cells)


def _mask_of(pool: TensorPool, arrays: Mapping[str, Array], masks: Sequence[TokenMask]) -> TokenMask | None:
    """The mask with a value for each place of a sequence."""
    x = arrays[pool.tensor]
    places = x.shape[1 if pool.channels_last else 2] if x.ndim == 3 else 0
    fitting = (mask for mask in masks if arrays[mask.tensor].shape[1 if mask.is_trailing else -1] == places)
    return next(fitting, None)


def _is_usable(spec: TensorSpec, array: Array) -> bool:
    return spec.dtype.startswith(("float", "bfloat")) and 2 <= array.ndim <= _MAX_RANK and len(array) == 1


def _pool(spec: TensorSpec, array: Array, budget: int) -> TensorPool:
    if array.ndim == 2:
        # Wider vectors are means over neighbours, such as the places of a flattened map.
        width = array.shape[1]
        columns = None if width <= budget else _cells(width, budget)
        return TensorPool(spec.name, spec.dtype, min(width, budget), columns=columns)
    channels_last = plane_layout(array).channel_axis != 1
    x = np.moveaxis(array, -1, 1) if channels_last else array
    declared = [*spec.shape[1:-1]] if channels_last else [*spec.shape[2:]]
    # Means of values and magnitudes span means behind a ReLU, which tell more than those before it.
    magnitudes = float(x.min()) < 0 and 2 * 4 * x.shape[1] <= budget
    channels, places = (1 + magnitudes) * x.shape[1], x.shape[2:]
    # A free size has no fixed cells: then means over all places alone.
    is_fixed = all(isinstance(size, int) for size in declared)
    if array.ndim == 4:
        side = _side(channels, min(places), budget) if is_fixed else 0
        rows, columns = (_cells(places[0], side).T.copy(), _cells(places[1], side)) if side else (None, None)
        return TensorPool(
            spec.name,
            spec.dtype,
            channels * max(1, side) ** 2,
            rows=rows,
            columns=columns,
            channels_last=channels_last,
            magnitudes=magnitudes,
        )
    # Sequences: the first token may summarise the text, time series have peaks.
    parts = budget // channels
    # In the order of use: means, then peaks, then the first token.
    extremes, first = parts >= 2, parts >= 3
    cells = min(places[0], _MAX_CELLS, parts - extremes - first) if is_fixed else 1
    columns = _cells(places[0], cells) if is_fixed and cells > 1 else None
    width = channels * (max(1, cells) + extremes + first)
    return TensorPool(
        spec.name,
        spec.dtype,
        width,
        columns=columns,
        channels_last=channels_last,
        magnitudes=magnitudes,
        extremes=extremes,
        first=first,
    )


def _side(channels: int, places: int, budget: int) -> int:
    """The cells of a grid's side; 0 where not even two fit."""
    side = min(_MAX_CELLS, places, int(np.sqrt(budget / channels)))
    return side if side > 1 else 0


def _cells(size: int, count: int) -> Array:
    """The matrix that takes means over `count` parts of an axis, overlapping by a place where sizes do not divide.

    Shapes: (size, count) float32.
    """
    matrix = np.zeros((size, count), np.float32)
    for cell in range(count):
        start, stop = cell * size // count, -(-(cell + 1) * size // count)
        matrix[start:stop, cell] = 1 / (stop - start)
    return matrix
