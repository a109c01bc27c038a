"""The embedded engine as commands use it: with the registry that they were told, and its progress shown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from isthmus.registry import parse_address
from isthmus_tools.cli.console import registry_settings
from isthmus_tools.progress import Progress


def variables(registry: str) -> dict[str, str]:
    """What stack.yml's ${…} are filled from: this process's environment, and the registry as commands understand it.

    A folder's path becomes absolute. The S3 server and region are those of the commands, whichever variable names them.

    Raises:
        SettingsError: `registry` is no address, or the environment's settings contradict each other.
    """
    settings, folder = registry_settings(registry), parse_address(registry).folder
    s3 = {"S3_ENDPOINT": settings.s3_endpoint, "S3_REGION": settings.s3_region}
    return {
        **os.environ,
        "ISTHMUS_REGISTRY": str(Path(folder).absolute()) if folder else registry,
        **{name: text for name, text in s3.items() if text},
    }


@contextmanager
def engine(
    stack: Path,
    registry: str,
    port: int,
    step: Progress,
    *,
    replicas: Mapping[str, int] | None = None,
    environment: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[str]:
    """The functions of `stack`, ready, for as long as the block lasts; the gateway's address. See `Engine`.

    Raises:
        LocalError: the stack cannot be read, the port is taken, or a function does not start.
    """

    from isthmus_tools.engine import Engine  # an HTTP server and client

    step(f"starting the functions of {stack}")
    with Engine(stack, port=port, variables=variables(registry), replicas=replicas, environment=environment) as running:
        running.wait_ready(120.0, lambda states: step(f"starting: {_told(states)}"))
        yield running.url


def _told(states: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {state if state == 'ready' else '…'}" for name, state in states.items())
