"""The functions that a command measures on: deployed ones by their URLs, or the stack's own, started here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from isthmus.errors import RequestMalformed
from isthmus.units import parse_duration
from isthmus_tools.budget import Budget
from isthmus_tools.cli.console import read_option
from isthmus_tools.progress import Progress

HEAD, TAIL = "edge-head", "cloud-tail"
_HERE = {"preload": "", "cache_bytes": "8GiB", "max_loaded_bytes": "4GiB"}
"""Measuring loads what it measures, the whole model too. The stack's bounds fit limits that nothing enforces here."""
TimeLimit = Annotated[
    str, typer.Option(help="Begin nothing more after this time; what was left out is told. 0s is no limit.")
]


def budget_of(time_limit: str) -> Budget:
    """The budget that --time-limit asks for, from now on.

    Raises:
        RequestMalformed: it is no duration.
    """
    return Budget(read_option(parse_duration, "--time-limit", time_limit) or math.inf)


@dataclass(frozen=True)
class Places:
    """The head's URL, the tail's, and the token that lets them be profiled, where it is known."""

    head: str
    tail: str
    token: str = ""


@contextmanager
def places(local: bool, stack: Path, registry: str, head: str, tail: str, step: Progress) -> Iterator[Places]:
    """Where to measure, for as long as the block lasts: the URLs that were named, or functions started for it.

    Raises:
        RequestMalformed: functions both named and to be started.
        LocalError: the stack's functions do not start.
    """
    if local and (head or tail):
        raise RequestMalformed("--local starts its own functions: leave --head and --tail out")
    if not local:
        yield Places(head, tail)
        return
    from isthmus.serving.profiling import SECRET
    from isthmus_tools.cli.engine import engine, variables
    from isthmus_tools.engine.secrets import SecretFolder
    from isthmus_tools.engine.stack import read_stack

    read = read_stack(stack, variables(registry))
    token = SecretFolder(read.root / ".isthmus" / "secrets").ensure(SECRET)
    unused = {name: 0 for name in read.functions if name not in (HEAD, TAIL)}
    with engine(stack, registry, 0, step, replicas=unused, environment={"*": _HERE}) as url:
        yield Places(f"{url}/function/{HEAD}", f"{url}/function/{TAIL}", token)
