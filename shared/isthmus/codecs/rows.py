"""`transform/4` of what has no planes: token sequences, vectors, states. Each row of channels has a class.

A tensor is rows of channels: one for each token, or one in all. The encoder picks each row's class, says so in a few
plain bits, and codes what is left after the class's mean; a class knows how much each component deviates then. So a
token that is nearly constant costs next to nothing. docs/codecs.md, "Rows".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.classes import CLASSES, MAX_NUMBERS, Classes
from isthmus.codecs.levels import Models
from isthmus.codecs.row_layout import RowLayout
from isthmus.codecs.stored import check, check_numbers, common_arrays, common_parts
from isthmus.codecs.table import OCTAVE, ZERO_DEVIATION, Sorting, Table

_FEW_ROWS, _KEPT_VALUES, _MAX_SORTINGS = 16, 2**17, 64
"""Rows whose classes come again: a state's, a vector's; of how many values the order is kept, 3 MB; of how often."""

NAMES = ("rows", "means", "weights", "scale", "synthesis", "deviations", "thirteenths", "zero", "magnitudes")


@dataclass(frozen=True, eq=False)
class RowTable:
    """What was learned of rows of C channels in K classes.

    `means` float32 (K, C), of channels. `weights` int8 (K,): how much finer the steps of a class's rows are than the
    tensor's, in eighths of an octave. `synthesis` float16 (C, C), or (C,) where components are the channels, each
    scaled; times `scale` it gives channels from components. `deviations` uint8 (K, C) of the components, weighted: see
    ZERO_DEVIATION. `steps` are the coarsest and the finest; see `steps.size_of`.
    """

    layout: RowLayout
    means: Array
    weights: Array
    scale: float
    synthesis: Array
    deviations: Array
    steps: tuple[int, int]
    models: Models
    _sortings: dict[bytes, Sorting] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every bound.

        Raises:
            ValueError: names the part that does not fit.
        """
        channels, classes = self.channels, len(self.means)
        if classes not in CLASSES or classes * channels > MAX_NUMBERS:
            raise ValueError(f"a table of {classes} classes of {channels} channels")
        check("means", self.means, np.float32, (classes, channels))
        check("weights", self.weights, np.int8, (classes,))
        check("synthesis", self.synthesis, np.float16, (channels,) * min(self.synthesis.ndim, 2))
        check("deviations", self.deviations, np.uint8, (classes, channels))
        check_numbers((self.means, self.synthesis), self.scale, self.steps)

    @property
    def channels(self) -> int:
        return self.layout.channels

    @property
    def bits(self) -> int:
        """Of a row's class."""
        return (len(self.means) - 1).bit_length()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that `to_arrays` gives."""
        return sum(a.nbytes for a in self.to_arrays().values())

    @cached_property
    def analysis_at_work(self) -> Array:
        """float32, of `synthesis`'s shape: what gives components from channels.

        Raises:
            ValueError: a rotation has no inverse.
        """
        scaled = self.synthesis.astype(np.float64) * self.scale
        try:
            if scaled.ndim == 1 and not scaled.all():
                raise np.linalg.LinAlgError("a factor of zero")
            inverse = 1 / scaled if scaled.ndim == 1 else np.linalg.inv(scaled)
        except np.linalg.LinAlgError as e:
            raise ValueError(f"a table's rotation has no inverse: {e}") from e
        return np.asarray(inverse, np.float32)

    @cached_property
    def synthesis_at_work(self) -> Array:
        """float32, of `synthesis`'s shape: what multiplies components in units."""
        return self.synthesis.astype(np.float32) * np.float32(self.scale)

    @property
    def centres(self) -> Array:
        """The classes' means as components, (K, C)."""
        return self.classes.centres

    @cached_property
    def factors(self) -> Array:
        """What a row's components are weighted by, float32 (K, 1)."""
        return np.exp2(self.weights.astype(np.float32) / OCTAVE)[:, None]

    def sorting(self, classes: Array) -> Sorting:
        """Where the components of rows of these classes, uint16, go; row by row they lie before. Of few, it is kept."""
        key = classes.tobytes()
        found = self._sortings.get(key)
        if found is None:
            found = Sorting.of(self.deviations[classes].reshape(-1), self.models)
            if len(classes) <= _FEW_ROWS:
                if len(self._sortings) >= min(max(_KEPT_VALUES // found.count, 1), _MAX_SORTINGS):
                    self._sortings.clear()
                self._sortings[key] = found
        return found

    @cached_property
    def classes(self) -> Classes:
        """What tells a row's class; weights have no say, for what matters less is no likelier."""
        spread = np.exp2((self.deviations.astype(np.float32) - ZERO_DEVIATION) / OCTAVE) / self.factors
        return Classes.of(applied(self.analysis_at_work, self.means), np.square(spread))

    def to_arrays(self) -> dict[str, Array]:
        """This table as named arrays, to be stored."""
        axes = zip(self.layout.axes, self.layout.sizes_of, strict=True)
        return {
            "rows": np.array([self.layout.rank, *(n for pair in axes for n in pair)], np.int32),
            "means": self.means,
            "weights": self.weights,
            **common_arrays(self.scale, self.synthesis, self.deviations, self.steps, self.models),
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, Array]) -> RowTable:
        """Read what `to_arrays` gave.

        Raises:
            ValueError: an array is missing, unknown, of another dtype or shape, or out of bounds.
        """
        if arrays.keys() != set(NAMES):
            raise ValueError(f"a table of rows has exactly the arrays {', '.join(NAMES)}")
        rows = arrays["rows"]
        if rows.dtype != np.int32 or rows.ndim != 1 or rows.size not in (3, 5, 7, 9):
            raise ValueError("a table's rows are axes and their sizes, in int32")
        if arrays["means"].ndim != 2 or arrays["synthesis"].ndim not in (1, 2):
            raise ValueError("a table's means have two axes, its synthesis one or two")
        common = common_parts(arrays)
        rank, *pairs = rows.tolist()
        return RowTable(
            layout=RowLayout(rank, tuple(pairs[::2]), tuple(pairs[1::2])),
            means=arrays["means"],
            weights=arrays["weights"],
            **common,
        )


def read_table(arrays: Mapping[str, Array]) -> Table | RowTable:
    """A table of either form, as `to_arrays` gave it.

    Raises:
        ValueError: it is neither.
    """
    return RowTable.from_arrays(arrays) if "rows" in arrays else Table.from_arrays(arrays)


def applied(matrix: Array, rows: Array) -> Array:
    """`matrix` (C, C) or its diagonal (C,) times each row."""
    return rows * matrix if matrix.ndim == 1 else np.asarray(rows @ matrix.T)
