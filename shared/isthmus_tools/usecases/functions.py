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
from isthmus_tools.engine import Engine
from isthmus_tools.engine.credentials import SecretFolder
from isthmus_tools.engine.stack import read_stack
from isthmus_tools.netem.process import link_to
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.measurement import LinkedFunctions, contenders, measure
from isthmus_tools.progress import Progress, silent

HEAD, TAIL = "edge-head", "cloud-tail"
# Measuring loads every segment and the whole model; the stack's bounds are for memory limits that do not apply here.
_MEASURING = {"preload": "", "cache_bytes": "8GiB", "max_loaded_bytes": "4GiB"}
# As in isthmus.serving.profiling, whose import would load Flask.
_SECRET = "profile-token"  # noqa: S105
# Until every function is ready, its preloaded segments included.
_START_S = 120.0


@dataclass(frozen=True)
class FunctionUrls:
    """URLs of the function at the edge and of the function in the cloud, and the secret that allows profiling.

    An empty URL leaves that tier out.
    """

    head: str = ""
    tail: str = ""
    token: str = ""


@contextmanager
def stack_running(
    stack: Path,
    variables: Mapping[str, str],
    progress: Progress = silent,
    *,
    port: int = 0,
    replicas: Mapping[str, int] | None = None,
    environment: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[str]:
    """Run a stack file's functions for the block, ready; yields the gateway's URL. Options are those of `Engine`.

    Raises:
        LocalError: the stack cannot be read, the port is taken, or a function does not start.
    """
    progress(f"starting the functions of {stack}")
    with Engine(stack, port=port, variables=variables, replicas=replicas, environment=environment) as engine:
        engine.wait_ready(_START_S, lambda states: progress(f"starting: {_summary(states)}"))
        yield engine.url


@contextmanager
def local_functions(stack: Path, variables: Mapping[str, str], progress: Progress = silent) -> Iterator[FunctionUrls]:
    """Run the stack file's edge-head and cloud-tail for the block, bounded for measuring, with a profiling token.

    Raises:
        LocalError: the functions do not start.
    """
    read = read_stack(stack, variables)
    token = SecretFolder(read.root / ".isthmus" / "secrets").ensure(_SECRET)
    # Replicas of other functions would compete for the CPUs during measurements.
    unused = {name: 0 for name in read.functions if name not in (HEAD, TAIL)}
    with stack_running(stack, variables, progress, replicas=unused, environment={"*": _MEASURING}) as url:
        yield FunctionUrls(f"{url}/function/{HEAD}", f"{url}/function/{TAIL}", token)


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
    digest = candidate_set.stage(registry)
    with ExitStack() as link:
        tail = functions.tail
        if not conditions.adds_nothing:
            up, down, rtt_s = conditions.up_bps, conditions.down_bps, conditions.rtt_s
            tail = link.enter_context(link_to(tail, uplink_bps=up, downlink_bps=down, rtt_s=rtt_s))
        measured = measure(
            contenders(candidates, objective, constraints),
            digest,
            candidate_set.bundle,
            LinkedFunctions(functions.head, tail, functions.tail),
            candidate_set.inputs,
            Tables(registry.bundle, registry.blob, MAX_PIXELS),
            registry.bundle,
            constraints=constraints,
            progress=progress,
            budget=budget,
        )
    if unmeasured := [m.name for m in measured if m.measured is None and not m.refused]:
        names = ", ".join(unmeasured)
        candidate_set.notes.append(f"the time limit left {len(unmeasured)} candidates unmeasured: {names}")
    return measured
