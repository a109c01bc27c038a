"""Candidate sets of small models, evaluated in this process with invented profiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from isthmus.artifacts.conditions import Conditions
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.enumeration import enumerate_candidates
from isthmus_tools.planner.inputs import TrialInput, from_arrays
from support.bundles import Published, cache_of
from support.plans import profile_of

SLOW, FAST = 0.2, 0.01
LINK = Conditions(1e6, 1e6, 0.005)


@contextmanager
def evaluated(
    published: Published,
    *,
    edge_s: float = SLOW,
    cloud_s: float = FAST,
    examples: list[TrialInput] | None = None,
    kind: str = "tensors",
    link: Conditions = LINK,
    **options: Any,
) -> Iterator[CandidateSet]:
    profiles = {"edge": profile_of(published, "edge", edge_s), "cloud": profile_of(published, "cloud", cloud_s)}
    profiles |= options.pop("profiles", {})
    made = examples or from_arrays(published.bundle, [published.inputs])
    cache = cache_of(published, published.folder.parent / "cache")
    options = {"int8": False, "links": [link]} | options
    with enumerate_candidates(
        published.registry, cache, published.name, profiles, made, kind, **options
    ) as candidate_set:
        yield candidate_set
