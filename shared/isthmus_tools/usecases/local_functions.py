"""A stack file's functions on this machine, to measure on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from isthmus.security.protected_call import open_protection
from isthmus.settings import SegmentSettings
from isthmus_tools.engine import Engine, Event
from isthmus_tools.engine.credentials import SecretFolder
from isthmus_tools.engine.stack import read_stack
from isthmus_tools.profiling.slow_edge import AT_FULL_SPEED, SlowEdge
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.function_urls import FunctionUrls

HEAD, TAIL = "edge-head", "cloud-tail"
EDGE_FUNCTIONS = frozenset({"router", HEAD})
"""Functions that run at the edge, and share what it has of a CPU where the edge is slowed."""
# Measuring loads every segment and the whole model; the stack's bounds are for memory limits that do not apply here.
_MEASURING = {"preload": "", "cache_bytes": "8GiB", "max_loaded_bytes": "4GiB"}
# As in isthmus.serving.profiling, whose import would load Flask.
_SECRET = "profile-token"  # noqa: S105
# Until every function is ready, its preloaded segments included.
_START_S = 120.0


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
    secrets = SecretFolder(read.root / ".isthmus" / "secrets")
    token, protection = secrets.ensure(_SECRET), open_protection(SegmentSettings(secrets_dir=str(secrets.path)))
    # Replicas of other functions would compete for the CPUs during measurements.
    unused = {name: 0 for name in read.functions if name not in (HEAD, TAIL)}
    environment: Mapping[str, Mapping[str, str]] = {"*": _MEASURING}
    # By replica: one that takes another's place has its process counted in place of the other's.
    pids: dict[str, int] = {}

    def on_event(event: Event) -> None:
        if event.kind == "ready" and event.function == HEAD:
            pids[event.replica] = event.pid
        elif event.kind in ("exited", "stopped"):
            pids.pop(event.replica, None)

    edge = AT_FULL_SPEED
    if edge_slowdown is not None:
        edge, environment = SlowEdge(edge_slowdown, pids.values()), on_one_thread(environment)
    progress(f"starting the functions of {stack}")
    with Engine(
        stack,
        port=0,
        variables=variables,
        replicas=unused,
        environment=environment,
        asynchronous=False,
        on_event=on_event,
    ) as engine:
        engine.wait_ready(_START_S, lambda states: progress(f"starting: {_summary(states)}"))
        head, tail = f"{engine.url}/function/{HEAD}", f"{engine.url}/function/{TAIL}"
        yield FunctionUrls(head, tail, token, edge, protection)


def _summary(states: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {state if state == 'ready' else '…'}" for name, state in states.items())
