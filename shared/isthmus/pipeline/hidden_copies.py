"""Copies of a route's inputs, each with one window hidden, and their runs: in batches where the batch is free."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from isthmus.arrays import Array
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, HopRejected, RequestMalformed, RunFailed, ShapeMismatch, ValueRefused
from isthmus.pipeline.execution import Result
from isthmus.pipeline.places import Places, Sizes, windows
from isthmus.pipeline.route import Route

# Of the hidden copies of one call: a function takes frames of 64 MiB, and activations within a segment are larger.
MAX_BATCH_BYTES = 8 * 2**20
# How a segment refuses a batch.
_BATCH_ERRORS = (ShapeMismatch, ValueRefused, RunFailed, HopRejected)

Run = Callable[[Route, Mapping[str, Array]], Result]


@dataclass(frozen=True)
class HiddenCopies:
    """Copies of the inputs of `route`, each with one window hidden."""

    route: Route
    tensors: Mapping[str, Array]
    hidden: Sequence[Places]
    grid: Sizes
    width: int
    hidden_id: int
    alone: bool = False
    """Whether each copy is a call of its own in any case."""

    @property
    def batch(self) -> int:
        """Copies in one call: 1 unless every input has one and the same free first dimension."""
        if self.alone:
            return 1
        first = {spec.shape[0] if spec.shape else 0 for spec in self.route.inputs}
        if len(first) > 1 or not isinstance(next(iter(first)), str):
            return 1
        size = sum(self.tensors[spec.name].nbytes for spec in self.route.inputs)
        return max(1, MAX_BATCH_BYTES // max(1, size))

    @property
    def calls(self) -> int:
        """The number of batches."""
        return -(-math.prod(count + self.width - 1 for count in self.grid) // self.batch)

    def batches(self) -> Iterator[dict[str, Array]]:
        """The copies, in the order of the windows."""
        # The windows of each tensor side by side: tensors of several resolutions hide the same part of the input.
        every = zip(*(windows(self.grid, self.width, places.sizes) for places in self.hidden), strict=True)
        while parts := list(islice(every, self.batch)):
            # Contiguous copies, in which `Places.view` can write.
            copies = {s.name: np.repeat(self.tensors[s.name][np.newaxis], len(parts), 0) for s in self.route.inputs}
            for i, each in enumerate(parts):
                for places, window in zip(self.hidden, each, strict=True):
                    copy = places.view(copies[places.tensor][i])
                    copy[(slice(None),) * places.axis + window] = self._value(places)
            # (copies, 1, …) is a batch of copies; a scalar belongs to the only copy.
            yield {n: each.reshape(-1, *each.shape[2:]) if each.ndim > 1 else each[0] for n, each in copies.items()}

    def spread(self, drops: Array) -> Array:
        """The windows' drops over their cells: the mean of the windows that cover a cell."""
        total, count = np.zeros(self.grid), np.zeros(self.grid)
        for cells, drop in zip(windows(self.grid, self.width, self.grid), drops.tolist(), strict=True):
            total[cells] += drop
            count[cells] += 1
        return total / count

    def _value(self, places: Places) -> int:
        # Zero excludes a token from an attention mask, and is what convolutions pad with.
        dtype = self.tensors[places.tensor].dtype
        if dtype.kind not in "iu" or "mask" in places.tensor:
            return 0
        if self.hidden_id > np.iinfo(dtype).max:
            raise RequestMalformed(f"hidden_id is {self.hidden_id}, no {dtype.name}", parameter="hidden_id")
        return self.hidden_id


def run_all(copies: HiddenCopies, run: Run, deadline: Deadline) -> Iterator[Result]:
    """Run every batch; gives up after the first where the rest will not be done in time.

    Where the first batch fails, every copy is a call of its own: graphs may declare a free batch, and hold its size
    in a Reshape all the same.
    """
    began = time.monotonic()
    for done, batch in enumerate(copies.batches(), start=1):
        if done == 1 and copies.batch > 1:
            try:
                result = run(copies.route, batch)
            except _BATCH_ERRORS:
                yield from run_all(replace(copies, alone=True), run, deadline)
                return
        else:
            result = run(copies.route, batch)
        yield result
        needed_s = (time.monotonic() - began) / done * (copies.calls - done)
        if needed_s > deadline.remaining():
            raise DeadlineExceeded(
                f"{copies.calls - done} more calls with a part hidden take about {needed_s:.1f} s, and"
                f" {deadline.remaining():.1f} s are left",
                hint="ask for a smaller grid, or allow more time with X-Timeout",
            )
