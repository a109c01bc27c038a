"""The dry run: every new segment is loaded and run, through frames, before anything of a bundle is published.

The uncut model runs first, on the example and on a second size of each free dimension. Then the segments of each
partition take the same inputs as hops would hand them on, and their predictions are compared with the uncut model's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Segment, WeightTensor
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.tensors import TensorSpec, describe
from isthmus.errors import CutError, FrameError, ModelError, SegmentError
from isthmus.runtime.ort_runner import UnpublishedRunner, cpu_limit
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from isthmus_tools.graph import probe
from isthmus_tools.graph.compare import difference, magnitude
from isthmus_tools.graph.extract import Extracted
from isthmus_tools.graph.model import Model
from isthmus_tools.graph.shapes import FREE, trial_inputs

BUDGET_S = 60.0
"""For runs beyond the example's: of second sizes. What it leaves out is recorded."""
EXACT = 1e-4
"""The largest difference that goes without saying, relative to an output's largest magnitude; fusions that differ
between a whole graph and its parts stay below 2e-5 in float32 (docs/cuts.md, "How exact")."""
EXACT_HALF = 2e-3
"""Likewise where a tensor has 16-bit floats: onnxruntime keeps float32 between fused operators and not across a cut."""
WRONG = 0.5
"""A larger difference of a float output is no rounding: the segments compute something else."""
_UNPACKED_FROM = 512 * 2**20
"""Bytes of weights from which a session repacks none: a packed copy of large weights would double their memory."""
_BUNDLE = "sha256:" + "0" * 64
"""Of as many bytes as the digest that frames will hold."""
_HALF = ("float16", "bfloat16")
_MAX_SHOWN = 300
_QUANTISING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_MORE_INPUTS = 6
"""For models that round activations: few inputs lie where integers and floats are rounded apart."""
_BLOCKS = 8


class Case(NamedTuple):
    """One set of inputs for the model, and what is special about it."""

    what: str
    arrays: Mapping[str, Array]


class Seen(NamedTuple):
    """What a partition's dry run found.

    `difference` is the largest of any output in any case, relative to its largest magnitude; 0 where two runs of the
    model itself differ, since nothing can be compared. `specs` are boundary tensors whose declared shapes do not hold
    for every size, mended; the segments must be made anew with them, and run again.
    """

    difference: float
    specs: Mapping[str, TensorSpec]


