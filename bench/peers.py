"""What Isthmus is compared with, each in an environment of its own that no test and no function sees."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

from report import ROOT, STATE

HERE = Path(__file__).resolve().parent


def python_with(name: str) -> Path:
    """The Python of the environment that requirements-NAME.txt pins, made on first use or when the file changes."""
    requirements = HERE / f"requirements-{name}.txt"
    folder = STATE / name
    python, stamp = folder / "bin" / "python", folder / "made-from"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == wanted):
        print(f"installing {requirements.name} into {folder.relative_to(ROOT)}; once", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", requirements],
            check=True,
            stdout=sys.stderr,
        )
        stamp.write_text(wanted)
    return python


def version_in(name: str, package: str) -> str:
    """What requirements-NAME.txt pins `package` to."""
    for line in (HERE / f"requirements-{name}.txt").read_text().splitlines():
        if line.startswith((f"{package}==", f"{package}[")):
            return line.partition("==")[2]
    raise LookupError(f"requirements-{name}.txt does not pin {package}")


def environment(**more: str) -> Mapping[str, str]:
    """This process's environment, with the library where Python finds it."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "shared"), **more}
