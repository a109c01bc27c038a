"""isthmus key and sign: what each says and writes, and what each refuses."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from isthmus.security.ed25519 import read_signing_key
from isthmus.security.keyring import parse_keyring
from support.bundles import Published, copied, publish_two_versions
from support.cli import document, isthmus, refusal


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Two versions, of which none is signed."""
    return publish_two_versions(tmp_path_factory.mktemp("template"))


@pytest.fixture
def photos(template: Published, tmp_path: Path) -> Published:
    return copied(template, tmp_path / "registry")


@dataclass(frozen=True)
class Release:
    """A registry's folder, the files of a signing key and of a keyring that trusts it, and the key's id."""

    folder: Path
    key: Path
    keyring: Path
    id: str


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
    past = ("key", "trust", keyring, new["public"], "--until", "2001-01-01")
    assert "its signatures do not count now: expired" in isthmus(*past).stdout
    assert [each["state"] for each in ask("key", "list", keyring)["keys"]] == ["expired"]
    assert ask("key", "revoke", keyring, new["id"][:8])["id"] == new["id"]
    assert [each["state"] for each in ask("key", "list", keyring)["keys"]] == ["revoked"]
    # A revoked key is never trusted again, whatever the command says.
    assert "is revoked" in refusal(isthmus("key", "trust", keyring, new["public"], "--json"))["error"]
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


@pytest.fixture
def released(photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    """A registry, and a key with its keyring."""
    # Commands remember counters of aliases by the registry's path, which another run of the tests may have had too.
    monkeypatch.setenv("cache_dir", str(tmp_path / "cache"))
    key, keyring = tmp_path / "release.pem", tmp_path / "trusted.json"
    key_id = ask("key", "new", key)["id"]
    ask("key", "trust", keyring, tmp_path / "release.pub.pem", "--name", "release")
    return Release(photos.folder, key, keyring, key_id)


def test_a_signed_alias_moves_with_a_key_alone(released: Release) -> None:
    place = ("--registry", released.folder)
    signed = ask("promote", "photos:1", "--sign-with", released.key, *place)
    assert (signed["version"], signed["counter"], signed["alias_moved"]) == ("1", 2, True)
    assert signed["expires"]
    twice = refusal(isthmus("promote", "photos:1", "2", *place, "--json"))
    assert (twice["type"], twice["hint"]) == ("RequestMalformed", "isthmus promote photos:1 --as prod")
    refused = refusal(isthmus("promote", "photos", "2", *place, "--json"))
    assert (refused["type"], refused["facts"]["reason"]) == ("Untrusted", "not_signed")
    assert "--sign-with" in refused["hint"]
    text = isthmus("promote", "photos", "2", *place, "--sign-with", released.key, "--expires-days", "7").stdout
    assert "signed, valid until" in text
    assert refusal(isthmus("rollback", "photos", *place, "--json"))["type"] == "Untrusted"
    back = ask("rollback", "photos", *place, "--sign-with", released.key)
    assert (back["version"], back["alias_was"]) == ("1", "2")
    # Without the key the undo would be refused.
    assert back["next"].endswith(f"--sign-with {released.key}")
    # Renewed by `sign`: no step for a rollback to go back to.
    ask("sign", "photos", "--key", released.key, *place)
    assert ask("promote", "photos", "2", *place, "--sign-with", released.key)["alias_was"] == "1"
    assert ask("rollback", "photos", *place, "--sign-with", released.key)["version"] == "1"


def test_a_signed_rollback_to_a_version_that_nobody_signed_is_refused(released: Release) -> None:
    place = ("--registry", released.folder)
    ask("promote", "photos", "2", "--sign-with", released.key, *place)
    refused = refusal(isthmus("rollback", "photos", "--sign-with", released.key, *place, "--json"))
    assert (refused["type"], refused["facts"]["reason"]) == ("Untrusted", "not_signed")
    assert "promote photos:1 --as prod" in refused["hint"]
    assert ask("verify", "photos", *place, "--trusted-keys", released.keyring)["version"] == "2"
    ask("sign", "photos:1", "--key", released.key, *place)
    assert ask("rollback", "photos", "--sign-with", released.key, *place)["version"] == "1"


def test_a_canary_of_a_signed_alias_is_signed_and_begun_with_the_key_alone(released: Release) -> None:
    place = ("--registry", released.folder)
    ask("promote", "photos:1", "--sign-with", released.key, *place)
    begin = ("promote", "photos:2", "--canary", "10%", *place)
    assert refusal(isthmus(*begin, "--json"))["type"] == "Untrusted"
    ask(*begin, "--sign-with", released.key)
    demand = ("--trusted-keys", released.keyring)
    assert ask("verify", "photos:2", *place, *demand)["good"] is True
    ask("promote", "photos", "--finish", *place, "--sign-with", released.key)
    assert ask("verify", "photos", *place, *demand)["version"] == "2"


def test_verify_shows_who_signed_and_demands_it_with_a_keyring(released: Release) -> None:
    place, demand = ("--registry", released.folder), ("--trusted-keys", released.keyring)
    assert ask("verify", "photos:1", *place)["signers"] == []
    unsigned = refusal(isthmus("verify", "photos:1", *place, *demand, "--json"))
    assert (unsigned["type"], unsigned["facts"]["reason"]) == ("Untrusted", "not_signed")
    ask("sign", "photos:1", "--key", released.key, *place)
    (signer,) = ask("verify", "photos:1", *place, *demand)["signers"]
    assert (signer["key"], signer["name"], signer["state"], signer["version"]) == (released.id, "release", "trusted", 1)
    assert "signed by release: trusted" in isthmus("verify", "photos:1", *place, *demand).stdout
    assert ask("verify", "photos:1", *place)["signers"][0]["state"] == "unverified"
    # The alias that is named counts too.
    assert refusal(isthmus("verify", "photos:prod", *place, *demand, "--json"))["facts"]["reason"] == "not_signed"


def test_signatures_go_along_with_published_and_pulled_versions(released: Release, tmp_path: Path) -> None:
    place, demand = ("--registry", released.folder), ("--trusted-keys", released.keyring)
    ask("promote", "photos:1", "--sign-with", released.key, *place)
    mirror = tmp_path / "mirror"
    assert refusal(isthmus("pull", "photos:2", "--to", mirror, *place, *demand, "--json"))["type"] == "Untrusted"
    ask("pull", "photos", "--to", mirror, *place, *demand)
    assert ask("verify", "photos", "--registry", mirror, *demand)["good"] is True
    # Another registry, another number: the version is signed anew there.
    target = tmp_path / "target"
    sent = ask("publish", "photos:2", "--to", target, "--as", "prod", "--sign-with", released.key, *place)
    assert sent["version"] == "1"
    assert ask("verify", "photos", "--registry", target, *demand)["good"] is True
    assert ask("verify", "photos:1", "--registry", target, *demand)["good"] is True


@pytest.mark.parametrize("content", [None, "junk"])
def test_a_file_that_is_no_signing_key_signs_nothing(photos: Published, tmp_path: Path, content: str | None) -> None:
    key = tmp_path / "key.pem"
    if content is not None:
        key.write_text(content)
    refused = refusal(isthmus("sign", "photos", "--key", key, "--registry", photos.folder, "--json"))
    assert refused["type"] == "RequestMalformed"
