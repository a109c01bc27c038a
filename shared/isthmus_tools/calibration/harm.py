"""What sensitivity says of a basis: how much noise harms in each direction, and the basis in which it harms alike."""

from __future__ import annotations

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import CalibrationError
from isthmus_tools.calibration.sensitivity import RING_EDGES, Sensitivity

SHRINK = 0.05
"""Of the mean sensitivity, added to all, so that no direction is taken for harmless."""


def harm_of(sensitivity: Sensitivity | None, channels: int) -> Array:
    """The sensitivity's channels, (C, C), of mean eigenvalue 1 and shrunk.

    Raises:
        CalibrationError: it is of another number of channels.
    """
    if sensitivity is None or not np.trace(sensitivity.channels) > 0:
        return np.eye(channels)
    if sensitivity.channels.shape != (channels, channels):
        raise CalibrationError(
            f"the sensitivity is of {len(sensitivity.channels)} channels, the samples have {channels}"
        )
    scaled = sensitivity.channels * (channels / np.trace(sensitivity.channels))
    return np.asarray((scaled + SHRINK * np.eye(channels)) / (1 + SHRINK))


def band_weights(sensitivity: Sensitivity | None, edges: tuple[float, ...], size: tuple[int, int]) -> Array:
    """How much noise in each band harms relative to all, from the rings that its coefficients lie in."""
    bands = len(edges) + 1
    if sensitivity is None or bands == 1:
        return np.ones(bands)
    height, width = size
    u, v = np.arange(height) / height, np.arange(width) / width
    radius = np.sqrt(u[:, None] ** 2 + v[None] ** 2).reshape(-1)
    of_ring = sensitivity.rings[np.searchsorted(np.asarray(RING_EDGES), radius, side="left")]
    band = np.searchsorted(np.asarray(edges), radius, side="left")
    counts = np.bincount(band, minlength=bands)
    weights = np.bincount(band, of_ring, bands) / np.maximum(counts, 1)
    return np.asarray(np.where(counts > 0, np.maximum(weights, SHRINK), 1.0))


def equal_harm(covariance: Array, harm: Array) -> Array:
    """Of a basis in which equal noise does equal harm, the one in which components are uncorrelated.

    With U the eigenvectors of H^1/2 S H^1/2, it is H^-1/2 U: components U^T H^1/2 (x - mean).
    """
    values, vectors = np.linalg.eigh(harm)
    root = np.sqrt(np.maximum(values, 1e-9 * values[-1]))
    half, inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    _, rotation = np.linalg.eigh(half @ covariance @ half)
    return np.asarray(inverse @ rotation[:, ::-1])
