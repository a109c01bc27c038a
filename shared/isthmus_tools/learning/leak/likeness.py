"""Likeness of reconstructions: SSIM of images, correlation of series and vectors, PSNR of all.

Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity",
IEEE Transactions on Image Processing 13(4), 2004.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from isthmus.arrays import Array
from isthmus.artifacts.leak import CORRELATION, SSIM, Likeness

# The paper's constants, of values from 0 to 1.
_C1, _C2 = 0.01**2, 0.03**2
# The paper's window: 11 pixels of a Gaussian of 1.5. Smaller images get a uniform window of at most 7.
_WINDOW, _SIGMA, _SMALL_WINDOW = 11, 1.5, 7
# A reconstruction without error has no finite PSNR, and documents hold finite numbers.
_MAX_PSNR = 100.0
_P95 = 0.95


def ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The mean structural similarity of each pair of images, over channels and the windows that lie inside.

    Differentiable. Shapes: (batch, channels, height, width) of values from 0 to 1; gives (batch,).
    """
    channels = first.shape[1]
    weights = torch.outer(_window(first.shape[2]), _window(first.shape[3])).to(first.dtype)
    kernel = weights.expand(channels, 1, *weights.shape)
    # Moments of both images in a single convolution. Shape: (5 * batch, channels, height, width)
    moments = torch.cat([first, second, first * first, second * second, first * second])
    mean1, mean2, square1, square2, product = functional.conv2d(moments, kernel, groups=channels).chunk(5)
    variance1, variance2 = square1 - mean1**2, square2 - mean2**2
    luminance = (2 * mean1 * mean2 + _C1) / (mean1**2 + mean2**2 + _C1)
    structure = (2 * (product - mean1 * mean2) + _C2) / (variance1 + variance2 + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _window(side: int) -> torch.Tensor:
    if side < _WINDOW:
        # The largest odd width that fits.
        width = min(_SMALL_WINDOW, side - 1 + side % 2)
        return torch.full((width,), 1 / width, dtype=torch.float64)
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights: torch.Tensor = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    normalised: torch.Tensor = weights / weights.sum()
    return normalised


def correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of each pair, over all values; 0 of a constant. Shapes: (batch, …); gives (batch,)."""
    a, b = first.flatten(1).double(), second.flatten(1).double()
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    norms = a.norm(dim=1) * b.norm(dim=1)
    products: torch.Tensor = (a * b).sum(dim=1)
    values: torch.Tensor = products / norms.clamp_min(1e-12)
    return values


def psnr(first: Array, second: Array, peak: float = 1.0) -> Array:
    """Peak signal-to-noise ratio of each pair, in decibels from 0 to 100. Shapes: (batch, …)."""
    error = ((first.astype(np.float64) - second) ** 2).reshape(len(first), -1).mean(axis=1) / peak**2
    return np.asarray((-10 * np.log10(np.maximum(error, 1e-10))).clip(0.0, _MAX_PSNR))


MEASURES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {SSIM: ssim, CORRELATION: correlation}


def similarity(measure: str, originals: Array, reconstructions: Array) -> Array:
    """The document's measure of each pair, in [-1, 1]."""
    # In float64: variances of flat windows are differences of nearly equal numbers.
    values = MEASURES[measure](torch.from_numpy(originals).double(), torch.from_numpy(reconstructions).double())
    return np.asarray(values.numpy().clip(-1.0, 1.0))


def likeness(
    measure: str, originals: Array, reconstructions: Array, same_class: Sequence[bool] | None = None
) -> Likeness:
    """The likeness of all pairs; `same_class` says of each pair whether both get the same class."""
    values = similarity(measure, originals, reconstructions)
    # Pixels have the range 1 by their format; series and vectors that of the inputs at hand.
    peak = 1.0 if measure == SSIM else float(np.ptp(originals)) or 1.0
    decibels = psnr(originals, reconstructions, peak)
    return Likeness(
        similarity=round(float(values.mean()), 6),
        p95=round(float(np.quantile(values, _P95)), 6),
        psnr=round(float(decibels.mean()), 4),
        top1=None if same_class is None else round(sum(same_class) / len(same_class), 6),
    )
