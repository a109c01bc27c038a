"""Runners: segments in onnxruntime sessions."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from isthmus.arrays import Array, check_tensors, supplied_inputs
from isthmus.artifacts.bundle import Segment
from isthmus.artifacts.state import State
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import RunFailed, ShapeMismatch, ValueRefused
from isthmus.runtime.ort import check_providers, ort, ort_state, reason_of, time_limit
from isthmus.runtime.state_memory import StateBuffer

# TensorProto.BFLOAT16. numpy has no bfloat16, so onnxruntime passes these tensors as OrtValue.
_BFLOAT16 = 16


class Runner(Protocol):
    """A loaded segment, ready to run any number of times, from any thread."""

    @property
    def segment(self) -> Segment:
        """The segment."""
        ...

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The segment's outputs by name.

        Shapes: as in `segment.inputs` and `segment.outputs`; free dimensions take any size.

        Raises:
            ShapeMismatch: a tensor is missing, unknown, or of another dtype or shape; or the graph refused the shapes.
            ValueRefused: the graph refused a tensor's values, such as an index beyond a table.
            RunFailed: the runtime failed for another reason.
        """
        ...


class OrtRunner:
    """One segment in one onnxruntime session.

    The model is loaded by its path, so that onnxruntime maps the weights file instead of reading it.
    """

    def __init__(
        self,
        path: Path | bytes,
        segment: Segment,
        *,
        providers: tuple[str, ...],
        threads: int,
        state: State | None = None,
    ) -> None:
        """Load `segment` from the .onnx file at `path`, or from the file's bytes. `state` is its bundle's.

        Raises:
            SettingsError: a provider is not in this build of onnxruntime.
            RunFailed: onnxruntime refused the model; facts: `reason`.
        """
        self.segment, self.state = segment, state
        self._run_options: Any = None
        self._outputs = [s.name for s in segment.outputs]
        self._bfloat16 = any(s.dtype == "bfloat16" for s in (*segment.inputs, *segment.outputs))
        check_providers(providers)
        try:
            # The fallback would print to stdout, and run a GPU's model on the CPU.
            self._session = ort.InferenceSession(
                path if isinstance(path, bytes) else str(path),
                self._options(threads),
                providers=list(providers),
                enable_fallback=0,
            )
        except Exception as e:  # onnxruntime's own errors share no base but Exception
            reason = reason_of(e)
            raise RunFailed(
                f"segment {segment.id} cannot be loaded: {reason}", segment=segment.id, reason=reason
            ) from e
        if absent := [p for p in providers if p not in self._session.get_providers()]:
            raise RunFailed(
                f"segment {segment.id} cannot be loaded: {', '.join(absent)} did not start",
                segment=segment.id,
                hint="its driver or libraries are missing here; or take it out of the setting providers",
            )

    def _options(self, threads: int) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning threads steal the CPU of the other functions on the node.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # 4-bit weights are multiplied with float32 activations (1), not with activations rounded to int8 (4, the
        # default): only some of the segments of a cut model would round, so the split would differ from the whole.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        return options

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """See `Runner.run`."""
        check_tensors(self.segment.inputs, arrays)
        try:
            if self._bfloat16:
                values = {name: _to_value(array) for name, array in arrays.items()}
                outputs = self._session.run_with_ort_values(self._outputs, values, self._run_options)
                results = [_from_value(v, s) for v, s in zip(outputs, self.segment.outputs, strict=True)]
            else:
                feeds = {name: _usable(a) for name, a in arrays.items()}
                results = self._session.run(self._outputs, feeds, self._run_options)
        except Exception as e:
            if (refused := _refused_value(e, self.segment, arrays)) is not None:
                raise refused from e
            free = any(isinstance(n, str) for s in self.segment.inputs for n in s.shape)
            if free and _blames_input(e):
                shapes = {name: list(a.shape) for name, a in arrays.items()}
                raise ShapeMismatch(
                    f"segment {self.segment.id} cannot run with these shapes: {reason_of(e)}",
                    segment=self.segment.id,
                    got=shapes,
                ) from e
            raise RunFailed(f"segment {self.segment.id} failed: {reason_of(e)}", segment=self.segment.id) from e
        return dict(zip(self._outputs, results, strict=True))

    @cached_property
    def step_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs beside those that declared state supplies."""
        supplied = self.state.inputs if self.state is not None else ()
        return tuple(spec for spec in self.segment.inputs if spec.name not in supplied)

    def run_step(
        self, arrays: Mapping[str, Array], lengths: Array, buffers: Sequence[StateBuffer], scored: int
    ) -> dict[str, Array]:
        """The segment's outputs beside its state, whose memory is read and extended in place.

        Shapes: arrays (rows, tokens, …), lengths (rows,) int32: the tokens of each row with the new ones, less one.
        `scored` is as in `supplied_inputs`.

        Raises:
            As `run`.
        """
        check_tensors(self.step_inputs, arrays)
        kept = {b.present for b in buffers}
        names = [name for name in self._outputs if name not in kept]
        feeds = dict(arrays)
        if self.state is not None:
            supplied = supplied_inputs(self.state, lengths, scored)
            feeds |= {spec.name: supplied[spec.name] for spec in self.segment.inputs if spec.name in supplied}
        try:
            binding = self._session.io_binding()
            for name, array in feeds.items():
                binding.bind_cpu_input(name, _usable(array))
            for buffer in buffers:
                binding.bind_input(buffer.past, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.address)
                binding.bind_output(buffer.present, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.address)
            for name in names:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding, self._run_options)
            results = binding.get_outputs()[len(buffers) :]
            return dict(zip(names, (value.numpy() for value in results), strict=True))
        except Exception as e:
            if (refused := _refused_value(e, self.segment, arrays)) is not None:
                raise refused from e
            raise RunFailed(f"segment {self.segment.id} failed: {reason_of(e)}", segment=self.segment.id) from e


class UnpublishedRunner(OrtRunner):
    """An unpublished segment, in memory, on the CPU; its weights file is in `folder`, and mapped.

    Without `repack`, onnxruntime does not copy weights into faster layouts, so the mapped file is their only memory.
    """

    def __init__(self, graph: bytes, segment: Segment, folder: Path, *, threads: int, repack: bool) -> None:
        self._folder, self._repack = folder, repack
        super().__init__(graph, segment, providers=("CPUExecutionProvider",), threads=threads)

    def run_within(self, arrays: Mapping[str, Array], seconds: float) -> dict[str, Array]:
        """`run` within `seconds`.

        Raises:
            TimeoutError: the run was terminated.
        """
        with time_limit(seconds) as self._run_options:
            return self.run(arrays)

    def _options(self, threads: int) -> Any:
        options = super()._options(threads)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        if not self._repack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.log_severity_level = 4  # callers try sizes that may fail
        return options


def _usable(array: Array) -> Array:
    """`array`, or a copy where the runtime cannot use its memory: strided, unaligned, big-endian."""
    flags = array.flags
    if flags.c_contiguous and flags.aligned and array.dtype.isnative:
        return array
    return np.require(array, array.dtype.newbyteorder("=") if not array.dtype.isnative else None, ("C", "A"))


def _to_value(array: Array) -> Any:
    usable = _usable(array)
    if array.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(usable.view(np.uint16), _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(usable)


def _from_value(value: Any, spec: TensorSpec) -> Array:
    if spec.dtype != "bfloat16":
        array: Array = value.numpy()
        return array
    # numpy() has no bfloat16, so the bytes are copied from the value's memory.
    count = math.prod(value.shape())
    raw = ctypes.string_at(value.data_ptr(), count * 2)
    return np.frombuffer(raw, ml_dtypes.bfloat16).reshape(value.shape())


_OUT_OF_RANGE = re.compile(
    r"element out of data bounds|invalid ind\w* found|out of range value in index tensor|index out of range",
    re.IGNORECASE,
)
"""Messages of Gather, GatherElements, GatherND, Scatter* and EmbedLayerNormalization."""
_INDEX = re.compile(r"\b(?:idx|index|indice) ?= ?(-?\d+)")
_RANGE = re.compile(r"inclusive range \[(-?\d+), ?(-?\d+)\]")


def _refused_value(error: Exception, segment: Segment, arrays: Mapping[str, Array]) -> ValueRefused | None:
    """The error of a run that failed for the values of an input; None for other failures.

    Integers may be indices, sizes or counts, and with fixed shapes only their values can be wrong.
    """
    reason, integers = reason_of(error), {n: a for n, a in arrays.items() if a.dtype.kind in "iu"}
    if _OUT_OF_RANGE.search(reason) is None:
        fixed = all(isinstance(n, int) for s in segment.inputs for n in s.shape)
        if not (fixed and integers and isinstance(error, ort_state.InvalidArgument) and _blames_input(error)):
            return None
        return ValueRefused(f"segment {segment.id} cannot run with these values: {reason}", segment=segment.id)
    facts: dict[str, Any] = {"segment": segment.id}
    message = "an index is out of range"
    if match := _INDEX.search(reason):
        facts["value"] = int(match[1])
        holders = [name for name, array in integers.items() if (array == facts["value"]).any()]
        if len(holders) == 1:
            facts["tensor"] = holders[0]
        message += f": {holders[0] if len(holders) == 1 else 'a tensor'} holds {facts['value']}"
    if match := _RANGE.search(reason):
        facts["expected"] = f"{match[1]} to {match[2]}"
        message += f", and {facts['expected']} are taken"
    return ValueRefused(f"{message}; segment {segment.id}: {reason}", **facts)


def _blames_input(error: Exception) -> bool:
    """Whether shapes may be the cause of a failed run; onnxruntime has the same errors for lack of memory."""
    kinds = (ort_state.InvalidArgument, ort_state.Fail, ort_state.RuntimeException)
    return isinstance(error, kinds) and "alloc" not in str(error)
