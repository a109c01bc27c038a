"""Segments run in this process, for calibration: through the store that functions use."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Segment
from isthmus.context import Deadline
from isthmus.registry import SegmentSource
from isthmus.runtime.store import SegmentStore
from isthmus.settings import SegmentSettings
from isthmus_tools.calibration.crossing import Run

_MAX_S = 600.0
"""For one run of one segment, the fetching of its weights included."""


def runs_here(digest: str, source: SegmentSource, settings: SegmentSettings) -> Run:
    """Run segments of the bundle `digest` from `source`, loaded on first use and kept."""
    store = SegmentStore(source, settings)

    def run(segment: Segment, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        return store.run(digest, segment.id, arrays, Deadline.after(_MAX_S)).outputs

    return run
