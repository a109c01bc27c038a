"""Segments on onnxruntime."""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from isthmus.arrays import Array, check_tensors
from isthmus.artifacts.bundle import Segment
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import RunFailed, SettingsError, ShapeMismatch, ValueRefused
from isthmus.runtime.kernels import MAX_TRACE_BYTES, Observed, read_trace
from isthmus.runtime.ort import ort, ort_state, time_limit

_BFLOAT16 = 16
"""TensorProto.BFLOAT16; numpy has no such dtype, so onnxruntime takes and gives it through OrtValue."""
_GRAPH, _WEIGHTS = "optimised.onnx", "weights.bin"
_MIN_NODE_BYTES = 150
_MAX_EVENTS = 40_000
"""A trace takes 650 bytes for each kernel of each run."""


class Runner(Protocol):
    """A loaded segment, ready to run any number of times, from any thread."""

    @property
    def segment(self) -> Segment:
        """What it runs."""
        ...

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The segment's outputs by name.

        Shapes: as `segment.inputs` and `segment.outputs` declare; free dimensions take any size.

        Raises:
            ShapeMismatch: a tensor is missing, unknown, or of another dtype or shape; or the graph refused the shapes.
            ValueRefused: the graph refused a tensor's values, such as an index beyond a table.
            RunFailed: the runtime failed for a reason of its own.
        """
        ...


class OrtRunner:
    """One segment in one onnxruntime session, which is built here, once.

    The model is loaded by its path, so that onnxruntime maps the weights file beside it instead of reading it.
    """

    def __init__(self, path: Path | bytes, segment: Segment, *, providers: tuple[str, ...], threads: int) -> None:
        """Load `segment` from the .onnx file at `path`, or from such a file's bytes.

        Raises:
            SettingsError: a provider is not in this build of onnxruntime.
            RunFailed: onnxruntime refused the model; its own words are in `facts["reason"]`.
        """
        self.segment = segment
        self._run_options: Any = None
        self._outputs = [s.name for s in segment.outputs]
        self._bfloat16 = any(s.dtype == "bfloat16" for s in (*segment.inputs, *segment.outputs))
        check_providers(providers)
        try:
            # Without its fallback, which prints to stdout and runs on the CPU what was meant for a GPU.
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
        # default): only some of the segments of a cut model would round them, so the split would differ from the whole.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        return options

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """See `Runner.run`."""
        check_tensors(self.segment.inputs, arrays)
        try:
            if self._bfloat16:
                values = {name: _to_value(array) for name, array in arrays.items()}
                found = self._session.run_with_ort_values(self._outputs, values, self._run_options)
                results = [_from_value(v, s) for v, s in zip(found, self.segment.outputs, strict=True)]
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


class OrtObserver(OrtRunner):
    """A segment in a session that notes what each kernel takes; `folder` is empty and of its own, until `finish`."""

    def __init__(self, path: Path, segment: Segment, *, providers: tuple[str, ...], threads: int, folder: Path) -> None:
        self._folder = folder
        # The optimised graph is wanted, a second copy of the weights is not.
        (folder / _WEIGHTS).symlink_to(os.devnull)
        super().__init__(path, segment, providers=providers, threads=threads)

    def _options(self, threads: int) -> Any:
        options = super()._options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(self._folder / "trace")
        options.optimized_model_filepath = str(self._folder / _GRAPH)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        return options

    def most_runs(self) -> int:
        """So many that the trace stays some tens of megabytes, at least the two that show how much memory is kept."""
        nodes = (self._folder / _GRAPH).stat().st_size // _MIN_NODE_BYTES
        return max(2, _MAX_EVENTS // max(1, nodes))

    def finish(self, runs: int, weights_bytes: int) -> Observed:
        """What was noted of `runs` runs; none can follow.

        Raises:
            RunFailed: the trace is too long, or cannot be read.
        """
        try:
            trace = Path(self._session.end_profiling())
            if trace.stat().st_size > MAX_TRACE_BYTES:
                raise ValueError(f"it has more than {MAX_TRACE_BYTES} bytes")
            graph = (self._folder / _GRAPH).read_bytes()
            return read_trace(trace.read_bytes(), graph=graph, runs=runs, weights_bytes=weights_bytes)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise RunFailed(
                f"the trace of segment {self.segment.id} cannot be read: {e}", segment=self.segment.id
            ) from e


class UnpublishedRunner(OrtRunner):
    """A segment that lies in no file yet, on the CPU; the weights file is in `folder`, and mapped from there.

    Without `repack` no weights are laid out anew for faster products, so that the mapped ones are all there are.
    """

    def __init__(self, graph: bytes, segment: Segment, folder: Path, *, threads: int, repack: bool) -> None:
        self._folder, self._repack = folder, repack
        super().__init__(graph, segment, providers=("CPUExecutionProvider",), threads=threads)

    def run_within(self, arrays: Mapping[str, Array], seconds: float) -> dict[str, Array]:
        """As `run`; it ends by then.

        Raises:
            TimeoutError: it was ended.
        """
        with time_limit(seconds) as self._run_options:
            return self.run(arrays)

    def _options(self, threads: int) -> Any:
        options = super()._options(threads)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        if not self._repack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.log_severity_level = 4  # a size that does not run is no error here
        return options


def version() -> str:
    """The runtime and its version."""
    return f"onnxruntime {ort.__version__}"


def available_providers() -> list[str]:
    """The execution providers of this build of onnxruntime."""
    found: list[str] = ort.get_available_providers()
    return found


def check_providers(providers: tuple[str, ...]) -> None:
    """Refuse execution providers that this build of onnxruntime does not have.

    Raises:
        SettingsError: names the missing one and those there are.
    """
    available = available_providers()
    for provider in providers:
        if provider not in available:
            raise SettingsError(
                f"the setting providers names {provider}; this onnxruntime has {', '.join(available)}",
                variable="providers",
                value=provider,
            )


def cpu_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole CPUs that this process may use: its affinity and its container's quota, at least one.

    onnxruntime itself counts the node's cores, and a container with a quota below that is throttled.
    """
    # macOS has no affinity to ask for.
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, int(quota) / int(period))
    except (OSError, ValueError):
        try:
            quota_us = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
            period_us = int((cgroup / "cpu/cpu.cfs_period_us").read_text())
            if quota_us > 0:
                cpus = min(cpus, quota_us / period_us)
        except (OSError, ValueError):
            pass  # no cgroup to read: the affinity stands
    return max(1, int(cpus))


