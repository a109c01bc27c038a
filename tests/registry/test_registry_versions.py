"""Publishing and resolving, over a folder and over S3."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from isthmus.artifacts.bundle import WeightTensor, digest_of
from isthmus.errors import Corrupt, Missing, RegistryError, SettingsError
from isthmus.registry import BlobStore, FolderStore, Registry, Version, open_registry
from isthmus.settings import RegistrySettings
from support.fake_bundles import Fake, variant
from support.moto_server import Moto
from support.s3_server import BUCKET, KEY_ID, PATIENCE, SECRET, unique_prefix


@pytest.fixture
def folder_registry(tmp_path: Path) -> Registry:
    return Registry(FolderStore(tmp_path / "registry"), PATIENCE)


def test_a_published_bundle_resolves_to_itself(registry: Registry, fake: Fake) -> None:
    published = registry.publish(fake.bundle, fake.files)
    assert published == Version("fake", "1", fake.digest)
    for reference in ("fake", "fake:1", "fake:prod"):
        found = registry.resolve(reference)
        assert (found.name, found.version, found.digest) == ("fake", "1", fake.digest)
        assert found.bundle == fake.bundle
    assert registry.models() == ["fake"]


def test_publishing_the_same_bundle_again_gives_the_same_version(registry: Registry, fake: Fake) -> None:
    first = registry.publish(fake.bundle, fake.files)
    registry.publish(variant(fake, "other").bundle, fake.files)
    assert registry.publish(fake.bundle, fake.files) == first
    assert [v.version for v in registry.versions("fake")] == ["1", "2"]


def test_prod_stays_with_the_first_version_until_it_is_moved(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files)
    second = registry.publish(variant(fake, "2").bundle, {})
    assert registry.resolve("fake").version == "1"
    assert registry.resolve("fake:2").digest == second.digest
    registry.move_alias("fake", "prod", "2")
    assert registry.resolve("fake").version == "2"
    third = registry.publish(variant(fake, "3").bundle, {}, alias="canary")
    assert registry.resolve("fake:canary").digest == third.digest
    assert registry.aliases("fake") == {"canary": "3", "prod": "2"}


def test_a_model_without_prod_means_its_newest_version(store: BlobStore, fake: Fake) -> None:
    registry = Registry(store, PATIENCE)
    for note in range(11):
        registry.publish(variant(fake, str(note)).bundle, fake.files)
    store.delete("models/fake/aliases/prod")
    assert registry.resolve("fake").version == "11"


def test_what_is_missing_is_told_with_what_there_is(registry: Registry, fake: Fake) -> None:
    registry.publish(fake.bundle, fake.files, alias="canary")
    for reference, kind, exists in (
        ("nope", "model", ["fake"]),
        ("../../etc", "model", ["fake"]),
        ("nope:3", "model", ["fake"]),
        ("fake:7", "version", ["1"]),
        ("fake:stable", "alias", ["canary", "prod"]),
        ("fake:../prod", "alias", ["canary", "prod"]),
    ):
        with pytest.raises(Missing) as caught:
            registry.resolve(reference)
        assert (caught.value.facts["kind"], caught.value.facts["exists"]) == (kind, exists), reference
    with pytest.raises(Missing, match="no version '2'"):
        registry.move_alias("fake", "prod", "2")


@pytest.mark.parametrize("name", ["", "..", "../x", "A", "a/b", "a" * 64, "-a", "a:b"])
def test_a_name_that_is_no_model_name_is_not_published(folder_registry: Registry, fake: Fake, name: str) -> None:
    with pytest.raises(RegistryError, match="cannot name a model"):
        folder_registry.publish(replace(fake.bundle, name=name), fake.files)


@pytest.mark.parametrize("alias", ["", "3", "..", "a/b", "Prod"])
def test_an_alias_that_is_no_alias_is_refused_before_anything_is_stored(
    folder_registry: Registry, fake: Fake, alias: str
) -> None:
    with pytest.raises(RegistryError, match="cannot be an alias"):
        folder_registry.publish(fake.bundle, fake.files, alias=alias)
    assert not folder_registry._store.exists("models/fake/versions/1")


def test_publish_refuses_a_file_that_does_not_hash_to_its_digest(folder_registry: Registry, fake: Fake) -> None:
    digest = fake.bundle.weights.blob.digest
    fake.files[digest].write_bytes(b"something else")
    with pytest.raises(Corrupt) as caught:
        folder_registry.publish(fake.bundle, fake.files)
    assert caught.value.facts["blob"] == digest
    assert folder_registry.models() == []


def test_publish_names_content_that_nobody_has(folder_registry: Registry, fake: Fake) -> None:
    digest = fake.bundle.segments["1.."].graph.digest
    for lose in (fake.files[digest].unlink, lambda: fake.files.pop(digest)):
        lose()
        with pytest.raises(Missing) as caught:
            folder_registry.publish(fake.bundle, fake.files)
        assert caught.value.facts["name"] == digest


def test_publish_mends_a_blob_that_was_cut_short(store: BlobStore, fake: Fake) -> None:
    registry = Registry(store, PATIENCE)
    digest = fake.bundle.weights.blob.digest
    store.put(f"blobs/sha256/{digest[7:]}", fake.weights[:100])
    registry.publish(fake.bundle, fake.files)
    assert registry.blob(fake.bundle.weights.blob) == fake.weights


@pytest.mark.parametrize(
    "tensor",
    [
        WeightTensor("w", -1, 1, digest_of(b"")),
        WeightTensor("w", 0, -1, digest_of(b"")),
        WeightTensor("w", 0, 10**9, digest_of(b"")),
        WeightTensor("w", 0, 1, "sha256:../../x"),
    ],
)
def test_weights_outside_their_file_are_refused(folder_registry: Registry, fake: Fake, tensor: WeightTensor) -> None:
    bad = replace(fake.bundle, weights=replace(fake.bundle.weights, tensors=(tensor,)))
    with pytest.raises(RegistryError, match="the place of weight 'w'"):
        folder_registry.publish(bad, fake.files)


def test_publishers_at_the_same_time_get_versions_of_their_own(tmp_path: Path, fake: Fake) -> None:
    registry, got = Registry(FolderStore(tmp_path / "registry"), PATIENCE), list[Version]()
    bundles = [variant(fake, str(i)).bundle for i in range(6)] + [variant(fake, "0").bundle] * 2
    gate = threading.Barrier(len(bundles))

    def publish(i: int) -> None:
        gate.wait()
        got.append(registry.publish(bundles[i], fake.files))

    threads = [threading.Thread(target=publish, args=(i,)) for i in range(len(bundles))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert {(v.version, v.digest) for v in got} == {(v.version, v.digest) for v in registry.versions("fake")}
    assert len({v.digest for v in got}) == 6


def test_what_was_changed_in_the_store_is_corrupt_and_named(store: BlobStore, fake: Fake) -> None:
    registry = Registry(store, PATIENCE)
    registry.publish(fake.bundle, fake.files)
    graph = fake.bundle.segments[".."].graph
    store.put(f"blobs/sha256/{graph.digest[7:]}", b"x" * graph.size)
    with pytest.raises(Corrupt) as caught:
        registry.blob(graph)
    assert caught.value.facts["blob"] == graph.digest
    store.put(f"blobs/sha256/{fake.digest[7:]}", b"{}")
    with pytest.raises(Corrupt):
        Registry(store, PATIENCE).resolve("fake")


def test_an_alias_whose_time_names_no_zone_is_corrupt(folder_registry: Registry, fake: Fake) -> None:
    folder_registry.publish(fake.bundle, fake.files)
    key = "models/fake/aliases/prod"
    document = folder_registry.store.get(key, max_bytes=4096)
    zone = re.search(rb'"moved_at":"[^"]*(Z|\+00:00)"', document)
    assert zone is not None
    folder_registry.store.put(key, document[: zone.start(1)] + document[zone.end(1) :])
    with pytest.raises(Corrupt, match="moved_at"):
        folder_registry.alias("fake", "prod")


def test_open_registry_reads_the_secrets_folder(moto_s3: Moto, tmp_path: Path, fake: Fake) -> None:
    (tmp_path / "s3-access-key-id").write_text(f"{KEY_ID}\n")
    settings = RegistrySettings(
        registry=f"s3://{BUCKET}/{unique_prefix()}", s3_endpoint=moto_s3.endpoint, secrets_dir=str(tmp_path)
    )
    with pytest.raises(SettingsError, match="only one of"):
        open_registry(settings)
    (tmp_path / "s3-secret-access-key").write_text(f"{SECRET}\n")
    assert open_registry(settings).publish(fake.bundle, fake.files).version == "1"


@pytest.mark.parametrize("place", ["ftp://bucket/x", "s3://", "s3://bucket/../x"])
def test_a_registry_of_no_known_kind_stops_the_start(place: str) -> None:
    with pytest.raises(SettingsError) as caught:
        open_registry(RegistrySettings(registry=place))
    assert caught.value.facts["variable"] == "registry"
