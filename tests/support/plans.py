"""Plans and profiles without measuring: times that are made up, of models and devices that are real or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from isthmus.artifacts.bundle import Bundle, subject_digest
from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.device import Device
from isthmus.artifacts.plan import Candidate, Plan, ProfileUsed, Terms
from isthmus.artifacts.profile import HopCost, Profile, SegmentCost, Timing, content_of
from isthmus.artifacts.segment_id import WHOLE
from isthmus_tools.graph import stored_examples
from isthmus_tools.graph.model import Model, open_model
from support.bundles import Published
from support.paths import ROOT

HOP = HopCost(0.001, 1e-9, 1e-9, 0.0005, 1e-9)
MEMORY = 4_000_000
SCHEMA = json.loads((ROOT / "docs" / "plan.schema.json").read_text())


def device(**facts: Any) -> Device:
    known: dict[str, Any] = {
        "cpu": "made up",
        "arch": "x86_64",
        "cpus": 1,
        "threads": 1,
        "providers": ("CPUExecutionProvider",),
        "runtime": "onnxruntime",
        "isthmus": "0",
        "memory_bytes": 2**30,
    }
    return Device(**known | facts)


def whole_model(published: Published) -> Model:
    path = published.folder.parent / f"built-{published.name}" / "inputs-to-outputs.onnx"
    bind, examples = published.bundle.source.get("bind", {}), stored_examples(published.bundle)
    return open_model(path, bind=bind, examples=examples, normalise=False)


def profile_of(published: Published, tier: str, seconds: float, *, weights: Sequence[float] = ()) -> Profile:
    """A profile in which the whole model takes `seconds`, its nodes alike or by their `weights`."""
    model = whole_model(published)
    parts = list(weights) or [float(dynamic) for dynamic in model.dynamic]
    nodes = tuple(seconds * part / sum(parts) for part in parts)
    timing = Timing(seconds, seconds, seconds, 5)
    size = published.bundle.weights.blob.size
    cost = SegmentCost(timing, 1e-5, 1e-5, 100, 100, size, MEMORY // 2, MEMORY)
    return Profile(
        model=published.name,
        content=content_of(published.bundle),
        bundle=published.digest,
        tier=tier,
        device=device(cpu=tier),
        nodes=nodes,
        segments={WHOLE: cost},
        measured_at="2026-01-01T00:00:00+00:00",
        hop=HOP,
    )


def plan_for(bundle: Bundle, candidate: Candidate, **changes: Any) -> Plan:
    """A plan of one candidate, for that bundle."""
    return replace(
        Plan(
            model=bundle.name,
            subject=subject_digest(bundle),
            objective="latency",
            conditions=Conditions(10e6, 10e6, 0.02),
            constraints=Constraints(),
            profiles=(ProfileUsed("edge", "0123456789ab", "made up", "2026-01-01T00:00:00+00:00", True),),
            candidates=(candidate,),
            chosen=candidate.name,
            why=("it was made up",),
            made_at="2026-01-01T00:00:00+00:00",
            isthmus="0",
        ),
        **changes,
    )


def candidate(name: str = "edge-float", kind: str = "edge", seconds: float = 0.05, **facts: Any) -> Candidate:
    """A candidate whose predicted seconds are all the edge's."""
    return Candidate(name, kind, **({"predicted": Terms(edge_run=seconds, edge_source="measured")} | facts))
