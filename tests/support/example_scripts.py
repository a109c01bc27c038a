"""The scripts of examples/, run as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

EXAMPLES = ROOT / "examples"


def started(folder: Path, name: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """An example's script, started in `folder` and run to its end."""
    paths = {"PYTHONPATH": str(ROOT / "shared"), "ISTHMUS_REGISTRY": str(folder / "registry")}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = os.environ | paths | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def output(folder: Path, name: str, *arguments: object, **variables: str) -> str:
    """The output of an example's script that succeeds."""
    done = started(folder, name, *arguments, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def without(folder: Path, module: str) -> dict[str, str]:
    """Variables under which Python does not find a module."""
    hidden = folder / "hidden"
    hidden.mkdir(exist_ok=True)
    (hidden / f"{module}.py").write_text(f"raise ModuleNotFoundError('no {module}', name='{module}')\n")
    return {"PYTHONPATH": f"{hidden}{os.pathsep}{ROOT / 'shared'}"}


def without_package(folder: Path, package: str) -> dict[str, str]:
    """Variables under which Python's import machinery knows no package of a name."""
    hidden = folder / "hidden"
    hidden.mkdir(exist_ok=True)
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as util\n\nfind = util.find_spec\n"
        f"util.find_spec = lambda name, package=None: None if name == {package!r} else find(name, package)\n"
    )
    return {"PYTHONPATH": f"{hidden}{os.pathsep}{ROOT / 'shared'}"}


def without_programs(folder: Path) -> dict[str, str]:
    """Variables under which Python finds no program."""
    hidden = folder / "hidden"
    hidden.mkdir(exist_ok=True)
    (hidden / "sitecustomize.py").write_text("import shutil\n\nshutil.which = lambda *_, **__: None\n")
    return {"PYTHONPATH": f"{hidden}{os.pathsep}{ROOT / 'shared'}"}
