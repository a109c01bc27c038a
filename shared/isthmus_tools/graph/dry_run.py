"""The dry run: every new segment is loaded and run through frames before a bundle is published.

The uncut model runs first, on the example and on a second size of each free dimension. Then the segments of each
partition run on the same inputs, as hops would pass them on, and their predictions are compared with the uncut model's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Segment, WeightTensor
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.tensors import TensorSpec, describe
from isthmus.errors import CutError, FrameError, ModelError, SegmentError
from isthmus.runtime.ort import cpu_limit
from isthmus.runtime.ort_runner import UnpublishedRunner
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from isthmus_tools.graph import inputs, probe
from isthmus_tools.graph.extract import Extracted
from isthmus_tools.graph.inputs import FREE, FreeDim
from isthmus_tools.graph.model import Model
from isthmus_tools.graph.probe import difference, magnitude

# For all runs of second sizes together: an import stays within minutes. Sizes left out are recorded.
BUDGET_S = 60.0
# Differences up to these are not reported, relative to an output's largest magnitude. Fusions that differ between the
# whole graph and its segments stay below 2e-5 in float32 (docs/explanation/cuts.md, "How exact"); with 16-bit
# floats onnxruntime computes in float32 between fused operators, and a cut rounds there.
EXACT = 1e-4
EXACT_HALF = 2e-3
# No rounding reaches half of a float output's magnitude: such segments compute another function.
WRONG = 0.5
# From this many bytes of weights on a session prepacks none: a prepacked copy would double the memory.
_MAX_PREPACKED_BYTES = 512 * 2**20
# Frames hold a digest; this placeholder has the same length.
_BUNDLE = "sha256:" + "0" * 64
_HALF = ("float16", "bfloat16")
_MAX_NOTE = 300
_QUANTISING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
# For models that round activations: integer and float paths round apart on few inputs only.
_NOISE_CASES = 6


class Case(NamedTuple):
    """A set of model inputs with its description for messages."""

    description: str
    arrays: Mapping[str, Array]


class PartitionComparison(NamedTuple):
    """The result of a partition's dry run.

    `difference` is the largest of any output in any case, relative to the output's largest magnitude; 0 where two runs
    of the model itself differ, since nothing can be compared. `specs` are boundary tensors whose declared shapes fail
    for some size, corrected; the segments must be extracted with them and run again.
    """

    difference: float
    specs: Mapping[str, TensorSpec]


@dataclass
class DryRun:
    """Runs of a model's segments, whose weights lie in `folder`; a single session is alive at a time.

    Units: `budget_s` bounds all runs of second sizes together, `run_s` each other run.
    """

    model: Model
    folder: Path
    tensors: Sequence[WeightTensor]
    budget_s: float = BUDGET_S
    run_s: float = probe.MAX_RUN_S
    notes: list[str] = field(default_factory=list)
    """Sentences on runs left out, with reasons."""
    _cases: list[Case] = field(default_factory=list)
    _expected: list[Mapping[str, Array]] = field(default_factory=list)
    _sizes: list[dict[str, int]] = field(default_factory=list)
    _extra_s: float = 0.0
    _repeats: bool = True

    def whole(
        self, whole: Extracted, picture: Case | None = None, *, must_run: bool = True
    ) -> tuple[dict[str, TensorSpec], Mapping[str, Array] | None]:
        """Run the uncut model; returns corrected specs of its outputs and the prediction for `picture`.

        `picture` is an additional case. With `must_run=False` a model that refuses synthetic inputs is only loaded.

        Raises:
            ModelError: the model cannot be loaded, does not run with the example or `picture`, or no frame carries its
                tensors.
        """
        runner = self._load(whole)
        if not self._run_example(runner, must_run):
            return {}, None
        prediction = None
        try:
            if self.model.is_random:
                self._repeats = self._is_repeatable(runner)
            if picture is not None:
                self._record(picture, self._attempt(runner, picture))
                prediction = self._expected[-1]
        except TimeoutError as e:  # slow is not wrong
            self.notes.append(f"not every run came to its end: {e}")
        complete = self._run_other_values(runner)
        if any(n.op_type in _QUANTISING for n in self.model.nodes):
            for seed in range(_NOISE_CASES):
                self._run_extra(runner, Case(f"other values {seed}", inputs.noise(self._cases[0].arrays, seed)))
        complete &= self._run_second_sizes(runner, whole.inputs)
        self._sizes = [inputs.named_sizes(whole.inputs, case.arrays) for case in self._cases]
        claims = self.model.claims if complete else {}
        return self._corrected(whole.outputs, self._expected, claims), prediction

    def partition(self, parts: Sequence[Extracted]) -> PartitionComparison:
        """Run a partition's segments in order on the uncut model's cases.

        Raises:
            CutError: a segment cannot be loaded or run, no frame carries its tensors, or the segments compute another
                function than the uncut model.
        """
        cases = self._cases if self._extra_s < self.budget_s else self._cases[:1]
        values = [dict(case.arrays) for case in cases]
        name = "/".join(part.id.stop for part in parts[:-1])
        try:
            for part in parts:
                self._run_segment(self._load(part), values)
                if specs := self._corrected(part.outputs, values, {}):
                    return PartitionComparison(0.0, specs)
        except (ModelError, FrameError, SegmentError) as e:
            raise CutError(f"the cut {name} cannot be used: {e.message}", cut=name, **e.facts) from e
        except TimeoutError as e:
            raise CutError(f"the cut {name} cannot be used: {e}", cut=name) from e
        if not self._repeats:
            return PartitionComparison(0.0, {})
        floats, overall = self._differences(values)
        if floats > WRONG:
            how = f"differ by {floats:.0%} of their largest value" if floats < float("inf") else "are not finite alike"
            raise CutError(
                f"the segments at the cut {name} do not compute what the model does: outputs {how}",
                cut=name,
                difference=floats,
                hint="cut elsewhere: isthmus cuts MODEL",
            )
        return PartitionComparison(overall, {})

    @property
    def example_outputs(self) -> Mapping[str, Array] | None:
        """The model's outputs for the example; None if the example did not run."""
        return self._expected[0] if self._expected else None

    @property
    def tolerance(self) -> float:
        """The largest difference of segments that compute the model's function."""
        half = any(spec.dtype in _HALF for spec in self.model.specs.values())
        return EXACT_HALF if half else EXACT

    def _differences(self, actual: Sequence[Mapping[str, Array]]) -> tuple[float, float]:
        """The largest difference of any float output, and of any output.

        Relative to an output's magnitude over all cases: synthetic inputs may give outputs near zero, where the last
        digit would count as much as another case's full range.
        """
        floats = overall = 0.0
        for name in self._expected[0] if self._expected else ():
            scale = max(magnitude(outputs[name]) for outputs in self._expected)
            is_free = FREE in self.model.specs[name].shape
            for a, b in zip(self._expected, actual, strict=False):  # some cases may have been left out
                error = difference(a[name], b[name], scale)
                # Integers, and sizes that depend on values, flip entirely on a rounding, so 1 bounds their difference.
                if a[name].dtype.kind in "iub" or (a[name].shape != b[name].shape and is_free):
                    error = min(error, 1.0)
                else:
                    floats = max(floats, error)
                overall = max(overall, error)
        return floats, overall

    def _load(self, part: Extracted) -> UnpublishedRunner:
        weight = sum(t.length for a, b in part.weights for t in self.tensors[a:b])
        try:
            return UnpublishedRunner(
                part.graph, part.segment, self.folder, threads=cpu_limit(), repack=weight < _MAX_PREPACKED_BYTES
            )
        except SegmentError as e:
            subject = "the model" if part.id == WHOLE else f"segment {part.id}"
            reason = e.facts.get("reason", e.message)
            raise ModelError(f"onnxruntime cannot load {subject}: {reason}", segment=part.id) from e

    def _run_segment(self, runner: UnpublishedRunner, values: list[dict[str, Array]]) -> None:
        """Add a segment's outputs to the values of each case; when the budget ends, only the first case stays."""
        for i, tensors in enumerate(tuple(values)):
            start = time.perf_counter()
            left = self.budget_s - self._extra_s
            try:
                arrays = {s.name: tensors[s.name] for s in runner.segment.inputs}
                tensors.update(self._run(runner, arrays, self.run_s if i == 0 else max(0.0, left)))
            except TimeoutError:
                if i == 0:
                    raise
                del values[1:]
                return
            finally:
                self._extra_s += time.perf_counter() - start if i else 0.0

    def _run(self, runner: UnpublishedRunner, arrays: Mapping[str, Array], seconds: float) -> dict[str, Array]:
        outputs = runner.run_within(_through_frame(arrays, runner.segment), seconds)
        # The next segment receives the frame's arrays, not the runtime's.
        return dict(_through_frame(outputs, runner.segment))

    def _attempt(self, runner: UnpublishedRunner, case: Case, seconds: float | None = None) -> dict[str, Array]:
        try:
            return self._run(runner, case.arrays, self.run_s if seconds is None else seconds)
        except (SegmentError, FrameError) as e:
            raise ModelError(f"the model does not run with {case.description}: {e.message}") from e

    def _run_example(self, runner: UnpublishedRunner, must_run: bool) -> bool:
        model = self.model
        error: ModelError | None = None
        for arrays in inputs.trial_inputs(model.graph, model.binding, model.examples):
            case = Case("the example given" if model.examples else "inputs made up for it", arrays)
            try:
                self._record(case, self._attempt(runner, case))
                return True
            except ModelError as e:
                error = e
            except TimeoutError as e:  # slow is not wrong
                self.notes.append(f"loaded, not run to its end: {e}")
                return False
        if error is not None and must_run:
            error.hint = "give an input that the model accepts: --example NAME=FILE.npy; or its shape: --shape"
            raise error
        self.notes.append(f"loaded, not run: {error}"[:_MAX_NOTE])
        return False

    def _record(self, case: Case, outputs: Mapping[str, Array]) -> None:
        self._cases.append(case)
        self._expected.append(outputs)

    def _run_other_values(self, runner: UnpublishedRunner) -> bool:
        """Run with other values where the model claims output sizes; false if that run failed."""
        if not self.model.claims:
            return True
        arrays = {n: inputs.other_values(a) for n, a in self._cases[0].arrays.items()}
        return self._run_extra(runner, Case("other values", arrays)) == ""

    def _is_repeatable(self, runner: UnpublishedRunner) -> bool:
        """Whether a second run of a model with random operators equals the first."""
        second = self._attempt(runner, self._cases[0])
        if all(np.array_equal(array, second[name]) for name, array in self._expected[0].items()):
            return True
        self.notes.append("two runs with the same input differ, so segments were not compared with the whole model")
        return False

    def _run_second_sizes(self, runner: UnpublishedRunner, specs: Sequence[TensorSpec]) -> bool:
        """Run with a second size of every free dimension: of all together, else of each alone; false if a run failed.

        Together, each partition has a single additional run. Doubling all dimensions preserves sums, such as a mask's
        length over cached and new tokens.
        """
        free = inputs.free_dims(specs, self._cases[0].arrays)
        if len(free) > 1 and all(dim.alternatives for dim in free):
            for sizes in (inputs.distinct_sizes(free), [2 * dim.size for dim in free]):
                if 0 not in sizes and not self._run_resized(runner, list(zip(free, sizes, strict=True))):
                    return True
        notes = [note for dim in free if (note := self._run_second_size(runner, dim)) is not None]
        self.notes.extend(notes)
        return not notes

    def _run_second_size(self, runner: UnpublishedRunner, dim: FreeDim) -> str | None:
        reasons = []
        for size in dim.alternatives:
            if not (reason := self._run_resized(runner, [(dim, size)])):
                return None
            reasons.append(f"{size}: {reason}")
        return f"only the size {dim.size} of {dim.label} was run; {'; '.join(reasons)}"[:_MAX_NOTE]

    def _run_resized(self, runner: UnpublishedRunner, sizes: Sequence[tuple[FreeDim, int]]) -> str:
        description = ", ".join(f"{size} for {dim.label}" for dim, size in sizes)
        return self._run_extra(runner, Case(description, inputs.resized(self._cases[0].arrays, sizes)))

    def _run_extra(self, runner: UnpublishedRunner, case: Case) -> str:
        """Run a case that may fail; returns the reason of a failure, else an empty text."""
        start = time.perf_counter()
        spent = f"the {self.budget_s:.3g} s for such runs were spent"
        if (left := self.budget_s - self._extra_s) <= 0:
            return spent
        try:
            self._record(case, self._attempt(runner, case, left))
        except ModelError as e:
            return e.message
        except TimeoutError:
            return spent
        finally:
            self._extra_s += time.perf_counter() - start
        return ""

    def _corrected(
        self,
        specs: Sequence[TensorSpec],
        values: Sequence[Mapping[str, Array]],
        claims: Mapping[str, Mapping[int, int]],
    ) -> dict[str, TensorSpec]:
        """The specs that some case's arrays contradict or whose claims are confirmed, with corrected shapes.

        Raises:
            ModelError: a dtype or rank differs from the graph's.
        """
        corrected = {}
        for spec in specs:
            arrays = [v[spec.name] for v in values]
            for array in arrays:
                if array.dtype.name != spec.dtype or array.ndim != len(spec.shape):
                    actual, expected = describe(array.dtype.name, array.shape), describe(spec.dtype, spec.shape)
                    raise ModelError(
                        f"{spec.name} is {actual} when it runs, and {expected} by its graph",
                        tensor=spec.name,
                        hint="give an input that the model is meant for: --example NAME=FILE.npy",
                    )
            shapes = [a.shape for a in arrays]
            shape = _consistent_shape(spec, shapes, self._sizes[: len(shapes)], claims.get(spec.name, {}))
            if shape != spec.shape:
                corrected[spec.name] = TensorSpec(spec.name, spec.dtype, shape)
        return corrected


