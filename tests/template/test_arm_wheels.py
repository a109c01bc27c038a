"""Functions on ARM: each package of their images has a wheel for linux/aarch64, so that nothing is compiled there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

IMAGE = [
    ROOT / "template/python3-isthmus/requirements.txt",
    ROOT / "template/python3-isthmus/runtime-cpu.txt",
    *sorted(ROOT.glob("functions/*/requirements.txt")),
]
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_28_aarch64")
"""Up to the glibc of Debian bookworm, on which images stand."""


def resolve(*requirements: str, report: Path) -> subprocess.CompletedProcess[str]:
    """Resolve requirements with all that they depend on for Python 3.11 on ARM, without installing them."""
    where = [f"--platform={platform}" for platform in PLATFORMS]
    python = ["--python-version=311", "--implementation=cp", "--abi=cp311", "--abi=abi3", "--abi=none"]
    bounded = ["--retries=1", "--timeout=20", "--disable-pip-version-check"]
    dry = ["--dry-run", "--ignore-installed", f"--target={report.parent}", f"--report={report}", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "install", "-q", *dry, *where, *python, *bounded, *requirements]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def test_every_package_of_every_function_has_a_wheel_for_arm(tmp_path: Path) -> None:
    report = tmp_path / "report.json"

    found = resolve(*(f"-r{path}" for path in IMAGE), report=report)
    if found.returncode and resolve("--no-deps", "flask", report=report).returncode:
        pytest.skip("no package index answers")
    assert found.returncode == 0, found.stderr
    wheels = [each["download_info"]["url"].rsplit("/")[-1] for each in json.loads(report.read_text())["install"]]
    assert len(wheels) > 20
    for wheel in wheels:
        assert wheel.endswith(("-any.whl", "aarch64.whl")), wheel
    assert any(wheel.startswith("onnxruntime-") for wheel in wheels)
