"""isthmus key and sign: what each says and writes, and what each refuses."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from isthmus.security.ed25519 import read_signing_key
from isthmus.security.keyring import parse_keyring
from support.bundles import Published, publish_photos
from support.cli import document, isthmus, refusal


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("photos"))


def ask(*arguments: object) -> Any:
    return document(isthmus(*arguments, "--json"))


def test_a_new_key_is_trusted_for_a_time_and_revoked(tmp_path: Path) -> None:
    private, keyring = tmp_path / "release.pem", tmp_path / "trusted.json"
    new = ask("key", "new", private)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert (new["id"], new["public"]) == (read_signing_key(private).id, str(tmp_path / "release.pub.pem"))
    window = ("--from", "2026-01-01", "--until", "2999-01-01")
    assert ask("key", "trust", keyring, new["public"], "--name", "release", *window)["id"] == new["id"]
    (listed,) = ask("key", "list", keyring)["keys"]
    assert listed == {
        "id": new["id"],
        "name": "release",
        "state": "trusted",
        "not_before": "2026-01-01T00:00:00+00:00",
        "not_after": "2999-01-01T00:00:00+00:00",
    }
    # Once more: the same key, its window over.
    ask("key", "trust", keyring, new["public"], "--until", "2001-01-01")
    assert [each["state"] for each in ask("key", "list", keyring)["keys"]] == ["expired"]
    assert ask("key", "revoke", keyring, new["id"][:8])["id"] == new["id"]
    assert [each["state"] for each in ask("key", "list", keyring)["keys"]] == ["revoked"]
    gone = "0" * 64
    ask("key", "revoke", keyring, gone)
    assert parse_keyring(keyring.read_bytes(), "it").revoked == {new["id"], gone}


def test_a_pem_file_is_a_keyring_and_becomes_json_when_changed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        ask("key", "new", tmp_path / f"{name}.pem")
    keyring = tmp_path / "keyring"
    keyring.write_text((tmp_path / "a.pub.pem").read_text())
    ask("key", "trust", keyring, tmp_path / "b.pub.pem")
    assert json.loads(keyring.read_text())["format"] == "isthmus.keyring/1"
    assert len(ask("key", "list", keyring)["keys"]) == 2


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    private = tmp_path / "a.pem"
    ask("key", "new", private)
    keyring = tmp_path / "keyring"
    ask("key", "trust", keyring, tmp_path / "a.pub.pem")
    for arguments, why in (
        (("new", private), "is there already"),
        (("new", tmp_path / "nowhere" / "b.pem"), "No such file"),
        (("trust", keyring, private), "no single Ed25519 public key"),
        (("trust", keyring), "takes the file of a public key"),
        (("trust", keyring, tmp_path / "a.pub.pem", "--from", "2026-02-01", "--until", "2026-01-01"), "never"),
        (("list", private), "is no keyring"),
        (("list", tmp_path / "absent"), "cannot be read"),
        (("revoke", keyring, "abc"), "the id of 0 keys"),
        (("revoke", keyring, ""), "takes the id of a key"),
        (("list", keyring, "more"), "takes nothing more"),
    ):
        assert why in refusal(isthmus("key", *arguments, "--json"))["error"], arguments


def test_sign_signs_a_version_and_renews_the_alias_that_names_it(photos: Published, tmp_path: Path) -> None:
    key = tmp_path / "release.pem"
    key_id = ask("key", "new", key)["id"]
    options = ("--key", key, "--registry", photos.folder)
    version = ask("sign", "photos:1", *options)
    assert (version["digest"], version["key"], version["alias"]) == (photos.digest, key_id, "")
    assert (photos.folder / "signatures" / photos.digest.removeprefix("sha256:") / key_id).is_file()
    first = ask("sign", "photos", *options)
    again = ask("sign", "photos:prod", *options, "--expires-days", "0")
    assert (first["alias"], again["counter"], again["expires"]) == ("prod", first["counter"] + 1, None)
    assert photos.registry.alias("photos", "prod").version == 1
    assert "signed photos:prod, valid until" in isthmus("sign", "photos", *options).stdout


def test_a_signed_alias_moves_with_a_key_alone(photos: Published, tmp_path: Path) -> None:
    key = tmp_path / "release.pem"
    ask("key", "new", key)
    ask("sign", "photos", "--key", key, "--registry", photos.folder)
    assert ask("promote", "photos:1", "--registry", photos.folder)["alias_moved"] is False
    photos.registry.publish(photos.bundle, {})
    other = publish_photos(tmp_path / "other", seed=7, registry=photos.folder)
    refused = refusal(isthmus("promote", f"photos:{other.version}", "--registry", photos.folder, "--json"))
    assert (refused["type"], refused["facts"]["reason"]) == ("Untrusted", "not_signed")
    assert "--sign-with" in refused["hint"]


@pytest.mark.parametrize("content", [None, "junk"])
def test_a_file_that_is_no_signing_key_signs_nothing(photos: Published, tmp_path: Path, content: str | None) -> None:
    key = tmp_path / "key.pem"
    if content is not None:
        key.write_text(content)
    refused = refusal(isthmus("sign", "photos", "--key", key, "--registry", photos.folder, "--json"))
    assert refused["type"] == "RequestMalformed"
