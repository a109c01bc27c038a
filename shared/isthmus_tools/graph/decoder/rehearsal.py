"""Rehearsal of a decoder's segments: a few tokens are generated step by step, and the scores are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from isthmus.arrays import Array, empty_state, supplied_inputs
from isthmus.artifacts.state import State
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ModelError, SegmentError
from isthmus.runtime.ort import cpu_limit
from isthmus.runtime.ort_runner import UnpublishedRunner
from isthmus_tools.graph.extract import Extracted

# Two ways through attention: several tokens at once, and single ones that read what came before.
_PREFILL, _STEPS = 5, 3


class StepRehearsal:
    """Generates a few tokens with segments, whose state is kept apart in this process."""

    def __init__(self, state: State, logits: TensorSpec, weights_folder: Path) -> None:
        """`logits` is the model's output of scores; the segments' weights file is in `weights_folder`."""
        self._state, self._logits, self._folder = state, logits.name, weights_folder
        # Fixed, so that an import gives the same bundle each time.
        tokens = np.random.default_rng(0).integers(0, int(logits.shape[-1]), (1, _PREFILL + _STEPS))
        self._chunks = [tokens[:, :_PREFILL], *(tokens[:, i : i + 1] for i in range(_PREFILL, _PREFILL + _STEPS))]

    def scores(self, parts: Sequence[Extracted]) -> Array:
        """The logits of all tokens, in chunks. Shapes: (1, tokens, vocabulary).

        Raises:
            ModelError: onnxruntime cannot load or run a segment.
        """
        runs: list[Mapping[str, Array]] = [{self._state.tokens: chunk} for chunk in self._chunks]
        for part in parts:
            # One session at a time, as a model may take most of the memory.
            runs = list(self._through(part, runs))
        return np.concatenate([values[self._logits] for values in runs], axis=1)

    def _through(self, part: Extracted, runs: Sequence[Mapping[str, Array]]) -> Iterator[Mapping[str, Array]]:
        try:
            runner = UnpublishedRunner(part.graph, part.segment, self._folder, threads=cpu_limit(), repack=True)
            memory = empty_state(self._state, part.inputs)
            count = 0
            # State goes through arrays here; functions bind its memory, which a rehearsal of 8 tokens does not need.
            for values in runs:
                tokens = next(array.shape[1] for array in values.values())
                count += tokens
                supplied = supplied_inputs(self._state, np.array([count - 1], np.int32), tokens)
                arrays = {**values, **supplied, **memory}
                outputs = runner.run({spec.name: arrays[spec.name] for spec in part.inputs})
                memory = {p.past: outputs.pop(p.present) for p in self._state.pairs if p.present in outputs}
                yield outputs
        except SegmentError as e:
            raise ModelError(f"onnxruntime cannot run segment {part.id}: {e.message}", segment=part.id) from e
