"""Segments of a published bundle, executed in this process for calibration."""

from __future__ import annotations

from pathlib import Path

from isthmus_tools.calibration.boundary import SegmentExecutor
from support.bundles import Published, cache_of, segment_settings


def executor_of(published: Published, cache: Path) -> SegmentExecutor:
    settings = segment_settings(published, cache)
    return SegmentExecutor(published.digest, published.bundle, cache_of(published, cache), settings)
