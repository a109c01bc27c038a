"""The embedded engine: OpenFaaS's provider API over local processes, for development and the first five minutes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus_tools.engine.engine import Engine, run_engine
    from isthmus_tools.engine.events import Event

__all__ = ["Engine", "Event", "run_engine"]

_PLACES = {
    **dict.fromkeys(("Engine", "run_engine"), "engine"),
    "Event": "events",
}


def __getattr__(name: str) -> Any:
    # The engine loads an HTTP server and client: a quarter of a second that who reads a stack file need not pay.
    if name in _PLACES:
        return getattr(importlib.import_module(f"isthmus_tools.engine.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
