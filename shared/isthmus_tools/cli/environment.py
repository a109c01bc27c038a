"""Environment variables of the command's process, set before numpy, torch and matplotlib read them at import.

Variables that are set already keep their values.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def private_folder() -> Path:
    """`isthmus-cli` in the temporary folder, or a folder named for this user where another user owns that name.

    Anybody can make a folder of a known name there first, and torch runs code from its cache. A folder that does not
    exist yet is made by its first writer.
    """
    temporary = Path(tempfile.gettempdir())
    for folder in (temporary / "isthmus-cli", temporary / f"isthmus-cli-{os.geteuid()}"):
        if not os.path.lexists(folder) or _is_own(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="isthmus-cli-"))


def _is_own(folder: Path) -> bool:
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


# The commands' cache of segments and weights, apart from any function's cache.
CACHE_DIR = str(private_folder())

# The matrix products of codecs are small: on a busy machine two threads that wait for each other take three to ten
# times as long as a single thread. Models run on the runtime's own threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A model's own code may import onnxruntime before `isthmus.runtime.ort` turns its telemetry off.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# matplotlib writes to ~/.cache and ~/.config, and asks fc-list for fonts, and fc-list writes caches of its own;
# pictures take the font that matplotlib brings.
os.environ.setdefault("MPLCONFIGDIR", str(Path(CACHE_DIR) / "matplotlib"))
os.environ.setdefault("FONTCONFIG_FILE", str(Path(__file__).with_name("no_fonts.conf")))
# torch makes a folder of a known name in the temporary folder.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(CACHE_DIR) / "torch"))