@dataclass
class DryRun:
    """Runs of one model's segments; weights lie in `folder`. One session is alive at a time.

    Units: `budget_s` is for all runs of second sizes together, `run_s` for each other run.
    """

    model: Model
    folder: Path
    tensors: Sequence[WeightTensor]
    budget_s: float = BUDGET_S
    run_s: float = probe.MAX_RUN_S
    notes: list[str] = field(default_factory=list)
    """Sentences on what was not run, and why."""
    _cases: list[Case] = field(default_factory=list)
    _expected: list[Mapping[str, Array]] = field(default_factory=list)
    _sizes: list[dict[str, int]] = field(default_factory=list)
    _extra_s: float = 0.0
    _repeats: bool = True

    def whole(
        self, whole: Extracted, picture: Case | None = None, *, must_run: bool = True
    ) -> tuple[dict[str, TensorSpec], Mapping[str, Array] | None]:
        """Run the uncut model: its outputs' specs as they hold for every size tried, and the prediction for `picture`.

        `picture` is one more set of inputs. Without `must_run` a model that made-up inputs do not suit is only loaded.

        Raises:
            ModelError: it cannot be loaded, or does not run with the example or `picture`; or no frame carries it.
        """
        runner = self._load(whole)
        if not self._example(runner, must_run):
            return {}, None
        shown = None
        try:
            if self.model.is_random:
                self._repeats = self._is_repeatable(runner)
            if picture is not None:
                self._keep(picture, self._attempt(runner, picture))
                shown = self._expected[-1]
        except TimeoutError as e:  # slow is not wrong
            self.notes.append(f"not every run came to its end: {e}")
        complete = self._other_values(runner)
        if any(n.op_type in _QUANTISING for n in self.model.nodes):
            for seed in range(_MORE_INPUTS):
                self._extra(runner, Case(f"other values {seed}", _noise(self._cases[0].arrays, seed)))
        complete &= self._second_sizes(runner, whole.inputs)
        self._sizes = [_named_sizes(whole.inputs, case.arrays) for case in self._cases]
        claims = self.model.claims if complete else {}
        return self._settled(whole.outputs, self._expected, claims), shown

    def partition(self, parts: Sequence[Extracted]) -> Seen:
        """Run the segments of a partition, in order, on what the uncut model ran on.

        Raises:
            CutError: one cannot be loaded or run, no frame carries its tensors, or the segments compute something else
                than the uncut model.
        """
        cases = self._cases if self._extra_s < self.budget_s else self._cases[:1]
        values = [dict(case.arrays) for case in cases]
        name = "/".join(part.id.stop for part in parts[:-1])
        try:
            for part in parts:
                self._step(self._load(part), values)
                if changed := self._settled(part.outputs, values, {}):
                    return Seen(0.0, changed)
        except (ModelError, FrameError, SegmentError) as e:
            raise CutError(f"the cut {name} cannot be used: {e.message}", cut=name, **e.facts) from e
        except TimeoutError as e:
            raise CutError(f"the cut {name} cannot be used: {e}", cut=name) from e
        if not self._repeats:
            return Seen(0.0, {})
        floats, all_ = self._differences(values)
        if floats > WRONG:
            how = f"differ by {floats:.0%} of their largest value" if floats < float("inf") else "are not finite alike"
            raise CutError(
                f"the segments at the cut {name} do not compute what the model does: outputs {how}",
                cut=name,
                difference=floats,
                hint="cut elsewhere: isthmus cuts MODEL",
            )
        return Seen(all_, {})

    def _differences(self, got: Sequence[Mapping[str, Array]]) -> tuple[float, float]:
        """The largest difference of any float output, and of any output, relative to its magnitude in all cases.

        In all: made-up inputs may give outputs near zero, where the last digit would count as much as another case's
        all. Whole numbers and sizes that values decide differ wholly where a rounding decides, so 1 is their most.
        """
        floats = all_ = 0.0
        for name in self._expected[0] if self._expected else ():
            scale = max(magnitude(outputs[name]) for outputs in self._expected)
            for a, b in zip(self._expected, got, strict=False):  # some cases may have been left out
                found = difference(a[name], b[name], scale)
                if a[name].dtype.kind in "iub" or (a[name].shape != b[name].shape and FREE in self._shape(name)):
                    found = min(found, 1.0)
                else:
                    floats = max(floats, found)
                all_ = max(all_, found)
        return floats, all_

    def _shape(self, name: str) -> tuple[int | str, ...]:
        return self.model.specs[name].shape

    @property
    def example_outputs(self) -> Mapping[str, Array] | None:
        """The model's outputs for the example; None if it did not run."""
        return self._expected[0] if self._expected else None

    @property
    def tolerance(self) -> float:
        """The difference up to which segments compute what the model does."""
        half = any(spec.dtype in _HALF for spec in self.model.specs.values())
        return EXACT_HALF if half else EXACT

    def _load(self, part: Extracted) -> UnpublishedRunner:
        weight = sum(t.length for a, b in part.weights for t in self.tensors[a:b])
        try:
            return UnpublishedRunner(
                part.graph, part.segment, self.folder, threads=cpu_limit(), repack=weight < _UNPACKED_FROM
            )
        except SegmentError as e:
            what = "the model" if part.id == WHOLE else f"segment {part.id}"
            reason = e.facts.get("reason", e.message)
            raise ModelError(f"onnxruntime cannot load {what}: {reason}", segment=part.id) from e

    def _step(self, runner: UnpublishedRunner, values: list[dict[str, Array]]) -> None:
        """Add a segment's outputs to the values of each case; without time left, only the first case stays."""
        for i, known in enumerate(tuple(values)):
            start = time.perf_counter()
            left = self.budget_s - self._extra_s
            try:
                taken = {s.name: known[s.name] for s in runner.segment.inputs}
                known.update(self._run(runner, taken, self.run_s if i == 0 else max(0.0, left)))
            except TimeoutError:
                if i == 0:
                    raise
                del values[1:]
                return
            finally:
                self._extra_s += time.perf_counter() - start if i else 0.0

    def _run(self, runner: UnpublishedRunner, arrays: Mapping[str, Array], seconds: float) -> dict[str, Array]:
        given = runner.run_within(_carried(arrays, runner.segment), seconds)
        # The next segment gets what a frame makes of it.
        return dict(_carried(given, runner.segment))

    def _attempt(self, runner: UnpublishedRunner, case: Case, seconds: float | None = None) -> dict[str, Array]:
        """The outputs for `case`.

        Raises:
            ModelError: it does not run.
        """
        try:
            return self._run(runner, case.arrays, self.run_s if seconds is None else seconds)
        except (SegmentError, FrameError) as e:
            raise ModelError(f"the model does not run with {case.what}: {e.message}") from e

    def _example(self, runner: UnpublishedRunner, must_run: bool) -> bool:
        model = self.model
        error: ModelError | None = None
        for arrays in trial_inputs(model.graph, model.binding, model.examples):
            case = Case("the example given" if model.examples else "inputs made up for it", arrays)
            try:
                self._keep(case, self._attempt(runner, case))
                return True
            except ModelError as e:
                error = e
            except TimeoutError as e:  # slow is not wrong
                self.notes.append(f"loaded, not run to its end: {e}")
                return False
        if error is not None and must_run:
            error.hint = "give an input that the model accepts: --example NAME=FILE.npy; or its shape: --shape"
            raise error
        self.notes.append(f"loaded, not run: {error}"[:_MAX_SHOWN])
        return False

    def _keep(self, case: Case, outputs: Mapping[str, Array]) -> None:
        self._cases.append(case)
        self._expected.append(outputs)

    def _other_values(self, runner: UnpublishedRunner) -> bool:
        """Whether sizes that the model declares and inference cannot derive hold for other values of the inputs."""
        if not self.model.claims:
            return True
        others = {n: _with_other_values(a) for n, a in self._cases[0].arrays.items()}
        return self._extra(runner, Case("other values", others)) == ""

    def _is_repeatable(self, runner: UnpublishedRunner) -> bool:
        """Whether a second run of a model with random operators gives what the first one gave."""
        again = self._attempt(runner, self._cases[0])
        if all(np.array_equal(array, again[name]) for name, array in self._expected[0].items()):
            return True
        self.notes.append("two runs with the same input differ, so segments were not compared with the whole model")
        return False

    def _second_sizes(self, runner: UnpublishedRunner, specs: Sequence[TensorSpec]) -> bool:
        """Whether the model ran with a second size of every free dimension: of all together, else of each alone.

        Together, partitions have one more run, not one for each. Twice all keeps sums, such as a mask's length, which
        is that of a past and an input.
        """
        arrays = self._cases[0].arrays
        free = _free(specs, arrays)
        if len(free) > 1 and all(dim.others for dim in free):
            for sizes in (_all_different(free), [2 * dim.size for dim in free]):
                if 0 not in sizes and not self._resize(runner, list(zip(free, sizes, strict=True))):
                    return True
        lacking = [note for dim in free if (note := self._second_size(runner, dim)) is not None]
        self.notes.extend(lacking)
        return not lacking

    def _second_size(self, runner: UnpublishedRunner, dim: _FreeDim) -> str | None:
        """Run with the first other size that the model runs with: None, or a sentence on why none does."""
        reasons = []
        for size in dim.others:
            if not (reason := self._resize(runner, [(dim, size)])):
                return None
            reasons.append(f"{size}: {reason}")
        return f"only the size {dim.size} of {dim.label} was run; {'; '.join(reasons)}"[:_MAX_SHOWN]

    def _resize(self, runner: UnpublishedRunner, sizes: Sequence[tuple[_FreeDim, int]]) -> str:
        """Run with these sizes: why it did not run, or nothing."""
        shapes = {name: list(array.shape) for name, array in self._cases[0].arrays.items()}
        for dim, size in sizes:
            for name, axis in dim.places:
                shapes[name][axis] = size
        resized = {name: _resized(array, shapes[name]) for name, array in self._cases[0].arrays.items()}
        what = ", ".join(f"{size} for {dim.label}" for dim, size in sizes)
        return self._extra(runner, Case(what, resized))

    def _extra(self, runner: UnpublishedRunner, case: Case) -> str:
        """Run a case that may fail: why it did not run, or nothing."""
        start = time.perf_counter()
        spent = f"the {self.budget_s:.3g} s for such runs were spent"
        if (left := self.budget_s - self._extra_s) <= 0:
            return spent
        try:
            self._keep(case, self._attempt(runner, case, left))
        except ModelError as e:
            return e.message
        except TimeoutError:
            return spent
        finally:
            self._extra_s += time.perf_counter() - start
        return ""

    def _settled(
        self,
        specs: Sequence[TensorSpec],
        values: Sequence[Mapping[str, Array]],
        claims: Mapping[str, Mapping[int, int]],
    ) -> dict[str, TensorSpec]:
        """Those of `specs` that the arrays of some case contradict, or of which `claims` hold, mended."""
        mended = {}
        for spec in specs:
            arrays = [v[spec.name] for v in values]
            for array in arrays:
                if array.dtype.name != spec.dtype or array.ndim != len(spec.shape):
                    got, expected = describe(array.dtype.name, array.shape), describe(spec.dtype, spec.shape)
                    raise ModelError(
                        f"{spec.name} is {got} when it runs, and {expected} by its graph",
                        tensor=spec.name,
                        hint="give an input that the model is meant for: --example NAME=FILE.npy",
                    )
            shapes = [a.shape for a in arrays]
            held = _held(spec, shapes, self._sizes[: len(shapes)], claims.get(spec.name, {}))
            found = TensorSpec(spec.name, spec.dtype, held)
            if found != spec:
                mended[spec.name] = found
        return mended


