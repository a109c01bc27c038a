"""Bytes of tensors and tensors of bytes: isthmus.wire.frame beside other formats and a plain copy of the same bytes."""

from __future__ import annotations

import json
import statistics
import subprocess
from typing import Any

from harness import BENCH, Report, arguments, at_least, at_most, peer_environment, python_with, version_in

OURS = "isthmus.wire.frame"
# Bytes from which encoding is compared with a copy; below, the header takes the time.
COPIES_FROM = 65_536


def main() -> None:
    report = arguments("frame", __doc__, ["numpy"])
    python = python_with("frame")
    report.say("encoding and decoding by turns")
    child = subprocess.run(
        [python, BENCH / "frame_peers.py", "15" if report.quick else "61"],
        env=peer_environment(),
        check=True,
        stdout=subprocess.PIPE,
    )
    result = json.loads(child.stdout)
    rows: list[dict[str, Any]] = result["rows"]
    for count in sorted({row["tensors"] for row in rows}):
        for size in sorted({row["bytes"] for row in rows}):
            selected = [r for r in rows if (r["tensors"], r["bytes"]) == (count, size)]
            tensors = "one tensor" if count == 1 else f"{count} tensors"
            title = f"{tensors}, {size:,} bytes in all; a plain copy takes {selected[0]['memcpy_us']:.3g} us"
            report.add(title, [{k: v for k, v in r.items() if k not in ("tensors", "bytes")} for r in selected])
    report.versions |= {name: version_in("frame", name) for name in ("msgpack-numpy", "pyarrow", "safetensors")}
    add_goals(report, [row for row in rows if row["format"] == OURS], result["decode_growth"])
    parts = result["in_parts"]
    report.add("one tensor in parts, as hops and functions send frames: nothing is copied before the socket", parts)
    report.goals.append(
        at_most(
            "encoding one tensor in parts, as sent, over a plain copy, median of the same sizes",
            statistics.median(row["over_memcpy"] for row in parts if row["bytes"] >= COPIES_FROM),
            1.2,
        )
    )
    report.emit()


def add_goals(report: Report, ours: list[dict[str, Any]], decode_growth: float) -> None:
    """Goals for the frame's own rows."""
    one = {row["bytes"]: row for row in ours if row["tensors"] == 1}
    shares = sum(not row["decode_copies"] for row in ours)
    report.goals += [
        at_least("cases whose decoded arrays all lie in the frame's bytes", shares, len(ours)),
        at_most(
            f"decoding one tensor of {max(one):,} bytes over one of {min(one):,}",
            decode_growth,
            1.5,
        ),
        at_most(
            f"encoding one tensor in one piece over a plain copy, median of the sizes from {COPIES_FROM:,} bytes",
            statistics.median(row["encode_over_memcpy"] for size, row in one.items() if size >= COPIES_FROM),
            1.2,
        ),
    ]


if __name__ == "__main__":
    main()
