"""A process that decodes pictures and prints, for each, what it held of its budget and what its memory rose by."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import IsthmusError
from isthmus.processing.image import preprocess
from isthmus.processing.image_budget import ImageMemory
from support.image_files import FILES, HOSTILE, SPEC

WHOLE: dict[str, Any] = {**SPEC, "steps": [SPEC["steps"][2]]}
SQUARE: dict[str, Any] = {
    **SPEC,
    "steps": [{"op": "resize", "size": [64, 64], "interpolation": "bicubic"}, SPEC["steps"][2]],
}
WHOLE_TOO = ("PNG colour 2 depth 8", "PNG turned", "JPEG grey")
_LIBC = ctypes.CDLL(None)


class Seen(ImageMemory):
    """A budget that remembers what was asked of it."""

    asked = 0

    def taken(self, count: int) -> Any:
        self.asked = count
        return super().taken(count)


def status(field: str) -> int:
    """Bytes of this process by a line of its status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak(data: bytes, spec: dict[str, Any], limit: int) -> dict[str, Any]:
    """What one picture held and took."""
    memory, shape = Seen(limit), ("b", 3, "h", "w")
    _LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, error = status("VmRSS"), ""
    try:
        preprocess(data, spec, input=TensorSpec("x", "float32", shape), max_pixels=2**40, memory=memory)
    except IsthmusError as e:
        error = f"{type(e).__name__}: {e.message} {e.facts}"
    return {"held": memory.asked, "rose": status("VmHWM") - before, "error": error}


for name in sys.argv[1:]:
    data = {**FILES, **HOSTILE}[name]()
    if name in HOSTILE:
        # What it took stays with the allocator, so its first time is the one that counts.
        sys.stdout.write(json.dumps({"name": name, **peak(data, SQUARE, 2**40)}) + "\n")
        continue
    peak(data, SPEC, 2**40)  # what is loaded on a format's first use
    found = {"exact": peak(data, SPEC, 2**40)}
    # A picture that takes more than half of this limit is reduced.
    found["reduced"] = peak(data, SPEC, 50_000_000)
    if name in WHOLE_TOO:
        found["whole"] = peak(data, WHOLE, 2**40)
    sys.stdout.write(json.dumps({"name": name, **found}) + "\n")
