"""Encrypted versions in a folder and in S3: who reads what, what is left in plain, and what an altered store gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from isthmus.artifacts.bundle import digest_of
from isthmus.errors import Corrupt, Missing, NotGranted, RegistryError, RequestMalformed
from isthmus.registry import BlobStore, FolderStore, Registry, RetryPolicy, SegmentCache
from isthmus.registry.collection import collect, find_garbage
from isthmus.registry.content import blob_key
from isthmus.registry.sealed_content import grants_of, read_grant, sealed_key
from isthmus.registry.versions import remove_model
from isthmus.security.recipients import RecipientKey, new_pair, parse_recipient_key
from isthmus.settings import RegistrySettings
from isthmus_tools.usecases import encryption
from isthmus_tools.usecases.encrypted_copies import copy_sealed, seal_into
from isthmus_tools.usecases.sealed_versions import parse_addressee
from support.fake_bundles import Fake, make_bundle, variant, weights_here
from support.faulty_relay import flipped
from support.patience import LONG_S
from support.s3_server import PATIENCE, store_at, unique_prefix


@dataclass(frozen=True)
class Keys:
    """Key pairs by name, the public ones as files."""

    folder: Path
    private: dict[str, RecipientKey]

    def file(self, name: str) -> str:
        return str(self.folder / f"{name}.pem")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder, private = tmp_path_factory.mktemp("keys"), {}
    for name in ("edge", "cloud", "stranger"):
        pem, public = new_pair()
        (folder / f"{name}.pem").write_bytes(public)
        private[name] = parse_recipient_key(pem, where=name)
    return Keys(folder, private)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """A folder, and S3 where a test asks for both: the contract tests of stores have shown that they are alike."""
    if getattr(request, "param", "folder") == "folder":
        return FolderStore(tmp_path / "registry")
    return store_at(request.getfixturevalue("moto_s3").endpoint, unique_prefix())


in_both_stores = pytest.mark.parametrize("store", ["folder", "s3"], indirect=True)


@dataclass(frozen=True)
class Encrypted:
    """An encrypted version of a fake model, in a store."""

    store: BlobStore
    fake: Fake
    keys: Keys

    def registry(self, name: str = "") -> Registry:
        """The registry as the holder of that private key sees it, each read tried once."""
        return Registry(self.store, RetryPolicy(1, LONG_S), self.keys.private[name] if name else None)

    def cache(self, name: str, folder: Path) -> SegmentCache:
        return SegmentCache(self.registry(name), folder, 2**30)


@pytest.fixture
def use(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Registry]]:
    """Commands open the last registry of the list."""
    registries = [Registry(store, PATIENCE)]
    monkeypatch.setattr(encryption, "open_registry", lambda settings: registries[-1])
    return registries


def encrypt(*recipients: str, model: str = "fake", **given: bool) -> encryption.EncryptResult:
    request = encryption.EncryptRequest(model=model, recipients=recipients, registry=RegistrySettings(), **given)
    return encryption.encrypt(request)


@pytest.fixture
def encrypted(store: BlobStore, fake: Fake, keys: Keys, use: list[Registry]) -> Encrypted:
    use[-1].publish(fake.bundle, fake.files)
    encrypt(f"{keys.file('edge')}@head", keys.file("cloud"))
    return Encrypted(store, fake, keys)


def test_nothing_plain_is_left_but_the_manifest(encrypted: Encrypted) -> None:
    store, fake = encrypted.store, encrypted.fake
    assert store.list("blobs/") == [blob_key(fake.digest)]
    graph = fake.files[fake.bundle.segment("1..").graph.digest].read_bytes()
    for key in store.list(""):
        data = store.get(key, max_bytes=2**20)
        assert not any(part in data for part in (fake.weights[:64], fake.weights[-64:], graph[:40])), key


def test_what_an_interrupted_pull_fetched_of_the_plain_content_is_removed_too(
    store: BlobStore, fake: Fake, keys: Keys, use: list[Registry]
) -> None:
    assert isinstance(store, FolderStore)
    use[-1].publish(fake.bundle, fake.files)
    store.pulls.mkdir()
    (store.pulls / fake.bundle.weights.blob.digest.removeprefix("sha256:")).write_bytes(fake.weights[:64])
    encrypt(keys.file("cloud"))
    assert list(store.pulls.iterdir()) == []


def test_a_recipient_of_everything_reads_everything(encrypted: Encrypted, tmp_path: Path) -> None:
    fake, cache = encrypted.fake, encrypted.cache("cloud", tmp_path / "cache")
    for segment in ("..", "..1", "1.."):
        with cache.locate(fake.digest, segment) as located:
            assert weights_here(fake, located.path.parent / "weights.bin", segment)
    registry = encrypted.registry("cloud")
    registry.bundle(fake.digest)
    weights = fake.bundle.weights.blob
    for start, stop in ((0, weights.size), (1, 2), (2999, 3001), (70_000, 82_000), (5, 5)):
        assert registry.read(weights.digest, start, stop) == fake.weights[start:stop]


@in_both_stores
def test_a_head_only_recipient_reads_the_head_and_neither_the_tails_graph_nor_its_weights(
    encrypted: Encrypted, tmp_path: Path
) -> None:
    fake, cache = encrypted.fake, encrypted.cache("edge", tmp_path / "cache")
    with cache.locate(fake.digest, "..1") as located:
        assert weights_here(fake, located.path.parent / "weights.bin", "..1")
    edge = encrypted.keys.private["edge"].id
    for segment in ("1..", ".."):
        with pytest.raises(NotGranted, match=f"segment {segment} of fake is encrypted, and recipient {edge}") as caught:
            cache.locate(fake.digest, segment)
        assert (caught.value.facts["segment"], caught.value.facts["recipient"]) == (segment, edge)
        assert "isthmus grant" in caught.value.hint
    registry, weights = encrypted.registry("edge"), fake.bundle.weights
    registry.bundle(fake.digest)
    for tensor in weights.tensors[3:]:
        with pytest.raises(NotGranted, match=r"segment 1\.\. of fake"):
            registry.read(weights.blob.digest, tensor.offset, tensor.offset + 1)
    with pytest.raises(NotGranted):
        registry.read(weights.blob.digest, 0, weights.blob.size)
    with pytest.raises(NotGranted):
        registry.blob(weights.blob)


def test_a_stranger_and_a_process_without_a_key_read_nothing(encrypted: Encrypted, tmp_path: Path) -> None:
    for name, said in (("stranger", "has no grant"), ("", "no recipient-key")):
        cache = encrypted.cache(name, tmp_path / f"cache{name}")
        with pytest.raises(NotGranted, match=said):
            cache.locate(encrypted.fake.digest, "..1")
        assert cache.bundle(encrypted.fake.digest) == encrypted.fake.bundle


def test_a_cache_filled_before_a_restart_finds_its_grant_again(encrypted: Encrypted, tmp_path: Path) -> None:
    # The manifest comes from the disk of the cache, so that the new process never asks the registry for it.
    encrypted.cache("cloud", tmp_path / "cache").bundle(encrypted.fake.digest)
    encrypted.cache("cloud", tmp_path / "cache").locate(encrypted.fake.digest, "1..").release()


def test_altered_sealed_bytes_and_grants_are_corrupt(encrypted: Encrypted, tmp_path: Path) -> None:
    store, fake = encrypted.store, encrypted.fake
    cloud = encrypted.keys.private["cloud"].id
    grant = read_grant(store, fake.digest, cloud)
    for digest in (fake.bundle.segment("1..").graph.digest, fake.bundle.weights.blob.digest):
        key = sealed_key(digest, grant.sealed[digest])
        good = store.get(key, max_bytes=2**20)
        for bad in (good[:-30] + flipped(good[-30:]), good[:-30]):
            store.put(key, bad)
            with pytest.raises(Corrupt):
                encrypted.cache("cloud", tmp_path / str(hash(bad))).locate(fake.digest, "1..")
        store.put(key, good)
    key = next(key for key in store.list("grants/") if key.endswith(cloud))
    text = store.get(key, max_bytes=2**20)
    edge = store.get(key.replace(cloud, encrypted.keys.private["edge"].id), max_bytes=2**20)
    for bad in (text.replace(b'"whole":true', b'"whole":false'), b"{}", edge):
        store.put(key, bad)
        with pytest.raises(RegistryError):
            encrypted.cache("cloud", tmp_path / str(hash(bad))).locate(fake.digest, "1..")


def test_one_recipient_must_be_able_to_read_everything(fake: Fake, keys: Keys, use: list[Registry]) -> None:
    use[-1].publish(fake.bundle, fake.files)
    with pytest.raises(RequestMalformed, match="nobody could read all"):
        encrypt(f"{keys.file('edge')}@head", f"{keys.file('cloud')}@tail")
    with pytest.raises(RequestMalformed, match="one key"):
        encrypt(keys.file("edge"), f"{keys.file('edge')}@head")
    with pytest.raises(Missing, match=r"no segment '2\.\.'"):
        encrypt(keys.file("cloud"), f"{keys.file('edge')}@2..")
    assert use[-1].store.list("sealed/") == use[-1].store.list("grants/") == []


def test_versions_that_share_content_are_named_or_encrypted_too(fake: Fake, keys: Keys, use: list[Registry]) -> None:
    other = variant(fake, "cut again")
    for each in (fake, other):
        use[-1].publish(each.bundle, each.files)
    with pytest.raises(RequestMalformed, match="fake:2 shares content with fake:1, which would stay readable"):
        encrypt(keys.file("cloud"), model="fake:1")
    result = encrypt(keys.file("cloud"), model="fake:1", shared=True)
    assert result.versions == ["fake:1", "fake:2"]
    assert set(use[-1].store.list("blobs/")) == {blob_key(fake.digest), blob_key(other.digest)}
    registry = Registry(use[-1].store, PATIENCE, keys.private["cloud"])
    for each in (fake, other):
        assert registry.bundle(each.digest) == each.bundle
    assert registry.read(fake.bundle.weights.blob.digest, 0, 100) == fake.weights[:100]


@in_both_stores
def test_an_interrupted_encryption_is_finished_by_the_same_command(
    fake: Fake, keys: Keys, use: list[Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    use[-1].publish(fake.bundle, fake.files)
    with monkeypatch.context() as patch:
        patch.setattr(encryption, "_remove_plain", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encrypt(f"{keys.file('edge')}@head", keys.file("cloud"))
    store = use[-1].store
    sealed = store.list("sealed/")
    store.delete(blob_key(fake.bundle.weights.blob.digest))
    use.append(Registry(store, PATIENCE))
    assert encrypt(f"{keys.file('edge')}@head", keys.file("cloud")).removed == 3
    assert store.list("blobs/") == [blob_key(fake.digest)]
    assert store.list("sealed/") == sealed


def test_new_keys_exclude_a_revoked_recipient_and_its_old_sealing_is_garbage(
    encrypted: Encrypted, use: list[Registry], tmp_path: Path
) -> None:
    fake, keys = encrypted.fake, encrypted.keys
    earlier = encrypted.registry("edge")
    earlier.bundle(fake.digest)
    graph = fake.bundle.segment("..1").graph
    assert earlier.blob(graph)
    with pytest.raises(NotGranted):
        encrypt(keys.file("cloud"))
    use.append(encrypted.registry("cloud"))
    revoked = encryption.RevokeRequest(model="fake", recipients=["edge"], registry=RegistrySettings())
    assert [each.label for each in encryption.revoke(revoked).grants] == ["cloud"]
    with pytest.raises(NotGranted):
        encrypted.cache("edge", tmp_path / "edge").locate(fake.digest, "..1")
    # A process that read its grant before has the keys still: only new keys end that.
    assert earlier.blob(graph)
    before = set(encrypted.store.list("sealed/"))
    encrypt(keys.file("cloud"), new_keys=True)
    collect(use[-1], older_than_s=-1)
    assert not before & set(encrypted.store.list("sealed/"))
    with pytest.raises(NotGranted):
        earlier.blob(graph)
    # The keys of before are forgotten and the grant is read again, without a restart.
    encrypted.cache("cloud", tmp_path / "cloud").locate(fake.digest, "1..").release()


def test_further_grants_need_everything_and_the_last_one_of_everything_stays(
    encrypted: Encrypted, use: list[Registry], tmp_path: Path
) -> None:
    fake, keys, settings = encrypted.fake, encrypted.keys, RegistrySettings()
    request = encryption.GrantRequest(model="fake:1", recipients=[f"{keys.file('stranger')}@1.."], registry=settings)
    for name in ("", "edge", "stranger"):
        use.append(encrypted.registry(name))
        with pytest.raises(NotGranted):
            encryption.grant(request)
    use.append(encrypted.registry("cloud"))
    given = encryption.grant(request).grants
    assert [(each.label, list(each.segments)) for each in given] == [
        ("cloud", ["..", "..1", "1.."]),
        ("edge", ["..1"]),
        ("stranger", ["1.."]),
    ]
    encrypted.cache("stranger", tmp_path / "cache").locate(fake.digest, "1..").release()
    with pytest.raises(RequestMalformed, match="only recipient that may read everything"):
        encryption.revoke(encryption.RevokeRequest(model="fake", recipients=["cloud"], registry=settings))
    with pytest.raises(RequestMalformed, match="only recipient that may read everything"):
        encryption.grant(replace(request, recipients=[f"{keys.file('cloud')}@1.."]))
    with pytest.raises(Missing, match="no grant for 'nobody'"):
        encryption.revoke(encryption.RevokeRequest(model="fake", recipients=["nobody"], registry=settings))


def test_a_collection_keeps_what_grants_name_and_removes_the_rest(encrypted: Encrypted, use: list[Registry]) -> None:
    store, fake = encrypted.store, encrypted.fake
    assert find_garbage(use[-1], older_than_s=-1).removable == ()
    stray = [sealed_key(digest_of(b"stray"), "0" * 32), blob_key(fake.bundle.weights.blob.digest)]
    for key in stray:
        store.put(key, b"left by a killed encryption")
    assert sorted(entry.key for entry in find_garbage(use[-1], older_than_s=-1).removable) == sorted(stray)
    collect(use[-1], older_than_s=-1)
    encrypted.registry("cloud").bundle(fake.digest)
    remove_model(use[-1], "fake")
    collect(use[-1], older_than_s=-1)
    assert [*store.list("sealed/"), *store.list("grants/"), *store.list("blobs/")] == []


def test_content_that_is_sealed_is_not_published_in_plain_again(encrypted: Encrypted, use: list[Registry]) -> None:
    fake, other = encrypted.fake, variant(encrypted.fake, "cut again")
    assert use[-1].publish(fake.bundle, fake.files).version == "1"
    with pytest.raises(RegistryError, match="encrypted") as caught:
        use[-1].publish(other.bundle, other.files)
    assert "encrypt" in caught.value.hint
    assert encrypted.store.list("blobs/") == [blob_key(fake.digest)]


def test_a_blob_of_several_chunks_and_regions_is_read_by_any_range(
    tmp_path: Path, keys: Keys, use: list[Registry]
) -> None:
    fake = make_bundle(tmp_path / "long", lengths=(200_000, 64, 300_001, 1), cut=2)
    use[-1].publish(fake.bundle, fake.files)
    encrypt(keys.file("cloud"))
    reader = Registry(use[-1].store, PATIENCE, keys.private["cloud"])
    reader.bundle(fake.digest)
    size = len(fake.weights)
    for start in (0, 63, 65_535, 65_536, 199_999, 200_000, 200_064, 262_144, size - 1):
        for stop in (start, start + 1, start + 65_537, size):
            if stop <= size:
                assert reader.read(fake.bundle.weights.blob.digest, start, stop) == fake.weights[start:stop]
    with pytest.raises(Corrupt, match="gave"):
        reader.read(fake.bundle.weights.blob.digest, size - 1, size + 1)


def test_a_version_is_sealed_on_its_way_to_another_registry(
    fake: Fake, keys: Keys, use: list[Registry], tmp_path: Path
) -> None:
    use[-1].publish(fake.bundle, fake.files)
    target = Registry(FolderStore(tmp_path / "outside"), PATIENCE)
    addressees = [parse_addressee(text) for text in (f"{keys.file('edge')}@head", keys.file("cloud"))]
    with pytest.raises(Missing):
        target.publish(fake.bundle, {})
    seal_into(use[-1], target, fake.digest, addressees)
    assert target.publish(fake.bundle, fake.files).version == "1"
    assert target.store.list("blobs/") == [blob_key(fake.digest)]
    encrypted = Encrypted(target.store, fake, keys)
    encrypted.cache("edge", tmp_path / "edge").locate(fake.digest, "..1").release()
    with pytest.raises(NotGranted):
        encrypted.cache("edge", tmp_path / "edge").locate(fake.digest, "1..")
    # What is there in plain would disclose it.
    with pytest.raises(RequestMalformed, match="in plain already"):
        seal_into(use[-1], use[-1], fake.digest, addressees)


def test_an_encrypted_version_is_copied_as_it_is_by_whoever_has_no_key(encrypted: Encrypted, tmp_path: Path) -> None:
    fake, source = encrypted.fake, encrypted.registry()
    target = Registry(FolderStore(tmp_path / "copy"), PATIENCE)
    (tmp_path / "copy").mkdir()
    sizes = {entry.key: entry.size for entry in encrypted.store.entries("sealed/")}
    assert copy_sealed(source, target, fake.digest) == sum(sizes.values())
    assert target.publish(source.bundle(fake.digest), {}).digest == fake.digest
    assert copy_sealed(source, target, fake.digest) == 0
    assert grants_of(target.store, fake.digest) == grants_of(encrypted.store, fake.digest)
    copy = Encrypted(target.store, fake, encrypted.keys)
    copy.cache("cloud", tmp_path / "cloud").locate(fake.digest, "1..").release()
    with pytest.raises(NotGranted):
        copy.cache("edge", tmp_path / "edge").locate(fake.digest, "1..")
