"""What the engine tells whoever started it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

_log = logging.getLogger(__name__)

Kind = Literal["listening", "login", "deployed", "starting", "ready", "exited", "stopped", "failed", "log"]


@dataclass(frozen=True)
class Event:
    """One thing that happened: `function` and `replica` are empty where it concerns the engine itself."""

    kind: Kind
    text: str
    function: str = ""
    replica: str = ""


OnEvent: TypeAlias = Callable[[Event], None]


def shielded(on_event: OnEvent) -> OnEvent:
    """`on_event`, whose failures are logged: whatever tells an event goes on, be it a worker or a function's log."""

    def tell(event: Event) -> None:
        try:
            on_event(event)
        except Exception:
            _log.exception("an event was not told")

    return tell


def ignore(event: Event) -> None:
    """For who does not ask."""