def _usable(array: Array) -> Array:
    """Itself, or a copy where the runtime cannot use its bytes as they lie: strided, unaligned, big-endian."""
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
        found: Array = value.numpy()
        return found
    # No dtype of numpy's matches, so the bytes are read where they lie and copied.
    count = math.prod(value.shape())
    raw = ctypes.string_at(value.data_ptr(), count * 2)
    return np.frombuffer(raw, ml_dtypes.bfloat16).reshape(value.shape())


_OUT_OF_RANGE = re.compile(
    r"element out of data bounds|invalid ind\w* found|out of range value in index tensor|index out of range",
    re.IGNORECASE,
)
"""How Gather, GatherElements, GatherND, Scatter* and EmbedLayerNormalization say it."""
_INDEX = re.compile(r"\b(?:idx|index|indice) ?= ?(-?\d+)")
_RANGE = re.compile(r"inclusive range \[(-?\d+), ?(-?\d+)\]")


def _refused_value(error: Exception, segment: Segment, arrays: Mapping[str, Array]) -> ValueRefused | None:
    """A run's failure that the values of an input are to blame for; None where they are not.

    Values of whole-number inputs may be indices, sizes or counts, and of fixed shapes they are all that can be wrong.
    """
    reason, whole = reason_of(error), {n: a for n, a in arrays.items() if a.dtype.kind in "iu"}
    if _OUT_OF_RANGE.search(reason) is None:
        fixed = all(isinstance(n, int) for s in segment.inputs for n in s.shape)
        if not (fixed and whole and isinstance(error, ort_state.InvalidArgument) and _blames_input(error)):
            return None
        return ValueRefused(f"segment {segment.id} cannot run with these values: {reason}", segment=segment.id)
    facts: dict[str, Any] = {"segment": segment.id}
    message = "an index is out of range"
    if found := _INDEX.search(reason):
        facts["value"] = int(found[1])
        holders = [name for name, array in whole.items() if (array == facts["value"]).any()]
        if len(holders) == 1:
            facts["tensor"] = holders[0]
        message += f": {holders[0] if len(holders) == 1 else 'a tensor'} holds {facts['value']}"
    if found := _RANGE.search(reason):
        facts["expected"] = f"{found[1]} to {found[2]}"
        message += f", and {facts['expected']} are taken"
    return ValueRefused(f"{message}; segment {segment.id}: {reason}", **facts)


def _blames_input(error: Exception) -> bool:
    """Whether shapes may be why a run failed; want of memory, which onnxruntime reports alike, is not."""
    kinds = (ort_state.InvalidArgument, ort_state.Fail, ort_state.RuntimeException)
    return isinstance(error, kinds) and "alloc" not in str(error)


_MAX_REASON = 500
_PREAMBLE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : |Load model from .*? failed: ?|^Exception during \w+: |Fatal error: "
)
_ARGUMENTS = r"[^()]*\((?:[^()]|\([^()]*\))*\)"
_SOURCE_LINE = re.compile(
    rf"\S+\.(?:cc|cpp|h|hpp|cu|cuh):\d+ {_ARGUMENTS}(?:::{_ARGUMENTS})*(?: const)?(?: \[with [^\]]*\])? ?"
)


# The node comes first, with the types of all that it takes and gives, which may fill pages.
_LOADING = re.compile(
    r"This is an invalid model\. In Node, \(\"(?P<name>.*?)\", (?P<op>[\w.]+),.*?, Error (?P<reason>.+)"
)
_RUNNING = re.compile(
    r"Non-zero status code returned while running (?P<op>\S+) node\. Name:'(?P<name>.*?)'"
    r" Status Message: (?P<reason>.+)"
)


def reason_of(error: Exception) -> str:
    """onnxruntime's own reason on one line, bounded: without the model's path, and the place in its sources.

    It comes first, then the node that it is about.
    """
    text = " ".join(str(error).split())
    text = _SOURCE_LINE.sub("", _PREAMBLE.sub("", text)).strip() or text
    if (found := _LOADING.fullmatch(text) or _RUNNING.fullmatch(text)) is not None:
        text = f"{found['reason'][:_MAX_REASON]} (node {found['name'] or found['op']})"
    return text[: 2 * _MAX_REASON]