def _consistent_shape(
    spec: TensorSpec, shapes: Sequence[tuple[int, ...]], sizes: Sequence[dict[str, int]], claims: Mapping[int, int]
) -> tuple[int | str, ...]:
    """A shape whose every dimension is true in each case; `sizes` map each case's dimension names and are extended."""
    dims: list[int | str] = []
    for axis, dim in enumerate(spec.shape):
        observed = [shape[axis] for shape in shapes]
        if axis in claims and all(n == claims[axis] for n in observed):
            dims.append(claims[axis])
        elif isinstance(dim, int):
            dims.append(dim if all(n == dim for n in observed) else FREE)
        elif all(named.get(dim, n) == n for named, n in zip(sizes, observed, strict=True)):
            for named, n in zip(sizes, observed, strict=True):
                if dim != FREE:
                    named[dim] = n
            dims.append(dim)
        else:
            dims.append(FREE)
    return tuple(dims)


def _through_frame(arrays: Mapping[str, Array], segment: Segment) -> Mapping[str, Array]:
    # No bound: the tensors are in memory already, and a bound by data length would refuse empty tensors, whose other
    # dimensions count.
    return frames.decode(frames.encode(Frame(arrays, _BUNDLE, segment.id)), max_bytes=sys.maxsize).tensors


def recorded(value: float) -> float:
    """A difference for the manifest, rounded to a single digit: further digits depend on the machine."""
    return float(f"{value:.0e}")
