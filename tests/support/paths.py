"""Where the repository and its parts lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED, DOCS, BENCH, TEMPLATE = ROOT / "shared", ROOT / "docs", ROOT / "bench", ROOT / "template" / "python3-isthmus"
