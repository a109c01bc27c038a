"""encrypt, grant and revoke: what each says, and what other commands say of an encrypted version."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.security.recipients import new_pair
from support.bundles import Published, publish_photos
from support.cli import document, isthmus, refusal


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """The model for photos; key pairs `edge` and `own` in the current folder, with secrets in `own-secrets`."""
    monkeypatch.chdir(tmp_path)
    for name in ("edge", "own"):
        private, public = new_pair()
        Path(f"{name}.pem").write_bytes(public)
        Path(f"{name}-secrets").mkdir()
        Path(f"{name}-secrets/recipient-key").write_bytes(private)
    published = publish_photos(tmp_path)
    monkeypatch.setenv("ISTHMUS_REGISTRY", str(published.folder))
    monkeypatch.setenv("secrets_dir", str(tmp_path / "own-secrets"))
    return published


def test_encrypt_says_who_may_read_what_and_how_much_of_the_weights(photos: Published) -> None:
    result = isthmus("encrypt", "photos:1", "--for", "edge.pem@head", "--for", "own.pem")
    assert result.exit_code == 0, result.output
    assert "encrypted: photos:1; " in result.stdout
    assert "may read everything" in result.stdout
    assert "may read ..6: " in result.stdout
    again = document(isthmus("encrypt", "photos:1", "--for", "edge.pem@head", "--for", "own.pem", "--json"))
    assert (again["versions"], again["removed"], again["variant"]) == (["photos:1"], 0, "")
    own, edge = again["grants"]
    assert (own["label"], own["whole"]) == ("own", True)
    assert (edge["label"], edge["segments"]) == ("edge", ["..6"])
    assert 0 < edge["weights_bytes"] < own["weights_bytes"] == own["of_bytes"]


def test_grant_and_revoke_list_the_grants_and_say_what_is_not_taken_back(photos: Published) -> None:
    document(isthmus("encrypt", "photos", "--for", "own.pem", "--json"))
    given = document(isthmus("grant", "photos", "--for", "edge.pem@..1,documents", "--json"))
    assert [each["segments"] for each in given["grants"][1:]] == [["..1"]]
    result = isthmus("revoke", "photos:1", "--from", "edge.pem")
    assert result.exit_code == 0, result.output
    assert "edge" not in result.stdout
    assert "may have kept" in result.stdout
    assert "isthmus encrypt photos:1 --new-keys" in result.stdout


def test_lists_of_versions_need_no_key(photos: Published, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document(isthmus("encrypt", "photos", "--for", "own.pem", "--json"))
    monkeypatch.setenv("secrets_dir", str(tmp_path / "none"))
    assert document(isthmus("models", "--json"))[0]["name"] == "photos"
    assert document(isthmus("show", "photos", "--json"))["version"] == "1"
    assert document(isthmus("gc", "--json"))["bytes"] == 0
    refused = refusal(isthmus("grant", "photos", "--for", "edge.pem", "--json"))
    assert refused["type"] == "NotGranted"


@pytest.mark.parametrize(
    ("recipient", "said"),
    [
        ("missing.pem@head", "No such file"),
        ("own-secrets/recipient-key", "never leaves its recipient"),
        ("edge.pem@nosuch", "no segment 'nosuch'"),
        ("edge.pem@head", "nobody could read all"),
    ],
)
def test_a_recipient_that_cannot_be_one_is_refused_before_anything_is_sealed(
    photos: Published, recipient: str, said: str
) -> None:
    more = [] if "head" in recipient else ["--for", "own.pem"]
    assert said in refusal(isthmus("encrypt", "photos", "--for", recipient, *more, "--json"))["error"]
    assert not (photos.folder / "sealed").exists()
