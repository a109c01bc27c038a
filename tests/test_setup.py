"""What `make run` sets up: its size as it says beforehand, no torch, and a failure of pip that stops make."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.paths import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
SIZE = re.search(r"^RUN_SIZE := (\d+) packages, (\d+) MB to download, ([\d.]+) GB", MAKEFILE, re.MULTILINE)
OWN = {"isthmus", "isthmus-tools"}
PIP = """#!/bin/sh
echo "Collecting numpy"
echo "  Downloading numpy-2.4.6-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (6 kB)"
echo "Downloading numpy-2.4.6-cp311-cp311-manylinux_2_28_x86_64.whl (16.9 MB)"
echo "ERROR: no space" >&2
exit {code}
"""


def installed(name: str, *extras: str) -> dict[str, Distribution]:
    """The package and all that it requires here, by name."""
    packages: dict[str, Distribution] = {}
    pending = [(name, ("", *extras))]
    seen = set(pending)
    while pending:
        name, wanted = pending.pop()
        packages[canonicalize_name(name)] = package = distribution(name)
        for line in package.requires or ():
            required = Requirement(line)
            marker = required.marker
            entry = (required.name, ("", *sorted(required.extras)))
            if entry not in seen and (marker is None or any(marker.evaluate({"extra": e}) for e in wanted)):
                seen.add(entry)
                pending.append(entry)
    return {name: package for name, package in packages.items() if name not in OWN}


def test_run_sets_up_as_much_as_it_says_and_no_torch() -> None:
    assert SIZE is not None
    packages = installed("isthmus_tools", "zoo")
    assert "torch" not in packages
    # Other Pythons need a package more or less.
    assert len(packages) == pytest.approx(int(SIZE[1]), abs=3)
    files = [Path(str(file.locate())) for package in packages.values() for file in package.files or ()]
    size = sum(file.stat().st_size for file in files if file.is_file() and file.suffix != ".pyc")
    assert size / 1e9 == pytest.approx(float(SIZE[3]), rel=0.15)


def test_the_readme_states_the_same_size() -> None:
    assert SIZE is not None
    requirements = (ROOT / "README.md").read_text().partition("## Requirements")[2].partition("##")[0]
    assert f"{SIZE[2]} MB" in requirements
    assert f"{SIZE[3]} GB" in requirements


@pytest.mark.parametrize("code", [0, 1])
def test_set_up_tells_pips_errors_and_stops_where_pip_does(code: int, tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    pip = tmp_path / "pip"
    pip.write_text(PIP.format(code=code))
    pip.chmod(0o755)
    for file in ("constraints.txt", "shared/isthmus/pyproject.toml", "shared/isthmus_tools/pyproject.toml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    words = ["make", "-f", str(ROOT / "Makefile"), "setup", f"PIP={pip}"]
    # Without what a make around the tests hands on.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == (code != 0) == (not (tmp_path / ".venv" / ".run").exists())
    assert ("set up in" in done.stderr) == (code == 0)
    assert done.stderr.startswith("setting up: ")
    assert "ERROR: no space" in done.stderr
    # No terminal, no progress.
    assert "numpy" not in done.stdout + done.stderr
