"""The role that each route of each function needs. A route without a row admits no caller, and fails a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from isthmus.security.callers import Role


@dataclass(frozen=True)
class Need:
    """The need of a route: a role, or nothing.

    `is_open`: probes and files without facts, for anyone. `by_itself`: the route's handler authenticates its calls.
    `pins`: query parameters that choose a route, and so need the role for that too.
    """

    role: Role | None = None
    is_open: bool = False
    by_itself: bool = False
    pins: tuple[str, ...] = ()


_OPEN = Need(is_open=True)
_OWN = Need(by_itself=True)
_INFER = Need(Role.INFER)
_METRICS = Need(Role.METRICS)

ROUTER: Mapping[str, Need] = {
    # Probes of the platform and of clients cannot show a key; these tell whether the function is ready, and no more.
    "ready": _OPEN,
    "live": _OPEN,
    "server_ready": _OPEN,
    "page_asset": _OPEN,  # scripts and styles for browsers, the same in every Isthmus
    "answer": _INFER,
    "explain": _INFER,
    "continue": _INFER,
    "infer": _INFER,
    "infer_version": _INFER,
    "explain_model": _INFER,
    "explain_version": _INFER,
    "chat_completions": _INFER,
    "completions": _INFER,
    "embeddings": _INFER,
    "openai_models": _INFER,
    "openai_model": _INFER,
    "model": _INFER,
    "model_version": _INFER,
    "model_ready": _INFER,
    "model_ready_version": _INFER,
    "models": _INFER,
    "repository_index": _INFER,
    "server": _INFER,
    "openapi": _INFER,
    "page": _INFER,
    "page_docs": _INFER,
    "page_choices": _INFER,
    "page_models": _INFER,
    "page_prediction": Need(Role.INFER, pins=("beside",)),
    "page_why": Need(Role.INFER, pins=("route",)),
    "metrics": _METRICS,
    "routes": _METRICS,
}
SEGMENT: Mapping[str, Need] = {
    "ready": _OPEN,
    # Calls of routers, protected by the secret `hop-keys` if present.
    "run": _OWN,
    "load": _OWN,
    "end_session": _OWN,
    # By the secret `profile-token`, or by the role.
    "profile": _OWN,
    "profile_echo": _OWN,
    "metrics": _METRICS,
}
TRIGGER: Mapping[str, Need] = {
    "ready": _OPEN,
    "queue": _INFER,
    "queue_call": _INFER,
    "call": _INFER,
    "result": _INFER,
    "openapi": _INFER,
    "metrics": _METRICS,
}
TRAINING: Mapping[str, Need] = {"ready": _OPEN, "train": _OWN, "metrics": _METRICS}
TABLES: Mapping[str, Mapping[str, Need]] = {
    "router": ROUTER,
    "segment": SEGMENT,
    "trigger": TRIGGER,
    "training": TRAINING,
}
"""The table of each function's app, by its name."""


def without_hop_keys(table: Mapping[str, Need]) -> Mapping[str, Need]:
    """The table of a function that cannot authenticate the calls of others: roles instead.

    The role of predictions for segments. Who trains changes the model, and so administers it.
    """
    roles = {"run": _INFER, "load": _INFER, "end_session": _INFER, "train": Need(Role.ADMINISTER)}
    return {name: roles.get(name, need) for name, need in table.items()}
