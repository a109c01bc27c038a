"""Imported before dependencies are: their caches lie beside the command's own, none in the user's home, and none calls.

matplotlib writes a list of fonts to ~/.cache, makes ~/.config/matplotlib, and asks fc-list for fonts, which writes
caches of its own; what the command draws takes the font that matplotlib brings. torch makes a folder in the temporary
one. onnxruntime's telemetry is off for models' own code, too, which may import it before `isthmus.runtime.ort`
does. A value that the environment has already stands.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def private_folder() -> Path:
    """`isthmus-cli` in the temporary folder, or one named for this user where another user has that name.

    Anybody can make a folder of a known name there first, and torch runs code from its cache. A folder that is not
    there yet is made by whoever writes to it.
    """
    temporary = Path(tempfile.gettempdir())
    for folder in (temporary / "isthmus-cli", temporary / f"isthmus-cli-{os.geteuid()}"):
        if not os.path.lexists(folder) or _is_own(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="isthmus-cli-"))


def _is_own(folder: Path) -> bool:
    about = folder.lstat()
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o022


CACHE_DIR = str(private_folder())
"""Where commands keep what they fetch, apart from any function's cache."""

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLCONFIGDIR", str(Path(CACHE_DIR) / "matplotlib"))
os.environ.setdefault("FONTCONFIG_FILE", str(Path(__file__).with_name("no_fonts.conf")))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(CACHE_DIR) / "torch"))
