"""What a command keeps lies where no other user of the machine can have put something before."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from isthmus_tools.cli.environment import private_folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_commands_folder_is_found_again(temporary: Path) -> None:
    folder = private_folder()
    assert folder == temporary / "isthmus-cli"
    folder.mkdir(mode=0o755)
    assert private_folder() == folder


def test_a_folder_that_others_may_write_to_is_not_taken(temporary: Path) -> None:
    usual, named = temporary / "isthmus-cli", temporary / f"isthmus-cli-{os.geteuid()}"
    usual.mkdir()
    usual.chmod(0o777)
    assert private_folder() == named == private_folder()
    named.symlink_to(usual)
    other = private_folder()
    assert other.parent == temporary
    assert other not in (usual, named)
    assert other.stat().st_mode & 0o777 == 0o700
    assert list(usual.iterdir()) == []
