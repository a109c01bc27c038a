"""Plans and profiles without measuring: times that are made up, of models and devices that are real or not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from isthmus.artifacts.bundle import Bundle, subject_digest
from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.device import Device
from isthmus.artifacts.plan import Candidate, Coding, Error, Measured, Plan, ProfileUsed, Sources, Terms
from isthmus.artifacts.profile import HopCost, Profile, SegmentCost, Timing, content_of
from isthmus.artifacts.segment_id import WHOLE
from isthmus_tools.graph import stored_examples
from isthmus_tools.graph.model import Model, open_model
from support.bundles import Published
from support.paths import ROOT

HOP = HopCost(0.001, 1e-9, 1e-9, 0.0005, 1e-9)
MEMORY = 4_000_000
DIGEST = "sha256:" + "0" * 64
SOURCES = Sources("measured", "predicted")
SCHEMA = json.loads((ROOT / "docs" / "schemas" / "plan.schema.json").read_text())


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
    return Candidate(name, kind, **({"predicted": Terms(edge_run=seconds, sources=Sources("measured"))} | facts))


def full_plan() -> Plan:
    """A plan with every field in use."""
    split = Candidate(
        name="split-3-int8",
        kind="split",
        predicted=Terms(
            0.001, 0.01, 0.002, 0.0003, 0.02, 0.02, 0.004, 0.0002, 0.005, 0.002, Sources("measured", "predicted")
        ),
        cuts=("3",),
        codecs={"r3": Coding("int8/1", 0.5)},
        up_bytes=1234,
        down_bytes=99,
        measured=Measured(0.07, 0.065, 0.08, 12, {"edge": 0.01, "cloud": 0.05}),
        error=Error(0.004, 5, 0.2, True),
        edge_memory_bytes=10**7,
        cloud_memory_bytes=10**8,
        price=1e-6,
        energy_j=0.2,
    )
    others = [
        candidate("cloud-photo", "cloud", input="photo", codecs={"x": Coding("photo/1")}),
        candidate("edge-int8", variant=DIGEST, refused="its error is 0.3, of 0.05"),
    ]
    return Plan(
        model="photos",
        subject=DIGEST,
        objective="cost",
        conditions=Conditions(10e6, math.inf, 0.02),
        constraints=Constraints(10**8, 2, 0.1, 0.05, 0.01),
        profiles=(),
        candidates=(split, *others),
        chosen="split-3-int8",
        why=("because",),
        made_at="2026-01-01T00:00:00+00:00",
        isthmus="0",
        currency="EUR",
        inputs="photo",
    )
