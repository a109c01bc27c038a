"""Lay a function out as `faas-cli build --shrinkwrap` does, less what the template's .dockerignore leaves out."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from isthmus.errors import LocalError
from isthmus_tools.engine.stack import FunctionSpec, Stack

_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
_NOT_HANDLER = frozenset({"build", "template"})


@contextlib.contextmanager
def build_folder(root: Path, port: int) -> Iterator[Path]:
    """A new folder below `root` for what an engine lays out, removed with the block.

    Folders of engines that were killed are removed first. An engine holds a lock on its folder, which the kernel drops
    with its process.
    """
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as taking:
        if (alone := _lock(root, wait=True)) is not None:  # nobody else sweeps before the new folder is locked
            taking.callback(os.close, alone)
            for folder in root.iterdir():
                if (stale := _lock(folder)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(stale)
        own = Path(tempfile.mkdtemp(prefix=f"{port}-", dir=root))
        lock = _lock(own)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, wait: bool = False) -> int | None:
    """A descriptor that holds `folder` locked until it is closed; None where another does, or no lock can be had."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def stage(stack: Stack, spec: FunctionSpec, folder: Path) -> Path:
    """Write the template, the handler over its function/, and each copied path at function/PATH, into `folder`/NAME.

    What was there before is replaced.

    Raises:
        LocalError: the template, the handler or a copied path is missing, or lies outside the repository.
    """
    target = folder / spec.name
    template = _inside(stack.root, f"template/{spec.lang}", f"the template of {spec.name} (lang: {spec.lang})")
    handler = _inside(stack.root, spec.handler, f"the handler of {spec.name}")
    if not (template / "index.py").is_file():
        raise LocalError(
            f"the local engine runs templates with an index.py; template/{spec.lang} of {spec.name} has none"
        )
    try:
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(template, target, ignore=_LEFT_OUT)
        for part in sorted(handler.iterdir()):
            if part.name not in _NOT_HANDLER:
                _lay(part, target / "function" / part.name)
        for path in stack.copy:
            _lay(_inside(stack.root, path, f"configuration.copy: {path}"), target / "function" / path)
    except (OSError, shutil.Error) as e:
        raise LocalError(f"cannot lay out {spec.name} in {target}: {e}") from e
    return target


def _inside(root: Path, path: str, what: str) -> Path:
    found = (root / path).resolve()
    if found == root or not found.is_relative_to(root):
        raise LocalError(f"{what} is {path!r}, which is not inside {root}")
    if not found.exists():
        raise LocalError(f"{what} is {path!r}, which does not exist", path=path)
    return found


def _lay(source: Path, target: Path) -> None:
    if source.is_dir():
        if not _LEFT_OUT(str(source.parent), [source.name]):
            shutil.copytree(source, target, ignore=_LEFT_OUT, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
