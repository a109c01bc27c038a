"""Callers of functions: identity, and roles for models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

ALL_MODELS = "*"


class Role(StrEnum):
    """An act that a caller may be allowed."""

    INFER = "infer"
    PIN = "pin"
    METRICS = "metrics"
    PROFILE = "profile"
    ADMINISTER = "administer"


@dataclass(frozen=True)
class CallerLimits:
    """A caller's rates; 0 is no limit. Units: requests and body bytes per second; a burst holds `burst_s` of either."""

    requests_per_s: float = 0.0
    bytes_per_s: int = 0
    burst_s: float = 10.0


@dataclass(frozen=True)
class Caller:
    """An authenticated caller, or everyone where a function is open.

    `name` goes to logs, queues and canaries; `label` is its name in metrics, of which there are few. `models` of a
    role holds names, or ALL_MODELS.
    """

    name: str
    label: str
    models: Mapping[Role, frozenset[str]]
    limits: CallerLimits | None = None

    def has(self, role: Role) -> bool:
        """Whether the caller has the role for any model."""
        return bool(self.models.get(role) or self.models.get(Role.ADMINISTER))

    def may(self, role: Role, model: str) -> bool:
        """Whether the caller has the role for the model of this name; an administrator has every role."""
        return any(
            model in names or ALL_MODELS in names
            for names in (self.models.get(role, ()), self.models.get(Role.ADMINISTER, ()))
        )


EVERYONE = Caller("", "anyone", {Role.ADMINISTER: frozenset((ALL_MODELS,))})
"""The caller of a function that is open, or open to its own machine."""


def grants(roles: Iterable[str], models: Iterable[str]) -> dict[Role, frozenset[str]]:
    """Each of the roles for each of the models; of no models, for all. Other names than roles grant nothing."""
    known = {role.value for role in Role}
    names = frozenset(models) or frozenset((ALL_MODELS,))
    return {Role(role): names for role in roles if role in known}
