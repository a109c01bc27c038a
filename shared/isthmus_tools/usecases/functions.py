"""Functions to measure on: deployed ones by URL, or a stack file's own, started on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from isthmus_tools.engine.credentials import SecretFolder
from isthmus_tools.engine.stack import read_stack
from isthmus_tools.engine.telemetry import OnEvent, ignore_event
from isthmus_tools.netem.process import link_to
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.measurement import LinkedFunctions, contenders, measure
from isthmus_tools.profiling.slow_edge import AT_FULL_SPEED, SlowEdge
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
class FunctionUrls:
    """URLs of the function at the edge and of the function in the cloud, and the secret that allows profiling.

    An empty URL leaves that tier out. Work at the edge counts as that of `edge`.
    """

    head: str = ""
    tail: str = ""
    token: str = ""
    edge: SlowEdge = AT_FULL_SPEED


@contextmanager
def stack_running(
    stack: Path,
    variables: Mapping[str, str],
    progress: Progress = silent,
    *,
    port: int = 0,
    replicas: Mapping[str, int] | None = None,
    environment: Mapping[str, Mapping[str, str]] | None = None,
    on_event: OnEvent = ignore_event,
) -> Iterator[str]:
    """Run a stack file's functions for the block, ready; yields the gateway's URL. Options are those of `Engine`.

    Raises:
        LocalError: the stack cannot be read, the port is taken, or a function does not start.
    """
    progress(f"starting the functions of {stack}")
    with Engine(
        stack, port=port, variables=variables, replicas=replicas, environment=environment, on_event=on_event
    ) as engine:
        engine.wait_ready(_START_S, lambda states: progress(f"starting: {_summary(states)}"))
        yield engine.url


def on_one_thread(environment: Mapping[str, Mapping[str, str]]) -> dict[str, Mapping[str, str]]:
    """Variables with which edge and cloud run on a thread each, so that the slowdown is the ratio of the two."""
    # In this order: a caller's own `threads` goes before the default of 1.
    return {**environment, "*": {"threads": "1", **environment.get("*", {})}}


@contextmanager
def local_functions(
    stack: Path, variables: Mapping[str, str], progress: Progress = silent, edge_slowdown: float | None = None
) -> Iterator[FunctionUrls]:
    """Run the stack file's edge-head and cloud-tail for the block, bounded for measuring, with a profiling token.

    With `edge_slowdown` the edge is that many times slower: its work's CPU time counts as often.

    Raises:
        LocalError: the functions do not start.
    """
    read = read_stack(stack, variables)
    # Functions profile for callers with this secret alone; the engine reads its stack's secrets from here.
    token = SecretFolder(read.root / ".isthmus" / "secrets").ensure(_SECRET)
    # Replicas of other functions would compete for the CPUs during measurements.
    unused = {name: 0 for name in read.functions if name not in (HEAD, TAIL)}
    environment: Mapping[str, Mapping[str, str]] = {"*": _MEASURING}
    # By replica: one that takes another's place has its process counted in place of the other's.
    pids: dict[str, int] = {}

    def on_event(event: Event) -> None:
        if event.kind == "ready" and event.function == HEAD:
            pids[event.replica] = event.pid
        elif event.kind == "exited":
            pids.pop(event.replica, None)

    edge = AT_FULL_SPEED
    if edge_slowdown is not None:
        edge, environment = SlowEdge(edge_slowdown, pids.values()), on_one_thread(environment)
    with stack_running(stack, variables, progress, replicas=unused, environment=environment, on_event=on_event) as url:
        yield FunctionUrls(f"{url}/function/{HEAD}", f"{url}/function/{TAIL}", token, edge)


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
            edge=functions.edge,
            progress=progress,
            budget=budget,
        )
    if unmeasured := [m.name for m in measured if m.measured is None and not m.refused]:
        names = ", ".join(unmeasured)
        candidate_set.notes.append(f"the time limit left {len(unmeasured)} candidates unmeasured: {names}")
    return measured
