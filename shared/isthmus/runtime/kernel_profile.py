"""Profiles of a segment's runs by onnxruntime's profiler: the time of each kernel, and the arena's memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.artifacts.bundle import Segment
from isthmus.errors import RunFailed
from isthmus.runtime.ort_runner import OrtRunner

MAX_TRACE_BYTES = 256 * 2**20
_SUFFIX = "_kernel_time"
# The profiler truncates to microseconds, by 0.5 on average; most kernels of a small model take few.
_TRUNCATED_US = 0.5
_GRAPH, _WEIGHTS = "optimised.onnx", "weights.bin"
# A node takes at least 150 bytes of the graph's file; a trace takes 650 bytes for each kernel of each run.
_MIN_NODE_BYTES = 150
_MAX_EVENTS = 40_000


@dataclass(frozen=True)
class Kernel:
    """One node of the optimised graph, by its name there, and its run time in seconds."""

    name: str
    op: str
    seconds: float


@dataclass(frozen=True)
class SessionMemory:
    """Memory of a session, in bytes.

    `weights_bytes` are the weights as stored. Of the runtime's arena: `packed_bytes` are held by the loaded session
    (repacked weights), `activation_bytes` is the peak of a run above these, `arena_bytes` the whole arena.
    """

    weights_bytes: int
    packed_bytes: int
    activation_bytes: int
    arena_bytes: int


@dataclass(frozen=True)
class KernelProfile:
    """The profile of `runs` runs of one segment.

    `kernels` are in the order of execution; the time of If and Loop includes their bodies. `graph` is onnxruntime's
    optimised model, without weights.
    """

    runs: int
    kernels: tuple[Kernel, ...]
    memory: SessionMemory
    graph: bytes


def read_trace(trace: bytes, *, graph: bytes, runs: int, weights_bytes: int) -> KernelProfile:
    """Read the profiler's trace of `runs` equal runs.

    Raises:
        ValueError: the trace is malformed, or has no kernel.
    """
    events = [e for e in json.loads(trace) if e.get("cat") == "Node" and e["name"].endswith(_SUFFIX)]
    events.sort(key=lambda e: (e["ts"], -e["dur"]))
    if not events:
        raise ValueError("the trace holds no kernel")
    top = list(_outermost(events))
    times: dict[str, list[float]] = {}
    ops: dict[str, str] = {}
    for event in top:
        name = event["name"].removesuffix(_SUFFIX)
        times.setdefault(name, []).append((event["dur"] + _TRUNCATED_US) / 1e6)
        ops[name] = str(event["args"]["op_name"])
    # The first run has cold caches.
    kernels = tuple(Kernel(name, ops[name], midmean(runs[1:] or runs)) for name, runs in times.items())
    return KernelProfile(runs, kernels, _memory(events, weights_bytes), graph)


def midmean(values: Sequence[float]) -> float:
    """The mean of the middle half: robust against outliers like the median, with a resolution below a microsecond."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    half = ordered[quarter : len(ordered) - quarter]
    return sum(half) / len(half)


def _outermost(events: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The events that are not nested in another event; `events` are in the order of their start."""
    end = -1.0
    for event in events:
        if event["ts"] >= end:
            end = event["ts"] + event["dur"]
            yield event


def _memory(events: Sequence[Mapping[str, Any]], weights_bytes: int) -> SessionMemory:
    arena = [e["args"] for e in events if "mem_bytes_in_use" in e["args"]]
    if not arena:  # a provider without memory statistics
        return SessionMemory(weights_bytes, 0, 0, 0)
    packed = int(arena[0]["mem_bytes_in_use"]) - int(arena[0]["mem_in_use_delta"])
    # Loading has its own peak; only a higher peak is that of a run.
    before, after = int(arena[0]["mem_in_use_peak"]), max(int(a["mem_in_use_peak"]) for a in arena)
    used = max(int(a["mem_bytes_in_use"]) for a in arena)
    peak = after if after > before else used
    arena_bytes = max(int(a["mem_arena_held"]) for a in arena)
    return SessionMemory(weights_bytes, max(0, packed), max(0, peak - packed), arena_bytes)


class OrtObserver(OrtRunner):
    """A segment in a profiling session; `folder` is empty and for its files alone, until `finish`."""

    def __init__(self, path: Path, segment: Segment, *, providers: tuple[str, ...], threads: int, folder: Path) -> None:
        self._folder = folder
        # onnxruntime writes the optimised graph with its weights; only the graph is of use.
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

    def max_runs(self) -> int:
        """Bound on the runs of a trace of some tens of megabytes; at least two, to show the arena's growth."""
        nodes = (self._folder / _GRAPH).stat().st_size // _MIN_NODE_BYTES
        return max(2, _MAX_EVENTS // max(1, nodes))

    def finish(self, runs: int, weights_bytes: int) -> KernelProfile:
        """End the session, and read the profile of its `runs` runs.

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
