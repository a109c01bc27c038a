"""Versions that go and aliases that go back, over a folder and over S3: nothing that a version reaches is removed."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace

from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.errors import Corrupt, Missing, RegistryError, RegistryUnavailable
from isthmus.registry import BlobStore, FolderStore, Registry
from isthmus.registry.aliases import Aliases, Target
from isthmus.registry.blobs import PROBES
from isthmus.registry.collection import collect, find_garbage, reachable
from isthmus.registry.content import blob_key
from isthmus.registry.leases import collect_lease, publish_lease
from isthmus.registry.versions import published_at, remove_model, remove_version, roll_back
from support.fake_bundles import Fake, make_bundle, variant
from support.s3_server import PATIENCE

ANY_AGE = -60.0
"""Content is old at once, and so are leases: nobody publishes in these tests."""
HOUR = 3600.0


def blobs(registry: Registry) -> set[str]:
    return set(registry.store.list("blobs/"))


def keys_of(fake: Fake) -> set[str]:
    return {blob_key(digest) for digest in (fake.digest, *fake.bundle.blobs())}


def test_a_version_has_the_time_of_its_publication(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files)
    registry.publish(variant(fake, "2").bundle, {})
    times = published_at(registry, "fake")
    assert list(times) == ["1", "2"]
    assert all(abs(at - datetime.now(UTC)) < timedelta(hours=1) for at in times.values())


def test_an_entry_says_the_length_of_its_content(store: BlobStore) -> None:
    store.put("blobs/a/b", b"12345")
    store.put("blobs/c", b"")
    assert [(entry.key, entry.size) for entry in store.entries("blobs/")] == [("blobs/a/b", 5), ("blobs/c", 0)]


def test_a_move_says_what_the_alias_meant_before(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files)
    registry.publish(variant(fake, "2").bundle, {})
    assert registry.move_alias("fake", "prod", "2").before.number == "1"
    assert registry.resolve("fake").version == "2"
    assert registry.move_alias("fake", "canary", "2").before.version is None
    assert registry.resolve("fake:canary").version == "2"


def test_a_rollback_goes_back_and_the_next_goes_further_back(registry: Registry, fake: Fake) -> None:
    for note in "1234":
        registry.publish(variant(fake, note).bundle, fake.files, alias="prod")
    assert roll_back(registry, "fake").after.number == "3"
    back = roll_back(registry, "fake")
    assert (back.before.number, back.after.number, registry.resolve("fake").version) == ("3", "2", "2")
    registry.move_alias("fake", "prod", "4")
    assert roll_back(registry, "fake").after.number == "2"


def test_a_rollback_passes_over_versions_that_were_removed(registry: Registry, fake: Fake) -> None:
    for note in "123":
        registry.publish(variant(fake, note).bundle, fake.files, alias="prod")
    remove_version(registry, "fake", "2")
    assert roll_back(registry, "fake").after.number == "1"


def test_without_an_earlier_version_a_rollback_moves_nothing(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files, alias="prod")
    registry.publish(variant(fake, "2").bundle, {})
    with pytest.raises(Missing) as caught:
        roll_back(registry, "fake")
    assert caught.value.facts["exists"] == ["1", "2"]
    assert "isthmus promote fake:NUMBER --as prod" in caught.value.hint
    assert registry.resolve("fake").version == "1"


def test_an_alias_keeps_a_bounded_history(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.registry.aliases.MAX_HISTORY", 3)
    store.put("models/fake/aliases/prod", b"1")
    aliases = Aliases(store, PATIENCE)
    for number in range(2, 9):
        aliases.move("fake", "prod", Target(number, f"sha256:{number:064x}"))
    assert [(each.counter, each.version) for each in aliases.history("fake", "prod")] == [(6, 7), (5, 6), (4, 5)]


def test_a_version_that_an_alias_means_is_not_removed(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files, alias="live")
    with pytest.raises(RegistryError, match="fake:1 is what live and prod mean"):
        remove_version(registry, "fake", "1")
    assert registry.resolve("fake:1").digest == fake.digest


@pytest.mark.parametrize("number", ["7", "prod", "../1", "", "9" * 400])
def test_a_version_that_is_not_there_is_not_removed(registry: Registry, fake: Fake, number: str) -> None:
    registry.publish(fake.bundle, fake.files)
    with pytest.raises(Missing, match="no version") as caught:
        remove_version(registry, "fake", number)
    assert caught.value.facts["exists"] == ["1"]


def test_the_number_of_a_removed_version_is_not_given_again(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files)
    second = variant(fake, "2").bundle
    registry.publish(second, {})
    remove_version(registry, "fake", "2")
    with pytest.raises(Missing):
        registry.resolve("fake:2")
    assert registry.publish(second, {}).version == "3"


def test_a_removed_model_is_gone_and_its_next_version_is_prod(registry: Registry, fake: Fake) -> None:
    for note in "12":
        registry.publish(variant(fake, note).bundle, fake.files, alias="canary")
    assert remove_model(registry, "fake") == ["1", "2"]
    assert registry.models() == []
    assert registry.publish(fake.bundle, fake.files).version == "3"
    assert registry.aliases("fake") == {"prod": "3"}


def test_what_a_version_reaches_is_never_collected(registry: Registry, fake: Fake, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", name="other", seed=1)
    registry.publish(fake.bundle, fake.files)
    registry.publish(other.bundle, other.files)
    registry.publish(variant(fake, "2").bundle, {})
    remove_version(registry, "fake", "2")
    before = blobs(registry)
    assert len(collect(registry, ANY_AGE).removable) == 1  # the manifest of the version that was removed
    assert before - blobs(registry) == {blob_key(variant(fake, "2").digest)}
    assert blobs(registry) == keys_of(fake) | keys_of(other)


def test_content_of_a_removed_model_is_collected(registry: Registry, fake: Fake, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", name="other", seed=1)
    registry.publish(fake.bundle, fake.files)
    registry.publish(other.bundle, other.files)
    remove_model(registry, "other")
    garbage = collect(registry, ANY_AGE)
    assert {entry.key for entry in garbage.removable} == keys_of(other) - keys_of(fake)
    assert garbage.removed == len(garbage.removable)
    assert garbage.bytes > len(other.weights)
    assert blobs(registry) == keys_of(fake)


def test_a_dry_run_removes_nothing(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files)
    remove_model(registry, "fake")
    before = blobs(registry)
    assert {entry.key for entry in find_garbage(registry, ANY_AGE).removable} == before == blobs(registry)


def test_young_content_stays_it_may_be_staged_for_a_plan(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files)
    staged = variant(fake, "candidate")
    registry.stage(staged.bundle, {})
    garbage = collect(registry, HOUR)
    assert (garbage.removable, [entry.key for entry in garbage.younger]) == ((), [blob_key(staged.digest)])
    assert registry.bundle(staged.digest) == staged.bundle


def test_the_variant_that_a_plan_names_is_reached(registry: Registry, fake: Fake, tmp_path: Path) -> None:
    int8 = make_bundle(tmp_path / "int8", name="fake-int8", seed=2)
    registry.publish(int8.bundle, int8.files)
    plan = f'{{"subject": "sha256:{"0" * 64}", "candidates": [{{"variant": "{int8.digest}"}}]}}'.encode()
    path = tmp_path / "plan.json"
    path.write_bytes(plan)
    blob = Blob(digest_of(plan), len(plan))
    registry.publish(replace(fake.bundle, plan=blob), {**fake.files, blob.digest: path})
    remove_model(registry, "fake-int8")
    assert collect(registry, ANY_AGE).removable == ()
    assert blobs(registry) == keys_of(int8) | reachable(registry) & blobs(registry)
    assert registry.bundle(int8.digest) == int8.bundle


def test_nothing_is_collected_where_a_version_cannot_be_read(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files)
    registry.publish(variant(fake, "2").bundle, {})
    remove_version(registry, "fake", "2")
    registry.store.put(blob_key(fake.digest), b"rotten")
    before = blobs(registry)
    with pytest.raises(Corrupt, match="do not hash"):
        collect(registry, ANY_AGE)
    assert blobs(registry) == before


def test_nothing_is_collected_while_a_publish_is_under_way(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files)
    remove_model(registry, "fake")
    before = blobs(registry)
    with publish_lease(registry.store, PATIENCE), pytest.raises(RegistryUnavailable, match="under way since"):
        collect(registry, HOUR)
    assert blobs(registry) == before
    assert registry.store.list("leases/") == []


def test_a_publish_waits_for_a_collection_and_then_has_all_its_content(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files)
    remove_model(registry, "fake")
    with collect_lease(registry.store, PATIENCE, HOUR):
        publisher = threading.Thread(target=registry.publish, args=(fake.bundle, fake.files))
        publisher.start()
        while not registry.store.list("leases/publish/"):
            pass
        for key in blobs(registry):  # what the publisher would have found in the registry
            registry.store.delete(key)
        assert registry.models() == []
    publisher.join()
    assert registry.resolve("fake").digest == fake.digest
    assert blobs(registry) == keys_of(fake)


def test_a_publish_does_not_wait_for_ever(registry: Registry) -> None:
    with (
        collect_lease(registry.store, PATIENCE, HOUR),
        pytest.raises(RegistryUnavailable, match="being removed by isthmus gc"),
        publish_lease(registry.store, PATIENCE, wait_s=0),
    ):
        raise AssertionError("the publish began")


def test_a_killed_publish_holds_a_collection_up_to_an_age(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files)
    registry.store.put("leases/publish/0123456789abcdef", b"1")
    with pytest.raises(RegistryUnavailable, match="under way"):
        collect(registry, HOUR)
    collect(registry, ANY_AGE)
    assert registry.store.list("leases/") == []


def test_a_probe_of_conditions_stays_while_its_writer_may_use_it(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files)
    registry.store.put(f"{PROBES}0123456789abcdef", b"1")
    collect(registry, HOUR)
    assert registry.store.list(PROBES) == [f"{PROBES}0123456789abcdef"]


def test_a_probe_that_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    registry = Registry(FolderStore(tmp_path))
    registry.store.put(f"{PROBES}0123456789abcdef", b"1")
    long_ago = datetime.now(UTC).timestamp() - HOUR
    os.utime(tmp_path / PROBES / "0123456789abcdef", (long_ago, long_ago))
    collect(registry, HOUR)
    assert registry.store.list("leases/") == []
