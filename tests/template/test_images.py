"""What images are made of: each package by version and hash, for each Python and machine; bases that do not float."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from isthmus_tools.engine.stack import read_stack, stage
from support.local_stack import ROOT
from support.patience import LONG_S

TEMPLATE = ROOT / "template" / "python3-isthmus"
INPUTS = sorted((ROOT / "template").glob("*/*.in"))
FUNCTIONS = sorted((ROOT / "functions").glob("*/requirements.txt"))
TRIGGER = ROOT / "functions" / "trigger" / "requirements.txt"
LOCKS = [*(path.with_suffix(".txt") for path in INPUTS), *FUNCTIONS]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines(path: Path) -> Iterator[str]:
    """Requirements as pip reads them, each with its hashes on one line."""
    for line in path.read_text().replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line


def locked(path: Path) -> dict[str, Requirement]:
    found = (Requirement(HASH.sub("", line).strip()) for line in lines(path))
    return {canonicalize_name(each.name): each for each in found}


def pin(requirement: Requirement) -> str:
    (only,) = requirement.specifier
    assert only.operator == "==", requirement
    return only.version


def environment(python: str, machine: str) -> dict[str, str]:
    given = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine}
    return {**{k: str(v) for k, v in default_environment().items()}, **given, "sys_platform": "linux", "extra": ""}


RUNNING = {**{k: str(v) for k, v in default_environment().items()}, "extra": ""}


def installed(requirement: Requirement, env: Mapping[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(dict(env))


def test_each_input_has_its_lock() -> None:
    assert len(INPUTS) == 4
    assert len(FUNCTIONS) == 4
    assert all(path.is_file() for path in LOCKS)


@pytest.mark.parametrize("path", LOCKS, ids=name_of)
def test_every_package_of_an_image_has_a_version_and_hashes(path: Path) -> None:
    for line in lines(path):
        assert HASH.search(line), line
    assert all(pin(requirement) for requirement in locked(path).values())


@pytest.mark.parametrize("path", LOCKS, ids=name_of)
def test_packages_of_an_image_are_those_that_passed_the_tests(path: Path) -> None:
    pins = {canonicalize_name(r.name): pin(r) for r in map(Requirement, lines(ROOT / "constraints.txt"))}
    for name, requirement in locked(path).items():
        # CUDA's libraries are only on machines with a GPU; what other systems than Linux need is on none of ours.
        if not name.startswith("nvidia-") and installed(requirement, environment("3.11", "x86_64")):
            assert pin(requirement) == pins[name.removesuffix("-gpu")], name


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_an_image_resolves_nothing_while_it_is_built(python: str, machine: str) -> None:
    """Each package's own requirements are in the same file: pip would refuse others for want of a hash."""
    env = environment(python, machine)
    for path in LOCKS:
        found = {name: r for name, r in locked(path).items() if installed(r, env)}
        for name in found:
            # CUDA's libraries, and what only another patch release of Python needs, are not here to ask.
            if name.startswith("nvidia-") or not installed(found[name], RUNNING):
                continue
            for text in importlib.metadata.requires(name.removesuffix("-gpu")) or ():
                needed = Requirement(text)
                # urllib3 and others have extras that nothing here asks for.
                if installed(needed, env):
                    have = found.get(canonicalize_name(needed.name))
                    assert have is not None, f"{name_of(path)}: {name} needs {needed}"
                    assert needed.specifier.contains(pin(have), prereleases=True), f"{name_of(path)}: {name}: {needed}"


def test_functions_lock_what_the_package_needs_without_a_flavour_of_the_runtime() -> None:
    document = tomllib.loads((ROOT / "shared" / "isthmus" / "pyproject.toml").read_text())
    needed = {canonicalize_name(Requirement(text).name) for text in document["project"]["dependencies"]}
    clients = {
        canonicalize_name(Requirement(text).name) for text in document["project"]["optional-dependencies"]["events"]
    }
    others = [path for path in FUNCTIONS if path != TRIGGER]
    assert len({path.read_bytes() for path in others}) == 1
    found, trigger = set(locked(others[0])), set(locked(TRIGGER))
    assert found >= needed - {"onnxruntime"}
    assert trigger >= found | clients
    assert not clients & found
    assert not {"onnxruntime", "onnxruntime-gpu"} & trigger


def test_the_backport_is_left_out_where_python_has_zstd() -> None:
    backport = locked(FUNCTIONS[0])["backports-zstd"]
    wanted = [installed(backport, environment(python, "x86_64")) for python in PYTHONS]
    assert wanted == [True, True, True, False]


