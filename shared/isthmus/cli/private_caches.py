"""Imported before dependencies are: their caches lie beside the command's own, none in the user's home, and none calls.

matplotlib writes a list of fonts to ~/.cache, makes ~/.config/matplotlib, and asks fc-list for fonts, which writes
caches of its own; what the command draws takes the font that matplotlib brings. torch makes a folder in the temporary
one. onnxruntime's telemetry is off for models' own code, too, which may import it before `isthmus.runners.runtime`
does. A value that the environment has already stands.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CACHE_DIR = str(Path(tempfile.gettempdir()) / "isthmus-cli")
"""Where commands keep what they fetch, apart from any function's cache."""

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLCONFIGDIR", str(Path(CACHE_DIR) / "matplotlib"))
os.environ.setdefault("FONTCONFIG_FILE", str(Path(__file__).with_name("no_fonts.conf")))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(CACHE_DIR) / "torch"))
