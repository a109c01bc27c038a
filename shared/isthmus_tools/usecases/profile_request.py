"""The request for a profile, and its result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.arrays import Array
from isthmus.artifacts.profile import Profile, to_json
from isthmus.settings import RegistrySettings
from isthmus_tools.budget import UNLIMITED, Budget
from isthmus_tools.usecases.function_urls import FunctionUrls


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """A model to measure on its future functions.

    `model` is NAME or NAME:VERSION. `cuts` are partitions as texts; without any, the bundle's own and some of every
    part of the graph are measured, each segment `runs` times. The model runs on `photos` or `tensors`, else on random
    numbers. A stored profile that is up to date is kept, unless `again`. Cuts that the bundle lacks become its next
    version if `new_version`, without moving an alias; else functions load the cuts by digest.
    """

    model: str
    registry: RegistrySettings
    functions: FunctionUrls
    cuts: Sequence[str] = ()
    runs: int = 15
    photos: Sequence[Path] = ()
    tensors: Mapping[str, Array] = field(default_factory=dict)
    again: bool = False
    new_version: bool = True
    budget: Budget = UNLIMITED


@dataclass(frozen=True)
class ProfileResult:
    """The profile of each tier, and the bytes over the link at each measured cut.

    Tiers in `up_to_date` kept their stored profiles.
    """

    model: str
    cuts: Mapping[str, int]
    profiles: Mapping[str, Profile]
    up_to_date: frozenset[str] = field(default_factory=frozenset)

    def document(self) -> dict[str, Any]:
        """The result, JSON-ready."""
        return {
            "model": self.model,
            "cuts": list(self.cuts),
            "up_to_date": sorted(self.up_to_date),
            "profiles": {tier: json.loads(to_json(profile)) for tier, profile in self.profiles.items()},
        }
