"""Boundary tensors of a generation, as the segments behind each cut received them: the memory of recovery.

A codec that loses precision encodes a chunk otherwise than its tokens one by one, so the tensors are stored in the form
in which the hop received them: a replay gives a segment the same values, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from isthmus.admission import MemoryBudget
from isthmus.arrays import Array
from isthmus.codecs import EncodedTensor, Encoding, decode_tensor
from isthmus.pipeline import encode_tensors

# Of the objects of an entry beside its payload; a step of a single token has little more.
_ENTRY_BYTES = 512


@dataclass(frozen=True)
class _Entry:
    """A segment's inputs for the positions from `start` to `stop`; the tensors may have further rows."""

    start: int
    stop: int
    arrays: Mapping[str, Array]
    encoded: Mapping[str, EncodedTensor]
    encodings: Mapping[str, Encoding]

    @property
    def nbytes(self) -> int:
        sizes = (*(a.nbytes for a in self.arrays.values()), *(t.nbytes for t in self.encoded.values()))
        return _ENTRY_BYTES + sum(sizes)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """The rows of a tensor for the positions from `start` to `stop`, as far as the entry has them."""
        if (array := self.arrays.get(name)) is None:
            how = self.encodings.get(name)
            array = decode_tensor(self.encoded[name], None if how is None else how.table)
        # (1, tokens, …)
        return array[:, max(start, self.start) - self.start : min(stop, self.stop) - self.start]


class BoundaryTensors:
    """The boundary tensors of one generation, by segment: a prefix of its positions each; not thread-safe.

    At the bound of this generation, or of all, further positions are not stored: a replay of these computes their
    tensors again. The first positions are the dearest, since segments before the cut run from the first absent one on.
    """

    def __init__(self, max_bytes: int, budget: MemoryBudget) -> None:
        self._max_bytes, self._budget = max_bytes, budget
        self._entries: dict[str, list[_Entry]] = {}
        self.nbytes = 0

    def covered(self, segment: str) -> int:
        """How many positions of a segment's inputs are stored, from the first on."""
        entries = self._entries.get(segment)
        return entries[-1].stop if entries else 0

    def add(
        self,
        segment: str,
        start: int,
        stop: int,
        arrays: Mapping[str, Array],
        encoded: Mapping[str, EncodedTensor],
        encodings: Mapping[str, Encoding],
    ) -> None:
        """Store the inputs of a call, if these positions are the next ones and there is room."""
        if start != self.covered(segment):
            return
        entry = _Entry(start, stop, dict(arrays), dict(encoded), encodings)
        size = entry.nbytes
        if self.nbytes + size > self._max_bytes or not self._budget.reserve(size):
            return
        self.nbytes += size
        self._entries.setdefault(segment, []).append(entry)

    def read(self, segment: str, names: frozenset[str], start: int, stop: int) -> dict[str, Array]:
        """A segment's inputs for stored positions. Shapes: (1, stop - start, …)."""
        entries = [e for e in self._entries[segment] if e.start < stop and e.stop > start]
        inputs = {name for name in (*entries[0].arrays, *entries[0].encoded) if name in names}
        return {name: np.concatenate([e.rows(name, start, stop) for e in entries], axis=1) for name in inputs}

    def truncate(self, count: int) -> None:
        """Drop the positions from `count` on: rejected proposals."""
        for entries in self._entries.values():
            while entries and entries[-1].start >= count:
                self._release(entries.pop().nbytes)
            if entries and entries[-1].stop > count:
                entries[-1] = replace(entries[-1], stop=count)

    def close(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self._release(self.nbytes)

    def _release(self, count: int) -> None:
        self.nbytes -= count
        self._budget.release(count)


def exact_encodings(arrays: Mapping[str, Array], encodings: Mapping[str, Encoding]) -> dict[str, EncodedTensor]:
    """The tensors among `arrays` whose encoding restores every bit, encoded; the others have to travel raw.

    Values that a codec decoded once are often, but not always, values that it represents exactly.
    """
    encoded = encode_tensors(arrays, encodings)
    return {
        name: tensor
        for name, tensor in encoded.items()
        if np.array_equal(decode_tensor(tensor, encodings[name].table), arrays[name], equal_nan=False)
    }