def test_the_dockerfile_installs_by_hash_and_names_its_bases_by_arguments() -> None:
    text = (TEMPLATE / "Dockerfile").read_text().replace("\\\n", " ")
    loose = [c.strip() for c in re.findall(r"pip install [^&;\n]*", text) if "--require-hashes" not in c]
    # For a function of one's own, on request alone.
    assert loose == ["pip install -r function/requirements.txt"]
    assert re.search(r'"\$\{REQUIRE_HASHES\}" = "true" \]; then +python -m pip install --require-hashes', text)
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    assert arguments["REQUIRE_HASHES"] == "true"
    assert re.fullmatch(r"3\.\d+\.\d+", arguments["PYTHON_VERSION"])
    assert re.search(r":\d+\.\d+\.\d+$", arguments["WATCHDOG_IMAGE"])
    bases = re.findall(r"^FROM (?:--platform=\S+ )?(\S+)", text, re.MULTILINE)
    assert bases == ["${WATCHDOG_IMAGE}", "${PYTHON_IMAGE}", "cpu", "${FLAVOUR}"]
    assert "${PYTHON_VERSION}" in arguments["PYTHON_IMAGE"]


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_a_functions_own_packages_come_by_hash_unless_the_build_says_otherwise(wanted: str, tmp_path: Path) -> None:
    """The Dockerfile's step in a shell, with a python that prints its arguments."""
    text = (TEMPLATE / "Dockerfile").read_text()
    step = re.search(r"^RUN (if \[ \"\$\{REQUIRE_HASHES\}.*?fi)$", text, re.MULTILINE | re.DOTALL)
    assert step is not None
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REQUIRE_HASHES": wanted}
    done = subprocess.run(["sh", "-ec", step[1]], env=env, capture_output=True, text=True, check=True, timeout=LONG_S)
    hashes = "--require-hashes --only-binary=:all: " if wanted == "true" else ""
    assert done.stdout == f"-m pip install {hashes}-r function/requirements.txt\n"


def test_each_flavour_has_its_runtime_and_its_stage() -> None:
    text = (TEMPLATE / "Dockerfile").read_text()
    assert "ARG FLAVOUR=cpu\n" in text.partition("FROM ")[0]
    for flavour, package in (("cpu", "onnxruntime"), ("gpu", "onnxruntime-gpu")):
        assert re.search(rf"^FROM .* AS {flavour}$", text, re.MULTILINE)
        assert package in locked(TEMPLATE / f"runtime-{flavour}.txt")
    assert re.search(r"^FROM cpu AS gpu\nENV NVIDIA_VISIBLE_DEVICES=", text, re.MULTILINE)
    asked = read_stack(ROOT / "stack.pro.yml", {})
    assert {f.lang for f in asked.functions.values()} == {TEMPLATE.name}
    assert yaml.safe_load((ROOT / "stack.pro.yml").read_text())["functions"]["cloud-tail"]["build_args"] == {
        "FLAVOUR": "gpu"
    }


@pytest.mark.parametrize("name", ["router", "edge-head", "trigger"])
def test_an_images_own_tests_pass(name: str, tmp_path: Path) -> None:
    """TEST_ENABLED=true, where the function brings no tests of its own."""
    found = read_stack(ROOT / "stack.yml", {})
    done = own_tests(stage(found, found.functions[name], tmp_path / "build"), tmp_path / "app")
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_images_own_tests_fail_where_its_handler_lacks_a_package(tmp_path: Path) -> None:
    build = tmp_path / "build"
    shutil.copytree(TEMPLATE, build)
    assert own_tests(build, tmp_path / "app").returncode == 0
    (build / "function" / "handler.py").write_text("import a_package_that_is_not_there")
    done = own_tests(build, tmp_path / "other")
    assert done.returncode == 1
    assert "a_package_that_is_not_there" in done.stdout


def own_tests(build: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """The Dockerfile's TEST_COMMAND in a folder with what it copies."""
    text = (build / "Dockerfile").read_text()
    copied = re.search(r"^COPY (index\.py .*) \./$", text, re.MULTILINE)
    command = re.search(r'^ARG TEST_COMMAND="([^"]*)"', text, re.MULTILINE)
    assert copied is not None
    assert command is not None
    shutil.copytree(build / "function", home / "function")
    for name in copied[1].split():
        shutil.copy(build / name, home)
    python, *arguments = shlex.split(command[1])
    assert python == "python"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=home,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
