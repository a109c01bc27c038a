"""Isthmus: split inference as a bundle of serverless functions.

The public names load on first use (PEP 562): `import isthmus` alone imports no HTTP client and no numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.artifacts.conditions import Conditions, Constraints
    from isthmus.client import Client
    from isthmus.errors import (
        CalibrationError,
        CutError,
        FrameError,
        HopError,
        IsthmusError,
        LearningError,
        ModelError,
        PlanError,
        RegistryError,
        RequestError,
        SegmentError,
        SettingsError,
    )
    from isthmus.registry import open_registry
    from isthmus.settings import RegistrySettings

__version__ = "0.1.0"
__all__ = [
    "CalibrationError",
    "Client",
    "Conditions",
    "Constraints",
    "CutError",
    "FrameError",
    "HopError",
    "IsthmusError",
    "LearningError",
    "ModelError",
    "PlanError",
    "RegistryError",
    "RegistrySettings",
    "RequestError",
    "SegmentError",
    "SettingsError",
    "open_registry",
]
_MODULES = {
    "Client": "isthmus.client",
    "Conditions": "isthmus.artifacts.conditions",
    "Constraints": "isthmus.artifacts.conditions",
    "RegistrySettings": "isthmus.settings",
    "open_registry": "isthmus.registry",
}
"""The modules of the public names that are no errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "isthmus.errors")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
