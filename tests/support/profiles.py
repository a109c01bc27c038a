"""A profile with every field in use."""

from __future__ import annotations

from msgspec.structs import replace

from isthmus.artifacts.device import Device
from isthmus.artifacts.profile import CodecSpeed, HopCost, Profile, SegmentCost, Timing

DEVICE = Device("Fast CPU", "x86_64", 4, 2, ("CPUExecutionProvider",), "onnxruntime 1", "0.1", 2**30)
COST = SegmentCost(Timing(0.01, 0.009, 0.011, 15), 1e-5, 2e-5, 100, 200, 300, 400, 500)
DIGEST = "sha256:" + "a" * 64
PROFILE = Profile(
    model="photos",
    content=DIGEST,
    bundle=DIGEST,
    tier="edge",
    device=DEVICE,
    nodes=(0.0, 0.004, 0.006),
    segments={"..": COST, "..3": replace(COST, run=Timing(0.004, 0.003, 0.005, 9, steady=False))},
    measured_at="2026-01-01T00:00:00+00:00",
    inputs="photo",
    shapes={"x": (1, 3, 8, 8)},
    hop=HopCost(1e-3, 1e-9, 1e-9, 5e-4, 1e-10),
    codecs={"half/1": CodecSpeed(1e-9, 2e-9)},
    steady=False,
    warnings=("segment ..3 was unsteady",),
)
