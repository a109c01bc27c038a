"""Memory of declared state: a row for each session, in one mapping for each pair of past and present.

A row has room for the longest session, and takes memory as far as it was written: the mapping is private, anonymous and
without a reservation, and a released row goes back to the system. Rows beside each other form a batch without a copy.
"""

from __future__ import annotations

import math
import mmap
from typing import NamedTuple

import numpy as np

from isthmus.arrays import DTYPES, Array
from isthmus.artifacts.bundle import Segment
from isthmus.artifacts.state import State
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import RunFailed

# Python names this flag of Linux from 3.13 on.
_MAP_NORESERVE = 0x4000


class StateBuffer(NamedTuple):
    """Where a run finds the past of its rows and writes their present. Units: `address` in bytes."""

    past: str
    present: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    address: int


class _PairMemory(NamedTuple):
    """The rows of a pair. Shapes: `rows` (rows, …, tokens, …); `blocks` of `token_bytes` a token lie apart in a row.

    Units: `address` in bytes.
    """

    past: str
    present: str
    mapping: mmap.mmap
    rows: Array
    address: int
    row_bytes: int
    blocks: int
    token_bytes: int


class StateMemory:
    """The rows of a segment's pairs. Units: `tokens` is the longest session."""

    def __init__(self, segment: Segment, state: State, *, rows: int, tokens: int) -> None:
        self.rows, self.tokens, self._axis = rows, tokens, state.axis
        specs = {spec.name: spec for spec in segment.inputs}
        pairs = [(specs[pair.past], pair.present) for pair in state.pairs if pair.past in specs]
        sizes = {spec.name: _token_shape(spec, state.axis) for spec, _ in pairs}
        widths = {spec.name: math.prod(sizes[spec.name]) * DTYPES[spec.dtype].itemsize for spec, _ in pairs}
        # Whole pages: rows of a batch lie beside each other, and a released row shares no page with another.
        unit = math.lcm(*(mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, width) for width in widths.values()))
        self.places = -(-tokens // unit) * unit
        self._pairs: list[_PairMemory] = []
        for spec, present in pairs:
            axis, dtype = state.axis - 1, DTYPES[spec.dtype]
            shape = sizes[spec.name]
            blocks = math.prod(shape[:axis])
            shape = [self.places if i == axis else d for i, d in enumerate(shape)]
            row_bytes = widths[spec.name] * self.places
            mapping = _map(rows * row_bytes)
            array = np.frombuffer(mapping, dtype).reshape(rows, *shape)
            token_bytes = widths[spec.name] // blocks
            self._pairs.append(
                # The address here: every step asks for that of each pair, and numpy makes an object for an answer.
                _PairMemory(spec.name, present, mapping, array, array.ctypes.data, row_bytes, blocks, token_bytes)
            )

    def row_bytes(self, tokens: int) -> int:
        """Memory of a row with so many tokens: whole pages."""
        return sum(pair.blocks * _paged(tokens * pair.token_bytes) for pair in self._pairs)

    def buffers(self, row: int, count: int = 1) -> list[StateBuffer]:
        """The memory of `count` rows from `row` on."""
        return [
            StateBuffer(
                pair.past,
                pair.present,
                pair.rows.dtype,
                (count, *pair.rows.shape[1:]),
                pair.address + row * pair.row_bytes,
            )
            for pair in self._pairs
        ]

    def move(self, row: int, target: int, tokens: int) -> None:
        """Move the first `tokens` tokens of a row to another, and release the row."""
        first = (slice(None),) * (self._axis - 1) + (slice(tokens),)
        for pair in self._pairs:
            pair.rows[target][first] = pair.rows[row][first]
        self.release(row)

    def release(self, row: int) -> None:
        """Give a row's memory back to the system."""
        for pair in self._pairs:
            pair.mapping.madvise(mmap.MADV_DONTNEED, row * pair.row_bytes, pair.row_bytes)


def _token_shape(spec: TensorSpec, axis: int) -> list[int]:
    """The shape of one token of one row."""
    sizes = [1 if i == axis else size for i, size in enumerate(spec.shape)][1:]
    fixed = [size for size in sizes if isinstance(size, int)]
    if len(fixed) != len(sizes):
        raise RunFailed(f"the state {spec.name} has more than one free size")
    return fixed


def _map(size: int) -> mmap.mmap:
    """Memory that is taken as it is written.

    Raises:
        RunFailed: the system refuses so much address space.
    """
    try:
        # Shared memory, the default, would be reserved whole, and would not go back by MADV_DONTNEED.
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as e:
        raise RunFailed(
            f"{size} bytes of address space for the state of sessions are refused: {e.strerror}",
            hint="lower max_sessions or max_session_tokens",
        ) from e
    # A block of a short session is a few pages; huge ones would take 2 MiB for each.
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping


def _paged(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
