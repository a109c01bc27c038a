"""Which class each row of channels is of, and how that travels.

The encoder looks for the likeliest class among those few that lie nearest by the components that part them best: 2,048
classes take 0.6 ms for 31 rows of 384 channels, where all their likelihoods take 2.3; the bytes are the same to a
percent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.steps import size_of

CLASSES = tuple(2**bits for bits in range(13))
"""How many a table may have: a row's class takes up to twelve bits."""
MAX_NUMBERS = 2**20
"""Of classes times channels: a table takes 13 bytes of memory for each."""

_LEADING, _NEAREST = 64, 8
_AT_ONCE = 2**20
"""Numbers looked at together."""
_NOISE = size_of(-8) ** 2 / 12
"""Of rounding, in squares of a unit; steps of half a unit are assumed, so that a row is of one class at every step."""


@dataclass(frozen=True, eq=False)
class Classes:
    """Where classes lie among rows of components, (K, C): their centres, and the reciprocal variance about these.

    Rows are taken to be normally distributed in each class, with the noise of rounding added; `rarity` (K,) is the sum
    of the variances' logarithms. A class's distance from a row, but for what is the same for all, is `constant -
    components @ linear` of the components that are `leading`, in deviations of all classes alike.
    """

    centres: Array
    weight: Array
    rarity: Array
    leading: Array
    linear: Array
    constant: Array

    @classmethod
    def of(cls, centres: Array, variance: Array) -> Classes:
        """Of these centres and variances."""
        centres, variance = (np.ascontiguousarray(a, np.float32) for a in (centres, variance + _NOISE))
        within = variance.mean(axis=0)
        leading = np.sort(np.argsort(-centres.var(axis=0) / within, kind="stable")[:_LEADING])
        some, alike = centres[:, leading], 1 / within[leading]
        return cls(
            centres,
            weight=1 / variance,
            rarity=np.log(variance).sum(axis=1),
            leading=leading,
            linear=np.ascontiguousarray(2 * (some * alike).T),
            constant=(np.square(some) * alike).sum(axis=1),
        )

    def likeliest(self, components: Array) -> Array:
        """The class of each row of components, float32 (rows, C): uint16 (rows,), as `unpacked_classes` gives them."""
        classes, channels = self.centres.shape
        if classes == 1:
            return np.zeros(len(components), np.uint16)
        count = max(1, _AT_ONCE // max(classes, _NEAREST * channels))
        parts = [components[at : at + count] for at in range(0, len(components), count)]
        return np.concatenate([np.zeros(0, np.uint16), *map(self._likeliest, parts)])

    def _likeliest(self, components: Array) -> Array:
        near = self._nearest(components[:, self.leading])
        off = self.centres[near]
        off -= components[:, None]
        np.square(off, out=off)
        costs = np.einsum("rkc,rkc->rk", off, self.weight[near])
        costs += self.rarity[near]
        return np.asarray(near[np.arange(len(near)), costs.argmin(axis=1)], np.uint16)

    def _nearest(self, leading: Array) -> Array:
        """The nearest few classes of each row, (rows, few)."""
        if len(self.centres) <= _NEAREST:
            return np.broadcast_to(np.arange(len(self.centres)), (len(leading), len(self.centres)))
        distances = leading @ self.linear
        np.subtract(self.constant, distances, out=distances)
        # Looking for the least a few times takes half as long as partitioning.
        rows, found = np.arange(len(leading)), np.empty((len(leading), _NEAREST), np.intp)
        for i in range(_NEAREST):
            found[:, i] = nearest = distances.argmin(axis=1)
            distances[rows, nearest] = np.inf
        return found


def packed_classes(classes: Array, bits: int) -> bytes:
    """Classes of `bits` bits each, the first in the highest bits of the first byte."""
    return np.packbits((classes[:, None] >> np.arange(bits)[::-1]) & 1).tobytes()


def unpacked_classes(data: memoryview, count: int, bits: int) -> Array:
    """What `packed_classes` took, uint16 (count,).

    Raises:
        ValueError: there are too few bytes, or bits after the last are not zero.
    """
    if len(data) < -(-count * bits // 8):
        raise ValueError("the payload ends within the rows' classes")
    found = np.unpackbits(np.frombuffer(data, np.uint8))
    if found[count * bits :].any():
        raise ValueError("the bits after the last row's class are not zero")
    classes = np.zeros(count, np.uint16)
    for place in found[: count * bits].reshape(count, bits).T:
        classes <<= np.uint16(1)
        classes |= place
    return classes
