"""Where the rows of a tensor lie: its channels at one place, or a state's at all layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.table import MAX_CHANNELS


@dataclass(frozen=True)
class RowLayout:
    """A tensor's number of axes, and the axes that make up a row, with their sizes; the others count the rows."""

    rank: int
    axes: tuple[int, ...]
    sizes_of: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 4 or not self.axes or len(self.axes) != len(self.sizes_of):
            raise ValueError(f"no rows lie on axes {self.axes} of {self.rank}")
        if list(self.axes) != sorted(set(self.axes)) or not 0 <= self.axes[0] <= self.axes[-1] < self.rank:
            raise ValueError(f"no rows lie on axes {self.axes} of {self.rank}")
        if min(self.sizes_of) < 1 or not math.prod(self.sizes_of) <= MAX_CHANNELS:
            raise ValueError(f"rows of {self.sizes_of} values; at most {MAX_CHANNELS}")

    @property
    def channels(self) -> int:
        return math.prod(self.sizes_of)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(1, channels, rows, 1) of a tensor of that shape: as `planes.Layout` has them.

        Raises:
            ValueError: another number of axes, or rows of another size.
        """
        if len(shape) != self.rank:
            raise ValueError(f"a tensor of {len(shape)} axes; the table was learned for {self.rank}")
        if tuple(shape[a] for a in self.axes) != self.sizes_of:
            raise ValueError(f"a tensor of {list(shape)} channels; the table has rows of {list(self.sizes_of)}")
        return 1, self.channels, math.prod(shape) // self.channels, 1

    def forward(self, array: Array) -> Array:
        """`array` as (1, rows, channels), a view where that can be."""
        _, channels, rows, _ = self.sizes(array.shape)
        ends = range(self.rank - len(self.axes), self.rank)
        return np.moveaxis(array, self.axes, ends).reshape(1, rows, channels)

    def backward(self, planes: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `forward`."""
        others = [size for axis, size in enumerate(shape) if axis not in self.axes]
        ends = range(self.rank - len(self.axes), self.rank)
        return np.moveaxis(planes.reshape(*others, *self.sizes_of), ends, self.axes)
