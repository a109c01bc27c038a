"""What a function's Server-Timing header says, collected over many answers."""

from __future__ import annotations

import re
import statistics

Stages = dict[str, list[float]]
"""Milliseconds of each stage, by its name."""

_STAGE = re.compile(r'([a-z0-9-]+)(?:;desc="[^"]*")?;dur=([0-9.]+)')


def note(stages: Stages, header: str) -> None:
    """Add one answer's stages."""
    for stage, ms in _STAGE.findall(header):
        stages.setdefault(stage, []).append(float(ms))


def medians(stages: Stages) -> dict[str, float]:
    """Each stage's median."""
    return {stage: statistics.median(ms) for stage, ms in stages.items()}
