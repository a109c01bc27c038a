"""models, show, promote, rollback, rm and gc: what each says, and that none moves an alias silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from isthmus.artifacts.fusion import Fusion, FusionGain
from isthmus.security.caller_keys import new_key
from support.bundles import Published, publish_photos
from support.cli import document, isthmus, refusal
from support.exits import with_exit


@pytest.fixture
def photos(tmp_path: Path) -> Published:
    """Two versions, of which prod means the first."""
    published = publish_photos(tmp_path)
    published.registry.publish(replace(published.bundle, source={"note": "2"}), {})
    return published


def ask(photos: Published, *arguments: object) -> Any:
    return document(isthmus(*arguments, "--registry", photos.folder, "--json"))


def say(photos: Published, *arguments: object) -> str:
    result = isthmus(*arguments, "--registry", photos.folder)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_models_has_one_row_a_model_and_says_what_serves(photos: Published) -> None:
    (row,) = ask(photos, "models")
    assert (row["name"], row["serving"], row["newest"], row["versions"]) == ("photos", "1", "2", 2)
    assert (row["calibrated"], row["plan"], row["aliases"]) == ([], "", {"prod": "1"})
    text = say(photos, "models")
    assert text.count("│ photos") == 1
    assert "newer than what serves: photos:2" in text


def test_show_takes_a_version_and_versions_lists_all(photos: Published) -> None:
    shown = ask(photos, "show", "photos:2")
    assert (shown["version"], shown["serves"], shown["aliases"]) == ("2", False, [])
    listed = ask(photos, "versions", "photos")
    assert [(v["version"], v["serves"]) for v in listed["versions"]] == [("1", True), ("2", False)]
    assert [(a["version"], a["counter"]) for a in listed["aliases"]["prod"]] == [("1", 1)]
    assert shown["next"] == f"isthmus calibrate photos:2 --data FOLDER --registry {photos.folder}"
    text = say(photos, "show", "photos")
    assert "takes x float32[1, 3, 8, 8]" in text
    assert "→ 1" in say(photos, "versions", "photos")


def test_promote_and_rollback_say_from_what_to_what(photos: Published) -> None:
    text = say(photos, "promote", "photos", "2", "--as", "prod")
    assert "prod means photos:2 now; it meant photos:1" in text
    assert "to go back: isthmus rollback photos" in text
    assert "routers that run follow within their setting refresh_s: 10 s" in text
    assert "as before" in say(photos, "promote", "photos", "2", "--as", "prod")
    back = ask(photos, "rollback", "photos")
    assert (back["version"], back["alias_was"]) == ("1", "2")
    assert back["next"] == f"isthmus promote photos:2 --as prod --registry {photos.folder}"
    assert photos.registry.resolve("photos").version == "1"


def test_a_rollback_without_an_earlier_version_is_an_error_with_a_hint(photos: Published) -> None:
    result = isthmus("rollback", "photos", "--registry", photos.folder)
    assert result.exit_code == 1
    assert "isthmus promote photos:NUMBER --as prod" in result.stderr


def test_rm_refuses_what_serves_and_removes_what_does_not(photos: Published) -> None:
    refused = isthmus("rm", "photos:1", "--registry", photos.folder)
    assert refused.exit_code == 1
    assert "photos:1 is what prod means" in refused.stderr
    assert "photos:1 as before" in say(photos, "rm", "photos:2")
    assert [v.version for v in photos.registry.versions("photos")] == ["1"]


@pytest.mark.parametrize("arguments", [["photos"], ["photos:1", "--all-versions"]])
def test_rm_takes_a_version_or_all_of_a_model_and_never_guesses(photos: Published, arguments: list[str]) -> None:
    assert isthmus("rm", *arguments, "--registry", photos.folder).exit_code == 1
    assert len(photos.registry.versions("photos")) == 2


def test_gc_lists_first_and_removes_with_delete_alone(photos: Published) -> None:
    ask(photos, "rm", "photos", "--all-versions")
    before = photos.registry.store.list("blobs/")
    listed = ask(photos, "gc", "--older-than", "0s")
    assert sorted(item["key"] for item in listed["removable"]) == before
    assert (listed["removed"], listed["next"]) == (0, f"isthmus gc --delete --older-than 0s --registry {photos.folder}")
    assert photos.registry.store.list("blobs/") == before
    assert ask(photos, "gc")["removable"] == []  # younger than a day
    assert "removed" in say(photos, "gc", "--older-than", "0s", "--delete")
    assert photos.registry.store.list("blobs/") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["promote", "photos", "../1"], "no alias '../1'"),
        (["promote", "photos", "01"], "no version '01'"),
        (["promote", "Photos:1"], "there is no model 'Photos'"),
        (["promote", "photos:2", "--as", "Prod"], "'Prod' cannot be an alias"),
        (["promote", "photos:2", "--as", "7"], "'7' cannot be an alias"),
        (["publish", "photos:2", "--to", "{tmp}", "--as", "a/b"], "'a/b' cannot be an alias"),
        (["publish", "photos:9", "--to", "{tmp}"], "no version '9'"),
        (["pull", "photos"], "one target"),
        (["pull", "photos", "--to", "s3://bucket/x"], "is no folder"),
        (["verify", "photos:%2e%2e"], "no alias '%2e%2e'"),
        (["diff", "photos:1", "9"], "no version '9'"),
        (["versions", "photos/.."], "there is no model"),
    ],
)
def test_a_bad_name_is_a_sentence_and_changes_nothing(
    photos: Published, arguments: list[str], message: str, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    given = [argument.replace("{tmp}", str(target)) for argument in arguments]
    result = isthmus(*given, "--registry", photos.folder)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert photos.registry.alias("photos", "prod").counter == 1
    assert not target.exists()


def test_publish_verify_diff_and_pull_say_what_they_did(photos: Published, tmp_path: Path) -> None:
    text = say(photos, "publish", "photos:2", "--to", tmp_path / "there", "--as", "live")
    assert f"photos:1 in {tmp_path / 'there'}: 10 segments ran" in text
    assert "live means photos:1 now" in text
    assert ask(photos, "verify", "photos:2")["good"] is True
    assert "are the same bundle" in say(photos, "diff", "photos:prod", "1")
    assert f"segments ..1 in {tmp_path / 'cache'}" in say(
        photos, "pull", "photos", "--segment", "..1", "--cache", tmp_path / "cache"
    )
    path = photos.folder / "blobs/sha256" / photos.bundle.weights.blob.digest[7:]
    path.write_bytes(b"\0" * path.stat().st_size)
    result = isthmus("verify", "photos:2", "--registry", photos.folder)
    assert (result.exit_code, "damaged: sha256:" in result.stdout) == (1, True)
    assert "to repair: delete these blobs" in result.stdout


def test_a_diff_names_the_cuts_of_an_exit_with_another_threshold_and_of_a_fusion(tmp_path: Path) -> None:
    plain = publish_photos(tmp_path)
    with_exit(plain, tmp_path, threshold=0.5)
    later = with_exit(plain, tmp_path, threshold=0.6)
    gain = FusionGain(inputs=100, alone=0.9, fused=0.92, better=3, worse=1, low=-0.01, high=0.05)
    fusion = Fusion("6", "logits", "log_odds", "logits", (0.5,), (1.0,), 1.0, "labels", "raw/1", 0.0, gain)
    plain.registry.publish(replace(later.bundle, fusion=fusion), {})
    text = say(plain, "diff", "photos:2", "4")
    assert "changed exits: 6" in text
    assert "new fusions: 6" in text
    assert "segments" not in text
    assert ask(plain, "diff", "photos:4", "3")["fusions"] == {"added": [], "removed": ["6"], "changed": []}
    assert ask(plain, "diff", "photos:1", "2")["exits"]["added"] == ["6"]


def test_publish_names_what_the_first_version_of_a_model_serves(photos: Published, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    first = say(photos, "publish", "photos:2", "--to", place)
    assert "prod means photos:1" in first
    assert f"next: isthmus versions photos --registry {place}" in first
    second = say(photos, "publish", "photos:1", "--to", place)
    assert "prod means" not in second
    assert f"next: isthmus promote photos 2 --as prod --registry {place}" in second


def test_a_key_in_the_place_of_its_file_is_refused_and_not_repeated() -> None:
    key = new_key()
    refused = isthmus("top", "--api-key", key, "--json")
    assert "ISTHMUS_API_KEY" in refusal(refused)["hint"]
    assert key not in refused.output
