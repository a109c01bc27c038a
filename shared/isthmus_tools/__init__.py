"""Isthmus's tools: import, cut, calibrate, profile, plan and run split models on an engineer's machine.

The public names load on first use (PEP 562): they stand on onnx, onnxruntime and numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus_tools.budget import Budget
    from isthmus_tools.graph.exporting import ModelInputs
    from isthmus_tools.learning.exits.head import ExitRisk
    from isthmus_tools.learning.training.config import TrainingPlace, read_config
    from isthmus_tools.progress import Progress
    from isthmus_tools.usecases.batch import BatchRequest, BatchResult, classify_photos
    from isthmus_tools.usecases.calibrate import CalibrateRequest, CalibrateResult, calibrate
    from isthmus_tools.usecases.compress import CompressRequest, CompressResult, compress
    from isthmus_tools.usecases.cut import CutList, CutRequest, CutResult, cut, list_cuts
    from isthmus_tools.usecases.exits import ExitsRequest, ExitsResult, exits
    from isthmus_tools.usecases.function_urls import FunctionUrls
    from isthmus_tools.usecases.fuse import FuseRequest, FuseResult, fuse
    from isthmus_tools.usecases.fuse_members import FuseMembersRequest, FuseMembersResult, fuse_members
    from isthmus_tools.usecases.local_functions import local_functions
    from isthmus_tools.usecases.local_model import LocalModel
    from isthmus_tools.usecases.model_import import ImportRequest, import_model
    from isthmus_tools.usecases.package import PackageRequest, PackageResult, package
    from isthmus_tools.usecases.plan import PlanRequest, PlanResult, plan
    from isthmus_tools.usecases.profile import ProfileRequest, ProfileResult, profile
    from isthmus_tools.usecases.publication import Publication
    from isthmus_tools.usecases.publish import (
        PromoteRequest,
        PromoteResult,
        PublishRequest,
        PublishResult,
        promote,
        publish,
    )
    from isthmus_tools.usecases.pull import PullRequest, PullResult, pull
    from isthmus_tools.usecases.train import TrainRequest, TrainResult, train
    from isthmus_tools.usecases.trigger import PartCheck, TriggerRequest, check_trigger, run_trigger
    from isthmus_tools.usecases.verify import VerifyRequest, VerifyResult, verify

_NAMES = {
    "budget": ("Budget",),
    "progress": ("Progress",),
    "usecases.batch": ("BatchRequest", "BatchResult", "classify_photos"),
    "usecases.calibrate": ("CalibrateRequest", "CalibrateResult", "calibrate"),
    "usecases.compress": ("CompressRequest", "CompressResult", "compress"),
    "usecases.cut": ("CutList", "CutRequest", "CutResult", "cut", "list_cuts"),
    "usecases.exits": ("ExitsRequest", "ExitsResult", "exits"),
    "usecases.function_urls": ("FunctionUrls",),
    "usecases.fuse": ("FuseRequest", "FuseResult", "fuse"),
    "usecases.fuse_members": ("FuseMembersRequest", "FuseMembersResult", "fuse_members"),
    "usecases.local_functions": ("local_functions",),
    "usecases.local_model": ("LocalModel",),
    "usecases.model_import": ("ImportRequest", "import_model"),
    "usecases.package": ("PackageRequest", "PackageResult", "package"),
    "usecases.plan": ("PlanRequest", "PlanResult", "plan"),
    "usecases.profile": ("ProfileRequest", "ProfileResult", "profile"),
    "usecases.publication": ("Publication",),
    "usecases.publish": ("PromoteRequest", "PromoteResult", "PublishRequest", "PublishResult", "promote", "publish"),
    "usecases.pull": ("PullRequest", "PullResult", "pull"),
    "usecases.train": ("TrainRequest", "TrainResult", "train"),
    "learning.training.config": ("TrainingPlace", "read_config"),
    "usecases.trigger": ("PartCheck", "TriggerRequest", "check_trigger", "run_trigger"),
    "usecases.verify": ("VerifyRequest", "VerifyResult", "verify"),
    "graph.exporting": ("ModelInputs",),
    "learning.exits.head": ("ExitRisk",),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
__all__ = [
    "BatchRequest",
    "BatchResult",
    "Budget",
    "CalibrateRequest",
    "CalibrateResult",
    "CompressRequest",
    "CompressResult",
    "CutList",
    "CutRequest",
    "CutResult",
    "ExitRisk",
    "ExitsRequest",
    "ExitsResult",
    "FunctionUrls",
    "FuseMembersRequest",
    "FuseMembersResult",
    "FuseRequest",
    "FuseResult",
    "ImportRequest",
    "LocalModel",
    "ModelInputs",
    "PackageRequest",
    "PackageResult",
    "PartCheck",
    "PlanRequest",
    "PlanResult",
    "ProfileRequest",
    "ProfileResult",
    "Progress",
    "PromoteRequest",
    "PromoteResult",
    "Publication",
    "PublishRequest",
    "PublishResult",
    "PullRequest",
    "PullResult",
    "TrainRequest",
    "TrainResult",
    "TrainingPlace",
    "TriggerRequest",
    "VerifyRequest",
    "VerifyResult",
    "calibrate",
    "check_trigger",
    "classify_photos",
    "compress",
    "cut",
    "exits",
    "fuse",
    "fuse_members",
    "import_model",
    "list_cuts",
    "local_functions",
    "package",
    "plan",
    "profile",
    "promote",
    "publish",
    "pull",
    "read_config",
    "run_trigger",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
