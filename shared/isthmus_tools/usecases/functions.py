"""Functions to measure on: deployed ones by URL, or a stack file's own, started on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from isthmus.artifacts.conditions import Conditions, Constraints, Objective
from isthmus.artifacts.plan import Candidate
from isthmus.processing.image_decoding import MAX_PIXELS
from isthmus.registry import Registry
from isthmus.runtime.tables import Tables
from isthmus_tools.budget import Budget
from isthmus_tools.engine import Engine, Event
from isthmus_tools.engine.cpu_share import CpuShare, share_of_a_cpu
from isthmus_tools.engine.credentials import SecretFolder
from isthmus_tools.engine.stack import read_stack
from isthmus_tools.netem.process import link_to
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.measurement import LinkedFunctions, contenders, measure
from isthmus_tools.progress import Progress, silent

HEAD, TAIL = "edge-head", "cloud-tail"
EDGE_FUNCTIONS = frozenset({"router", HEAD})
"""Functions that run at the edge, and share what it has of a CPU where the edge is slowed."""
# Measuring loads every segment and the whole model; the stack's bounds are for memory limits that do not apply here.
_MEASURING = {"preload": "", "cache_bytes": "8GiB", "max_loaded_bytes": "4GiB"}
# As in isthmus.serving.profiling, whose import would load Flask.
_SECRET = "profile-token"  # noqa: S105
# Until every function is ready, its preloaded segments included.
_START_S = 120.0


@dataclass(frozen=True)
class SlowedEdge:
    """An edge that has one CPU's 1/`slowdown`, by `method`."""

    slowdown: float
    method: str


@dataclass(frozen=True)
class FunctionUrls:
    """URLs of the function at the edge and of the function in the cloud, and the secret that allows profiling.

    An empty URL leaves that tier out. `slowed` says that the function at the edge was slowed for the measurement.
    """

    head: str = ""
    tail: str = ""
    token: str = ""
    slowed: SlowedEdge | None = None


@contextmanager
def stack_running(
    stack: Path,
    variables: Mapping[str, str],
    progress: Progress = silent,
    *,
    port: int = 0,
    replicas: Mapping[str, int] | None = None,
    environment: Mapping[str, Mapping[str, str]] | None = None,
    edge: CpuShare | None = None,
) -> Iterator[str]:
    """Run a stack file's functions for the block, ready; yields the gateway's URL. Options are those of `Engine`.

    With `edge` the functions of the edge have that share of a CPU from the moment when they are ready.

    Raises:
        LocalError: the stack cannot be read, the port is taken, or a function does not start.
    """
    progress(f"starting the functions of {stack}")
    on_event = joining(edge) if edge is not None else _ignore
    if edge is not None:
        environment = on_one_thread(environment or {})
    with Engine(
        stack, port=port, variables=variables, replicas=replicas, environment=environment, on_event=on_event
    ) as engine:
        engine.wait_ready(_START_S, lambda states: progress(f"starting: {_summary(states)}"))
        yield engine.url


def joining(edge: CpuShare) -> Callable[[Event], None]:
    """An engine's callback that moves each ready replica of an edge function into the share.

    Only then: a start at a small share of a CPU would take minutes.
    """

    def on_event(event: Event) -> None:
        if event.kind == "ready" and event.function in EDGE_FUNCTIONS:
            edge.add(event.pid)

    return on_event


def on_one_thread(environment: Mapping[str, Mapping[str, str]]) -> dict[str, Mapping[str, str]]:
    """Variables with which edge and cloud run on a thread each, so that the slowdown is the ratio of the two."""
    # In this order: a caller's own `threads` goes before the default of 1.
    return {**environment, "*": {"threads": "1", **environment.get("*", {})}}


def _ignore(event: Event) -> None:
    """No-op default callback."""


@contextmanager
def local_functions(
    stack: Path, variables: Mapping[str, str], progress: Progress = silent, edge_slowdown: float | None = None
) -> Iterator[FunctionUrls]:
    """Run the stack file's edge-head and cloud-tail for the block, bounded for measuring, with a profiling token.

    With `edge_slowdown` edge-head has that part of one CPU: 8 is an eighth.

    Raises:
        LocalError: the functions do not start, or no such slowdown is possible.
    """
    read = read_stack(stack, variables)
    # Functions profile for callers with this secret alone; the engine reads its stack's secrets from here.
    token = SecretFolder(read.root / ".isthmus" / "secrets").ensure(_SECRET)
    # Replicas of other functions would compete for the CPUs during measurements.
    unused = {name: 0 for name in read.functions if name not in (HEAD, TAIL)}
    with ExitStack() as resources:
        edge = None if edge_slowdown is None else resources.enter_context(share_of_a_cpu(1 / edge_slowdown))
        slowed = None if edge is None or edge_slowdown is None else SlowedEdge(edge_slowdown, edge.method)
        url = resources.enter_context(
            stack_running(stack, variables, progress, replicas=unused, environment={"*": _MEASURING}, edge=edge)
        )
        yield FunctionUrls(f"{url}/function/{HEAD}", f"{url}/function/{TAIL}", token, slowed)


def _summary(states: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {state if state == 'ready' else '…'}" for name, state in states.items())


def measure_candidates(
    functions: FunctionUrls,
    candidate_set: CandidateSet,
    candidates: Sequence[Candidate],
    registry: Registry,
    conditions: Conditions,
    *,
    objective: Objective,
    constraints: Constraints,
    progress: Progress,
    budget: Budget,
) -> Sequence[Candidate]:
    """The promising candidates, measured on the functions; the function in the cloud is behind an emulated link.

    Raises:
        HopError, RegistryError: a function or the registry cannot be reached.
    """
    progress("uploading the candidates' cuts")
    # By digest and without a version: nothing that serves changes before the plan is published.
    digest = candidate_set.stage(registry)
    with ExitStack() as link:
        tail = functions.tail
        # A relay takes time even where it limits nothing.
        if not conditions.adds_nothing:
            up, down, rtt_s = conditions.up_bps, conditions.down_bps, conditions.rtt_s
            tail = link.enter_context(link_to(tail, uplink_bps=up, downlink_bps=down, rtt_s=rtt_s))
        measured = measure(
            contenders(candidates, objective, constraints),
            digest,
            candidate_set.bundle,
            # The tail without the link as well: loading a model over a slow link would only take longer.
            LinkedFunctions(functions.head, tail, functions.tail),
            candidate_set.inputs,
            Tables(registry.bundle, registry.blob, MAX_PIXELS),
            registry.bundle,
            constraints=constraints,
            own_slowdown=functions.slowed.slowdown if functions.slowed is not None else 1.0,
            progress=progress,
            budget=budget,
        )
    if unmeasured := [m.name for m in measured if m.measured is None and not m.refused]:
        names = ", ".join(unmeasured)
        candidate_set.notes.append(f"the time limit left {len(unmeasured)} candidates unmeasured: {names}")
    return measured
