"""The secret `hop-keys`: its form, and errors that never quote it."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from isthmus.errors import SettingsError
from isthmus.security.keys import MAX_KEYS, read_hop_keys

KEY = base64.b64encode(bytes(range(32))).decode()


def read(folder: Path, text: str) -> list[str] | None:
    (folder / "hop-keys").write_text(text)
    keys = read_hop_keys(str(folder))
    return None if keys is None else list(keys.by_id)


def test_keys_are_read_in_order_and_the_first_is_for_own_calls(tmp_path: Path) -> None:
    assert read(tmp_path, f"2026-11:{KEY},2026-10:{KEY}\n") == ["2026-11", "2026-10"]
    keys = read_hop_keys(str(tmp_path))
    assert keys is not None
    assert keys.first == "2026-11"
    assert repr(keys) == "HopKeys(2026-11, 2026-10)"


@pytest.mark.parametrize("text", ["", "\n", None])
def test_without_the_secret_there_are_no_keys(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "hop-keys").write_text(text)
    assert read_hop_keys(str(tmp_path)) is None


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f":{KEY}",
        f"a b:{KEY}",
        f"a/b:{KEY}",
        f"{'x' * 33}:{KEY}",
        f"a:{KEY},a:{KEY}",
        f"a:{KEY},",
        "a:",
        "a:=====",
        f"a:{KEY[:-1]}*",
        "a:" + base64.b64encode(bytes(31)).decode(),
        "a:" + base64.b64encode(bytes(65)).decode(),
        ",".join(f"k{n}:{KEY}" for n in range(MAX_KEYS + 1)),
        f"a:{KEY}\nb:{KEY}",
    ],
)
def test_a_secret_of_another_form_stops_the_start_and_is_not_quoted(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text)
    told = str(caught.value) + caught.value.hint
    assert KEY[:8] not in told
    assert "hop-keys" in told