def _held(
    spec: TensorSpec, shapes: Sequence[tuple[int, ...]], sizes: Sequence[dict[str, int]], claims: Mapping[int, int]
) -> tuple[int | str, ...]:
    """A shape of which every dimension holds in each case; `sizes` are each case's, by a dimension's name."""
    dims: list[int | str] = []
    for axis, dim in enumerate(spec.shape):
        found = [shape[axis] for shape in shapes]
        if axis in claims and all(n == claims[axis] for n in found):
            dims.append(claims[axis])
        elif isinstance(dim, int):
            dims.append(dim if all(n == dim for n in found) else FREE)
        elif all(known.get(dim, n) == n for known, n in zip(sizes, found, strict=True)):
            for known, n in zip(sizes, found, strict=True):
                if dim != FREE:
                    known[dim] = n
            dims.append(dim)
        else:
            dims.append(FREE)
    return tuple(dims)


def _carried(arrays: Mapping[str, Array], segment: Segment) -> Mapping[str, Array]:
    # No bound: the tensors are here already, and one that goes by the data's length would refuse empty tensors, whose
    # other dimensions count.
    return frames.decode(frames.encode(Frame(arrays, _BUNDLE, segment.id)), max_bytes=sys.maxsize).tensors


class _FreeDim(NamedTuple):
    """A free dimension: its name, the inputs and axes that have it, its size in the example, and others to try."""

    label: str
    places: Sequence[tuple[str, int]]
    size: int
    others: Sequence[int]


