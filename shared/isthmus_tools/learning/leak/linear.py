"""The linear attacker: ridge regression from boundary tensors to inputs, in closed form.

The better of two forms counts. The local form maps the neighbourhood of each place of the maps to the patch of
the input there, and suits cuts that keep places; the global form maps all values of an input to all of its pixels, in
the dual, and suits vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from isthmus.arrays import Array
from isthmus_tools.learning.leak.activations import Crossings, Features

# Shares of the mean squared feature; the best on a fifth of the training inputs counts.
_PENALTIES = tuple(10.0**power for power in range(-6, 4))
_VALIDATION = 5
# Columns of the local regression's table: neighbourhoods of 3 x 3 up to this number, single places else.
_MAX_COLUMNS = 1600
# Rows of that table; more places than this are sampled.
_MAX_ROWS = 60_000
_BLOCK = 4096


def reconstruct_linearly(crossings: Crossings, score: Callable[[Array], float], seed: int = 0) -> Array:
    """The held-out inputs as the better of both regressions reconstructs these, in units.

    `score` is the likeness of held-out reconstructions. Shapes: (inputs, channels, height, width).
    """
    candidates = [_global(crossings)]
    if (local := _local(crossings, seed)) is not None:
        candidates.append(local)
    return max(candidates, key=score)


def _global(crossings: Crossings) -> Array:
    """Ridge regression over all values, by the kernel of inner products."""
    training, held_out = np.arange(crossings.trained), crossings.held_out
    everything = np.concatenate([training, held_out])
    kernel = np.zeros((len(everything), len(training)))
    for features in crossings.features:
        kernel += _inner_products(features, everything, training)
    targets = crossings.targets[: crossings.trained].reshape(crossings.trained, -1).astype(np.float64)
    gram = kernel[: len(training)]
    mean = targets.mean(axis=0)
    # A fifth chooses the penalty; then all training inputs count.
    validating = training % _VALIDATION == 0
    fitting = ~validating
    unit = float(np.trace(gram)) / len(training) or 1.0
    penalty = _chosen_penalty(
        gram[np.ix_(fitting, fitting)],
        targets[fitting] - mean,
        gram[np.ix_(validating, fitting)],
        targets[validating] - mean,
        unit,
    )
    weights = np.linalg.solve(gram + penalty * np.eye(len(gram)), targets - mean)
    predicted = kernel[len(training) :] @ weights + mean
    return np.asarray(predicted.reshape(len(held_out), *crossings.targets.shape[1:]), np.float32)


def _inner_products(features: Features, rows: Array, columns: Array, size: int = 64) -> Array:
    """Inner products of standardised features, in blocks: tables of all values would not fit in memory."""
    products = np.zeros((len(rows), len(columns)))
    for j in range(0, len(columns), size):
        right = features.batch(columns[j : j + size]).flatten(1).numpy()
        for i in range(0, len(rows), size):
            left = features.batch(rows[i : i + size]).flatten(1).numpy()
            products[i : i + size, j : j + size] = left @ right.T
    return products


def _local(crossings: Crossings, seed: int) -> Array | None:
    """Ridge regression from neighbourhoods to patches; None without maps, or with too many channels."""
    maps = [features for features in crossings.features if features.is_map]
    channels = sum(features.values.shape[1] for features in maps)
    if not maps or channels > _MAX_COLUMNS:
        return None
    height, width = crossings.targets.shape[2:]
    grid = max(f.values.shape[2] for f in maps), max(f.values.shape[3] for f in maps)
    patch = -(-height // grid[0]), -(-width // grid[1])
    reach = 1 if 9 * channels <= _MAX_COLUMNS else 0
    canvas = grid[0] * patch[0], grid[1] * patch[1]
    training = np.arange(crossings.trained)
    rng = np.random.default_rng(seed)
    each = max(1, min(grid[0] * grid[1], _MAX_ROWS // len(training)))
    xs, ys = [], []
    for index in range(crossings.trained):
        x, y = _table(crossings, maps, [index], grid, reach), _patches(crossings, [index], canvas, patch)
        # Places of every input rather than all places of a few: neighbours are alike.
        places = rng.permutation(len(x))[:each]
        xs.append(x[places])
        ys.append(y[places])
    weights = _solve(np.concatenate(xs), np.concatenate(ys), each)
    reconstructions = []
    for start in range(crossings.trained, len(crossings.targets), 16):
        rows = range(start, min(start + 16, len(crossings.targets)))
        flat = _table(crossings, maps, rows, grid, reach) @ weights
        # (inputs * places, channels * patch) back to pixels.
        columns = torch.from_numpy(flat.astype(np.float32)).reshape(len(rows), -1, flat.shape[1]).transpose(1, 2)
        images = functional.fold(columns, canvas, kernel_size=patch, stride=patch)
        reconstructions.append(_resized(images, (height, width)).numpy())
    return np.concatenate(reconstructions)


def _table(
    crossings: Crossings, maps: Sequence[Features], indices: Sequence[int], grid: tuple[int, int], reach: int
) -> Array:
    """The neighbourhoods of all places of some inputs, and a column of ones."""
    tensors = [_resized(features.batch(list(indices)), grid) for features in maps]
    columns = functional.unfold(torch.cat(tensors, dim=1), 2 * reach + 1, padding=reach)
    rows = columns.transpose(1, 2).reshape(-1, columns.shape[1]).numpy()
    return np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)


def _patches(crossings: Crossings, indices: Sequence[int], canvas: tuple[int, int], patch: tuple[int, int]) -> Array:
    images = _resized(torch.from_numpy(crossings.targets[list(indices)]), canvas)
    columns = functional.unfold(images, patch, stride=patch)
    return np.asarray(columns.transpose(1, 2).reshape(-1, columns.shape[1]).numpy())


def _resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if images.shape[2:] == size:
        return images
    return functional.interpolate(images, size, mode="bilinear", align_corners=False)


def _solve(x: Array, y: Array, each: int) -> Array:
    """The ridge regression's weights; the rows of an input are beside each other, `each` in number."""
    validating = (np.arange(len(x)) // each) % _VALIDATION == 0
    covariance, cross = np.zeros((x.shape[1], x.shape[1])), np.zeros((x.shape[1], y.shape[1]))
    for rows in np.array_split(np.flatnonzero(~validating), -(-len(x) // _BLOCK)):
        # Sums in float64, in blocks: a copy of the whole table would double its memory.
        block = x[rows].astype(np.float64)
        covariance += block.T @ block
        cross += block.T @ y[rows]
    unit = float(np.trace(covariance)) / len(covariance) or 1.0
    penalty = _chosen_penalty(covariance, cross, x[validating], y[validating], unit)
    return np.asarray(np.linalg.solve(covariance + penalty * np.eye(len(covariance)), cross))


def _chosen_penalty(system: Array, cross: Array, x: Array, y: Array, unit: float) -> float:
    """The penalty, a multiple of `unit`, under which the ridge regression errs least on the rows left out, x and y.

    Shapes: system (features, features), cross (features, outputs), x (rows, features), y (rows, outputs).
    """
    # One decomposition for all penalties.
    values, vectors = np.linalg.eigh(system)
    projected, validation = vectors.T @ cross, x @ vectors

    def error(penalty: float) -> float:
        predicted = validation @ (projected / (values.clip(0) + penalty)[:, None])
        return float(((predicted - y) ** 2).mean())

    return min((share * unit for share in _PENALTIES), key=error)
