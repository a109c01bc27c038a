"""What the tests of `transform/4` pack, tensors as models make them, and the tables and models by which they do."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.arrays import Array
from isthmus.codecs import Encoding
from isthmus.codecs.transform.codec import TRANSFORM
from isthmus.codecs.transform.levels import ESCAPE, LEVELS, EntropyModels
from isthmus.codecs.transform.planes import Layout
from isthmus.codecs.transform.rows import RowTable
from isthmus.codecs.transform.table import PlaneTable
from isthmus_tools.calibration.transforms import learn_planes

SHAPES = {
    "maps": (1, 12, 14, 14),
    "maps, channels last": (1, 9, 10, 16),
    "large maps": (1, 4, 24, 24),
    "tokens": (1, 24, 16),
    "batches": (3, 6, 5, 5),
    "vectors": (2, 20),
    "one axis": (20,),
}
LAYOUTS = {"maps": Layout(4, 1), "maps, channels last": Layout(4, 3), "large maps": Layout(4, 1)}


def activations(shape: tuple[int, ...], count: int = 24, seed: int = 0) -> list[Array]:
    """Tensors of some structure: smooth planes, correlated channels, heavy tails, means that are not zero."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(shape[-1], shape[-1]))
    found = []
    for _ in range(count):
        noise = rng.standard_t(6, size=shape) @ mixed
        smooth = noise if len(shape) < 3 else np.cumsum(noise, axis=1) / 3
        found.append((smooth + rng.normal() + 2).astype(np.float32))
    return found


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[PlaneTable, Array]]:
    """For each kind of tensor a table, and one that it was not learned from."""
    made = {}
    for kind, shape in SHAPES.items():
        samples = activations(shape)
        made[kind] = (learn_planes(samples[1:], layout=LAYOUTS.get(kind)), samples[0])
    return made


def round_trip(array: Array, table: PlaneTable | RowTable, quality: float) -> tuple[bytes, Array]:
    payload = TRANSFORM.encode(array, Encoding("transform/4", quality, table))
    return payload, TRANSFORM.decode(memoryview(payload), array.dtype, array.shape, table)


def golden_models() -> EntropyModels:
    """Models made of integers alone."""
    zero = [max(65536 * (LEVELS - level) // (LEVELS + 1), 600) for level in range(LEVELS)]
    magnitudes = []
    for level in range(LEVELS):
        row = [max(4096 * (level + 1) ** k // (level + 2) ** (k + 1), 1) for k in range(ESCAPE)]
        row[0] += 4096 - sum(row)
        magnitudes.append(row)
    return EntropyModels(np.array(zero, np.uint16), np.array(magnitudes, np.uint16))


def laplace_models() -> EntropyModels:
    """Each level's own: Laplace's distribution, rounded to whole numbers."""
    decay = np.exp(-np.sqrt(2) / 2.0 ** ((np.arange(LEVELS) - 12) / 2))
    magnitudes = np.maximum(4096 * (1 - decay[:, None]) * decay[:, None] ** np.arange(ESCAPE), 1).astype(np.uint16)
    magnitudes[:, ESCAPE - 1] = np.maximum(4096 * decay ** (ESCAPE - 1), 1)
    magnitudes[:, 0] += (4096 - magnitudes.sum(axis=1)).astype(np.uint16)
    zero = np.clip(65536 * (1 - np.sqrt(decay)), 1, 65535).astype(np.uint16)
    return EntropyModels(zero, magnitudes)
