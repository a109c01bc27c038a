"""What the engine tells whoever started it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind = Literal["listening", "login", "deployed", "starting", "ready", "exited", "stopped", "failed", "log"]


@dataclass(frozen=True)
class Event:
    """One thing that happened: `function` and `replica` are empty where it concerns the engine itself."""

    kind: Kind
    text: str
    function: str = ""
    replica: str = ""


OnEvent: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """For who does not ask."""
