"""Local engine: OpenFaaS's provider API over processes of this machine, for development."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus_tools.engine.engine import Engine, EngineOptions, run_engine
    from isthmus_tools.engine.telemetry import Event

__all__ = ["Engine", "EngineOptions", "Event", "run_engine"]

_MODULES = {
    **dict.fromkeys(("Engine", "EngineOptions", "run_engine"), "engine"),
    "Event": "telemetry",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: the HTTP server and client take a quarter of a second, needless for reading a stack file.
    if name in _MODULES:
        return getattr(importlib.import_module(f"isthmus_tools.engine.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