def _free(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> list[_FreeDim]:
    places: dict[str, list[tuple[str, int]]] = {}
    for spec in specs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                places.setdefault(dim if dim != FREE else f"axis {axis} of {spec.name}", []).append((spec.name, axis))
    sizes = {label: arrays[where[0][0]].shape[where[0][1]] for label, where in places.items()}
    return [_FreeDim(label, where, sizes[label], _other_sizes(sizes[label])) for label, where in places.items()]


def _all_different(free: Sequence[_FreeDim]) -> list[int]:
    """A size for each, different ones where that can be: equal ones would not show which of two a value follows."""
    chosen: list[int] = []
    for dim in free:
        chosen.append(next((n for n in dim.others if n not in chosen), dim.others[0]))
    return chosen


def _other_sizes(n: int) -> list[int]:
    """The likeliest to run first: half and twice keep what a size is a multiple of.

    Not 1, which would be broadcast, and so hide what does not follow, while there are others.
    """
    halves = [n // 2] if n % 2 == 0 and n > 2 else []
    return [m for m in dict.fromkeys((*halves, 2 * n, n + 1, n - 1)) if m > 0 and m != n]


def _resized(array: Array, shape: Sequence[int]) -> Array:
    """The array's own values, repeated or cut off: token ids stay token ids."""
    for axis, size in enumerate(shape):
        if array.shape[axis] == 0:
            array = np.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
        elif array.shape[axis] != size:
            array = np.take(array, np.arange(size) % array.shape[axis], axis)
    return np.asarray(array, order="C")  # ascontiguousarray would give a number an axis


def _noise(arrays: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Floats of a normal distribution, for odd seeds the same in a whole block, as in pictures and sounds.

    Whole numbers keep their values, in reverse.
    """
    rng = np.random.default_rng([1, seed])

    def noise(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        array = rng.normal(0, 1 + seed // 2, shape)
        for axis in range(1, len(shape)) if seed % 2 else ():
            block = max(1, shape[axis] // _BLOCKS)
            array = np.take(array, np.arange(shape[axis]) // block * block, axis)
        return np.asarray(array, dtype)

    return {n: np.flip(a) if a.dtype.kind in "iub" else noise(a.shape, a.dtype) for n, a in arrays.items()}


def _with_other_values(array: Array) -> Array:
    if array.dtype.kind in "iu":
        return np.flip(array) if array.any() else np.ones_like(array)
    return ~array if array.dtype.kind == "b" else np.flip(-array)


def _named_sizes(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> dict[str, int]:
    return {
        dim: n
        for spec in specs
        for dim, n in zip(spec.shape, arrays[spec.name].shape, strict=True)
        if isinstance(dim, str) and dim != FREE
    }


def recorded(difference: float) -> float:
    """A difference as a manifest holds it: one digit, since another machine's last digits are others."""
    return float(f"{difference:.0e}")
