"""Memory of declared state: a row for each session, in one mapping for each pair of past and present.

A row has room for the longest session, and takes memory as far as it was written: the mapping is anonymous, and a
released row goes back to the system. Rows beside each other form a batch without a copy.
"""

from __future__ import annotations

import math
import mmap
from typing import NamedTuple

import numpy as np

from isthmus.arrays import DTYPES
from isthmus.artifacts.bundle import Segment
from isthmus.artifacts.state import State
from isthmus.errors import RunFailed


class StateBuffer(NamedTuple):
    """Where a run finds the past of its rows and writes their present. Units: `address` in bytes."""

    past: str
    present: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    address: int


class StateMemory:
    """The rows of a segment's pairs. Units: `tokens` is the longest session."""

    def __init__(self, segment: Segment, state: State, *, rows: int, tokens: int) -> None:
        self.rows, self.tokens = rows, tokens
        specs = {spec.name: spec for spec in segment.inputs}
        self._pairs: list[tuple[str, str, np.dtype[np.generic], tuple[int, ...], mmap.mmap, int]] = []
        self.token_bytes = 0
        for pair in state.pairs:
            if (spec := specs.get(pair.past)) is None:
                continue
            shape = tuple(tokens if i == state.axis else d for i, d in enumerate(spec.shape))[1:]
            if any(not isinstance(d, int) for d in shape):
                raise RunFailed(f"the state {pair.past} of segment {segment.id} has more than one free size")
            sizes = tuple(int(d) for d in shape)
            dtype = DTYPES[spec.dtype]
            row_bytes = _paged(math.prod(sizes) * dtype.itemsize)
            if row_bytes != math.prod(sizes) * dtype.itemsize:
                # Rows of a batch lie beside each other, and a released row is whole pages.
                raise RunFailed(f"{tokens} tokens of {pair.past} are no whole pages of memory")
            memory = mmap.mmap(-1, rows * row_bytes)
            self._pairs.append((pair.past, pair.present, dtype, sizes, memory, row_bytes))
            self.token_bytes += math.prod(sizes) * dtype.itemsize // tokens

    def buffers(self, row: int, count: int = 1) -> list[StateBuffer]:
        """The memory of `count` rows from `row` on."""
        return [
            StateBuffer(past, present, dtype, (count, *shape), _address(memory) + row * row_bytes)
            for past, present, dtype, shape, memory, row_bytes in self._pairs
        ]

    def release(self, row: int) -> None:
        """Give a row's memory back to the system."""
        for _, _, _, _, memory, row_bytes in self._pairs:
            memory.madvise(mmap.MADV_DONTNEED, row * row_bytes, row_bytes)


def _paged(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _address(memory: mmap.mmap) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data
