"""encrypt, grant and revoke: what each says, and what other commands say of an encrypted version."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.registry import FolderStore, Registry
from support.bundles import Published, publish_photos
from support.cli import document, isthmus, refusal


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The model for photos; public keys `edge` and `own` in the same folder, private ones in folders of secrets."""
    folder = tmp_path_factory.mktemp("template")
    for name, kind in (("edge", "recipient-rsa"), ("own", "recipient")):
        document(isthmus("key", "new", folder / f"{name}.pem", "--kind", kind, "--json"))
        (folder / f"{name}-secrets").mkdir()
        (folder / f"{name}.pem").rename(folder / f"{name}-secrets" / "recipient-key")
    return publish_photos(folder)


@pytest.fixture
def photos(template: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """A copy of the template in the current folder."""
    shutil.copytree(template.folder.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / template.folder.name
    monkeypatch.setenv("ISTHMUS_REGISTRY", str(folder))
    monkeypatch.setenv("secrets_dir", str(tmp_path / "own-secrets"))
    return replace(template, folder=folder, registry=Registry(FolderStore(folder)))


def test_encrypt_says_who_may_read_what_and_how_much_of_the_weights(photos: Published) -> None:
    result = isthmus("encrypt", "photos:1", "--for", "edge.pub.pem@head", "--for", "own.pub.pem")
    assert result.exit_code == 0, result.output
    assert "encrypted: photos:1; " in result.stdout
    assert "may read everything" in result.stdout
    assert "may read ..6: " in result.stdout
    again = document(isthmus("encrypt", "photos:1", "--for", "edge.pub.pem@head", "--for", "own.pub.pem", "--json"))
    assert (again["versions"], again["removed"], again["variant"]) == (["photos:1"], 0, "")
    own, edge = again["grants"]
    assert (own["label"], own["whole"]) == ("own", True)
    assert (edge["label"], edge["segments"]) == ("edge", ["..6"])
    assert 0 < edge["weights_bytes"] < own["weights_bytes"] == own["of_bytes"]


def test_grant_and_revoke_list_the_grants_and_say_what_is_not_taken_back(photos: Published) -> None:
    document(isthmus("encrypt", "photos", "--for", "own.pub.pem", "--json"))
    given = document(isthmus("grant", "photos", "--for", "edge.pub.pem@..1,documents", "--json"))
    assert [each["segments"] for each in given["grants"][1:]] == [["..1"]]
    result = isthmus("revoke", "photos:1", "--from", "edge.pub.pem")
    assert result.exit_code == 0, result.output
    assert "edge" not in result.stdout
    assert "may have kept" in result.stdout
    assert "isthmus encrypt photos:1 --new-keys" in result.stdout


def test_a_key_of_a_recipient_has_the_id_of_its_grants(photos: Published) -> None:
    new = document(isthmus("key", "new", "third.pem", "--kind", "recipient", "--json"))
    document(isthmus("encrypt", "photos", "--for", "own.pub.pem", "--for", "third.pub.pem@head", "--json"))
    revoked = document(isthmus("revoke", "photos", "--from", new["id"], "--json"))
    assert [each["label"] for each in revoked["grants"]] == ["own"]
    said = refusal(isthmus("key", "list", "keyring.json", "--kind", "recipient", "--json"))["error"]
    assert "--kind is of isthmus key new" in said


@pytest.mark.parametrize(
    "command",
    [
        ("cut", "photos", "--cut", "4"),
        ("calibrate", "photos", "--data", "."),
    ],
    ids=lambda command: command[0],
)
def test_a_version_made_of_an_encrypted_one_is_refused_at_once(photos: Published, command: tuple[str, ...]) -> None:
    document(isthmus("encrypt", "photos", "--for", "own.pub.pem", "--json"))
    refused = refusal(isthmus(*command, "--json"))
    assert "a version in plain would disclose them" in refused["error"]
    assert "publish it where the plain model is" in refused["hint"]


def test_lists_of_versions_need_no_key(photos: Published, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document(isthmus("encrypt", "photos", "--for", "own.pub.pem", "--json"))
    monkeypatch.setenv("secrets_dir", str(tmp_path / "none"))
    assert document(isthmus("models", "--json"))[0]["name"] == "photos"
    shown = document(isthmus("show", "photos", "--json"))
    assert [(each["label"], each["whole"]) for each in shown["grants"]] == [("own", True)]
    assert "own (" in isthmus("show", "photos").stdout
    assert document(isthmus("gc", "--json"))["bytes"] == 0
    refused = refusal(isthmus("grant", "photos", "--for", "edge.pub.pem", "--json"))
    assert refused["type"] == "NotGranted"


@pytest.mark.parametrize(
    ("recipient", "said"),
    [
        ("missing.pem@head", "No such file"),
        ("missing.pem", "No such file"),
        ("own-secrets/recipient-key", "never leaves its recipient"),
        ("edge.pub.pem@nosuch", "no segment 'nosuch'"),
        ("edge.pub.pem@head", "nobody could read all"),
    ],
)
def test_a_recipient_that_cannot_be_one_is_refused_before_anything_is_sealed(
    photos: Published, recipient: str, said: str
) -> None:
    more = [] if "head" in recipient else ["--for", "own.pub.pem"]
    assert said in refusal(isthmus("encrypt", "photos", "--for", recipient, *more, "--json"))["error"]
    assert not (photos.folder / "sealed").exists()


def plain_blobs(registry: Path) -> list[str]:
    return [path.name for path in (registry / "blobs" / "sha256").iterdir()]


def test_a_version_is_encrypted_on_its_way_to_another_registry_and_copied_on_without_a_key(
    photos: Published, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published = document(
        isthmus(
            *("publish", "photos:1", "--to", "outside", "--as", "prod", "--json"),
            *("--encrypt-for", "own.pub.pem", "--encrypt-for", "edge.pub.pem@head"),
        )
    )
    assert (published["version"], published["alias"]["version"]) == ("1", "1")
    assert published["copied_bytes"] > 0
    manifest = [photos.digest.removeprefix("sha256:")]
    assert plain_blobs(tmp_path / "outside") == manifest
    assert len(plain_blobs(photos.folder)) > 1
    monkeypatch.setenv("secrets_dir", str(tmp_path / "none"))
    pulled = document(isthmus("pull", "photos:1", "--to", "copy", "--registry", "outside", "--json"))
    assert pulled["fetched_bytes"] > published["copied_bytes"]
    assert plain_blobs(tmp_path / "copy") == manifest
    again = document(isthmus("publish", "photos", "--to", "third", "--registry", "outside", "--as", "prod", "--json"))
    assert (again["version"], plain_blobs(tmp_path / "third")) == ("1", manifest)
    assert refusal(isthmus("verify", "photos", "--registry", "third", "--json"))["type"] == "NotGranted"
    monkeypatch.setenv("secrets_dir", str(tmp_path / "own-secrets"))
    assert isthmus("verify", "photos", "--registry", "third").exit_code == 0


def test_encrypt_for_needs_another_registry(photos: Published) -> None:
    refused = refusal(isthmus("publish", "photos:1", "--encrypt-for", "own.pub.pem", "--json"))
    assert refused["hint"] == "isthmus encrypt photos:1 --for own.pub.pem"
