"""What onnxruntime's own profiler says of a session's runs: the time of each kernel, and the arena's memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_TRACE_BYTES = 256 * 2**20
_SUFFIX = "_kernel_time"
_TRUNCATED_US = 0.5
"""The profiler cuts microseconds off, half of one on average; most kernels of a small model take few."""


@dataclass(frozen=True)
class Kernel:
    """One node of the optimised graph, by the name that it has there, and the seconds that one run of it takes."""

    name: str
    op: str
    seconds: float


@dataclass(frozen=True)
class Memory:
    """Bytes: a segment's weights as stored, and of the runtime's arena what the loaded session holds (`packed`: weights
    laid out anew), the most that one run has in use above that, and all that the arena took and keeps."""

    weights_bytes: int
    packed_bytes: int
    activation_bytes: int
    arena_bytes: int


@dataclass(frozen=True)
class Observed:
    """What was seen of `runs` runs of one segment.

    `kernels` are in the order in which they ran, and hold the bodies of If and Loop in the time of those nodes.
    `graph` is the optimised model without its weights, as onnxruntime wrote it.
    """

    runs: int
    kernels: tuple[Kernel, ...]
    memory: Memory
    graph: bytes


def read_trace(trace: bytes, *, graph: bytes, runs: int, weights_bytes: int) -> Observed:
    """What a profile of `runs` equal runs holds.

    Raises:
        ValueError: the trace is not one, or its runs differ in their kernels.
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
    # What a kernel took before the caches were warm is the first of its times.
    kernels = tuple(Kernel(name, ops[name], middle(found[1:] or found)) for name, found in times.items())
    return Observed(runs, kernels, _memory(events, weights_bytes), graph)


def middle(values: Sequence[float]) -> float:
    """The mean of the middle half: it bears outliers as the median does, and resolves whole microseconds further."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    kept = ordered[quarter : len(ordered) - quarter]
    return sum(kept) / len(kept)


def _outermost(events: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Those that did not run inside another one; `events` come by their start."""
    end = -1.0
    for event in events:
        if event["ts"] >= end:
            end = event["ts"] + event["dur"]
            yield event


def _memory(events: Sequence[Mapping[str, Any]], weights_bytes: int) -> Memory:
    arena = [e["args"] for e in events if "mem_bytes_in_use" in e["args"]]
    if not arena:  # a provider whose allocator keeps no count
        return Memory(weights_bytes, 0, 0, 0)
    packed = int(arena[0]["mem_bytes_in_use"]) - int(arena[0]["mem_in_use_delta"])
    # Loading has a peak of its own, which is no run's; only a higher one is.
    before, after = int(arena[0]["mem_in_use_peak"]), max(int(a["mem_in_use_peak"]) for a in arena)
    used = max(int(a["mem_bytes_in_use"]) for a in arena)
    peak = after if after > before else used
    held = max(int(a["mem_arena_held"]) for a in arena)
    return Memory(weights_bytes, max(0, packed), max(0, peak - packed), held)
