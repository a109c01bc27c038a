"""The template in a process of its own, around a handler that a test writes."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import urllib3

from support.local_stack import http
from support.paths import ROOT
from support.patience import eventually
from support.ports import free_port

TEMPLATE = ROOT / "template" / "python3-isthmus"


@contextmanager
def served(handler: str, home: Path, **environment: str) -> Iterator[int]:
    """The port where the template serves `handler`, a module's text, laid out in `home`."""
    shutil.copytree(TEMPLATE, home)
    (home / "function" / "handler.py").write_text(handler)
    port = free_port()
    environment |= {"PATH": os.environ["PATH"], "upstream_url": f"http://127.0.0.1:{port}"}
    with subprocess.Popen([sys.executable, "-B", "index.py"], cwd=home, env=environment) as process:
        try:
            eventually(lambda: _answers(port))
            yield port
        finally:
            process.kill()


def template_module(name: str) -> ModuleType:
    """A module of the template, which is no package of this project."""
    spec = importlib.util.spec_from_file_location(f"template_{name}", TEMPLATE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def log_lines() -> Iterator[io.StringIO]:
    """What the template's handler writes of this process's log, until the end of the block."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(template_module("json_lines").JsonLines())
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel("DEBUG")
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def _answers(port: int) -> bool:
    try:
        return http("GET", f"http://127.0.0.1:{port}/").status < 500
    except urllib3.exceptions.HTTPError:
        return False
