"""The password of the engine's system API: one for all engines of a folder, whole from the start, and nobody else's."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isthmus.errors import LocalError
from isthmus_tools.engine.credentials import MAX_PASSWORD_BYTES, PASSWORD_FILE, authorizes, ensure_password


def test_engines_that_start_at_once_agree_on_one_password(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        passwords = set(threads.map(lambda _: ensure_password(tmp_path / "state"), range(32)))
    assert len(passwords) == 1
    assert len(passwords.pop()) > 40
    assert [p.name for p in (tmp_path / "state").iterdir()] == [PASSWORD_FILE]
    assert (tmp_path / "state" / PASSWORD_FILE).stat().st_mode & 0o777 == 0o600


def test_a_password_that_was_put_there_is_taken(tmp_path: Path) -> None:
    (tmp_path / PASSWORD_FILE).touch(0o600)
    (tmp_path / PASSWORD_FILE).write_text(" mine\n")
    assert ensure_password(tmp_path) == "mine"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_password_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    ensure_password(tmp_path)
    (tmp_path / PASSWORD_FILE).chmod(mode)
    with pytest.raises(LocalError, match=f"by others .mode {mode:o}.") as caught:
        ensure_password(tmp_path)
    assert "delete it" in caught.value.hint


def test_a_link_a_folder_and_an_empty_file_are_no_password(tmp_path: Path) -> None:
    path = tmp_path / PASSWORD_FILE
    other = tmp_path / "other"
    other.touch(0o600)
    other.write_text("theirs")
    path.symlink_to(other)
    with pytest.raises(LocalError, match="cannot read"):
        ensure_password(tmp_path)
    path.unlink()
    path.mkdir(0o700)
    with pytest.raises(LocalError):
        ensure_password(tmp_path)
    path.rmdir()
    path.touch(0o600)
    with pytest.raises(LocalError, match="is empty"):
        ensure_password(tmp_path)
    path.write_bytes("ä".encode())
    with pytest.raises(LocalError, match="not plain text"):
        ensure_password(tmp_path)
    path.write_bytes(b"x" * (MAX_PASSWORD_BYTES + 1))
    with pytest.raises(LocalError, match="longer than"):
        ensure_password(tmp_path)


def test_only_the_whole_credentials_authorize() -> None:
    def basic(text: str, scheme: str = "Basic") -> str:
        return f"{scheme} {base64.b64encode(text.encode()).decode()}"

    assert authorizes(basic("admin:secret"), "secret")
    assert authorizes(basic("admin:secret", "basic"), "secret")
    for header in (basic("admin:secre"), basic("admin:secrets"), basic("root:secret"), basic("admin:secret", "Bearer")):
        assert not authorizes(header, "secret")
    assert not authorizes("", "secret")
