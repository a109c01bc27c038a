"""Functions with trusted keys: nothing unsigned is loaded or run, and aliases move forward alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from flask import Flask

from isthmus.artifacts.bundle import Blob, to_json
from isthmus.errors import RegistryError, SettingsError, Untrusted
from isthmus.registry import BakedSegment, Registry, SegmentCache, demanded_trust, open_registry
from isthmus.registry.aliases import AliasSigner
from isthmus.registry.collection import collect
from isthmus.registry.registry import Resolved
from isthmus.registry.source import SIGNATURES
from isthmus.registry.versions import remove_version
from isthmus.security.ed25519 import SigningKey
from isthmus.security.keyring import KeyringDocument, TrustedKey
from isthmus.security.keyring import to_json as keyring_json
from isthmus.serving import create_router_app, create_segment_app
from isthmus.settings import RegistrySettings
from isthmus.wire import frame as frames
from isthmus_tools.usecases.signing import demanded_keyring, sign_version, signers
from support.bundles import (
    Published,
    copied,
    framed,
    photo,
    publish_two_versions,
    ready,
    router_settings,
    segment_settings,
)
from support.paths import SHARED
from support.patience import until
from support.signing import new_key, signed_statement, trusted

DAY_S = 86_400.0


@dataclass
class Signed:
    """A registry with two versions of a model of photos, prod on the first, and a keyring that trusts one key."""

    photos: Published
    folder: Path
    key: SigningKey
    stranger: SigningKey

    @property
    def registry(self) -> Registry:
        return self.photos.registry

    @property
    def keyring(self) -> Path:
        return self.folder / "trusted-keys"

    @property
    def settings(self) -> dict[str, Any]:
        return {"trusted_keys": str(self.keyring), "refresh_s": 0.05}

    def trust(self, *keys: TrustedKey, revoked: tuple[str, ...] = ()) -> None:
        self.keyring.write_bytes(keyring_json(KeyringDocument(keys, revoked)))

    def version(self, number: str) -> Resolved:
        return self.registry.resolve(f"photos:{number}")

    def sign(self, number: str, key: SigningKey | None = None) -> None:
        sign_version(self.registry, self.version(number), key or self.key)

    def promote(self, number: str, key: SigningKey | None = None, expires_s: float = DAY_S) -> None:
        self.registry.move_alias("photos", "prod", number, signer=AliasSigner(key or self.key, expires_s))

    def stored_alias(self) -> Path:
        return self.photos.folder / "models" / "photos" / "aliases" / "prod"

    def trusting_registry(self) -> Registry:
        return open_registry(
            RegistrySettings(
                registry=str(self.photos.folder), trusted_keys=str(self.keyring), cache_dir=str(self.folder / "cache")
            )
        )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_two_versions(tmp_path_factory.mktemp("template"))


@pytest.fixture
def signed(template: Published, tmp_path: Path) -> Signed:
    photos = copied(template, tmp_path / "registry")
    setup = Signed(photos, tmp_path, new_key(tmp_path, "release"), new_key(tmp_path, "stranger"))
    setup.trust(trusted(setup.key))
    return setup


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def segment_app(signed: Signed, stack: ExitStack, **given: Any) -> Flask:
    settings = segment_settings(signed.photos, signed.folder / "cache", trusted_keys=str(signed.keyring), **given)
    app = create_segment_app(settings)
    stack.callback(app.extensions["isthmus"].close)
    return app


def router_app(signed: Signed, stack: ExitStack, cache: str = "router") -> Flask:
    app = create_router_app(router_settings(signed.photos, signed.folder / cache, ("local",), **signed.settings))
    stack.callback(app.extensions["isthmus"].close)
    return app


def ask(app: Flask) -> tuple[int, dict[str, Any]]:
    """Status and document of a request; the document has the served version."""
    response = app.test_client().post("/", data=photo(), content_type="image/png")
    return response.status_code, response.get_json() | {"served": response.headers.get("Isthmus-Version")}


def reason_of(check: Callable[[], object]) -> str:
    with pytest.raises(Untrusted) as e:
        check()
    return str(e.value.facts["reason"])


def test_a_function_refuses_an_unsigned_bundle_at_the_frame_and_runs_nothing(signed: Signed, stack: ExitStack) -> None:
    client = segment_app(signed, stack).test_client()
    response = client.post("/", data=framed(signed.photos), content_type=frames.CONTENT_TYPE)
    document = response.get_json()
    assert (response.status_code, document["type"]) == (403, "Untrusted")
    assert document["facts"] == {"reason": "not_signed", "bundle": signed.photos.digest}
    assert "isthmus sign" in document["hint"]
    load = client.post("/load", json={"bundle": signed.photos.digest, "segment": ".."})
    assert (load.status_code, load.get_json()["type"]) == (403, "Untrusted")
    # Not even the manifest was fetched.
    assert [p.name for p in (signed.folder / "cache").rglob("*") if p.is_file() and p.stat().st_size] == []


@pytest.mark.parametrize("reason", ["unknown_key", "revoked", "altered"])
def test_a_function_says_why_a_signature_does_not_count(signed: Signed, stack: ExitStack, reason: str) -> None:
    if reason == "unknown_key":
        signed.sign("1", signed.stranger)
    elif reason == "revoked":
        signed.sign("1")
        signed.trust(trusted(signed.key), revoked=(signed.key.id,))
    else:
        digest = signed.photos.digest
        other = signed_statement(signed.key, digest=signed.version("2").digest, name="photos")
        signed.registry.signatures.put(digest, signed.key.id, other)
    client = segment_app(signed, stack).test_client()
    response = client.post("/", data=framed(signed.photos), content_type=frames.CONTENT_TYPE)
    assert (response.status_code, response.get_json()["facts"]["reason"]) == (403, reason)


def test_a_signed_bundle_runs_as_without_keys_until_its_key_is_revoked(
    signed: Signed, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.security.keyring._RELOAD_S", 0.0)
    signed.sign("1")
    client = segment_app(signed, stack).test_client()

    def run() -> int:
        return client.post("/", data=framed(signed.photos), content_type=frames.CONTENT_TYPE).status_code

    assert run() == 200
    signed.trust(trusted(signed.key), trusted(signed.stranger), revoked=(signed.key.id,))
    assert run() == 403  # the segment is in memory still


def test_a_bundle_signed_anew_outlives_the_key_that_was_replaced(
    signed: Signed, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.security.keyring._RELOAD_S", 0.0)
    signed.sign("1")
    client = segment_app(signed, stack).test_client()
    assert client.post("/", data=framed(signed.photos), content_type=frames.CONTENT_TYPE).status_code == 200
    signed.sign("1", signed.stranger)
    signed.trust(trusted(signed.key), trusted(signed.stranger), revoked=(signed.key.id,))
    assert client.post("/", data=framed(signed.photos), content_type=frames.CONTENT_TYPE).status_code == 200


def test_a_function_whose_cache_is_filled_starts_while_the_registry_is_away(signed: Signed, stack: ExitStack) -> None:
    signed.sign("1")
    frame = framed(signed.photos)
    client = segment_app(signed, stack).test_client()
    assert client.post("/", data=frame, content_type=frames.CONTENT_TYPE).status_code == 200
    shutil.rmtree(signed.photos.folder)
    client = segment_app(signed, stack).test_client()
    assert client.post("/", data=frame, content_type=frames.CONTENT_TYPE).status_code == 200
    # The folder proves nothing: what stands there is verified.
    for path in (signed.folder / "cache" / "signatures").iterdir():
        path.write_text(json.dumps([signed_statement(signed.stranger, digest=signed.photos.digest).decode()]))
    client = segment_app(signed, stack).test_client()
    assert client.post("/", data=frame, content_type=frames.CONTENT_TYPE).status_code in (403, 503)


def test_a_router_serves_a_signed_alias_and_refuses_an_unsigned_one(signed: Signed, stack: ExitStack) -> None:
    signed.sign("1")
    app = router_app(signed, stack)
    assert until(lambda: "the alias photos:prod is not signed" in ask(app)[1]["error"])
    assert ask(app)[0] == 503  # not ready, as its own model is not trusted
    signed.promote("1")
    ready(app.test_client())
    assert ask(app)[0] == 200
    unsigned = app.test_client().get("/v2/models/photos/versions/2")
    assert (unsigned.status_code, unsigned.get_json()["facts"]["reason"]) == (403, "not_signed")


def test_a_router_stays_with_the_latest_alias_and_remembers_it_over_a_restart(signed: Signed, stack: ExitStack) -> None:
    for number in ("1", "2"):
        signed.sign(number)
    signed.promote("1")
    old = signed.stored_alias().read_bytes()
    signed.promote("2")
    app = router_app(signed, stack)
    ready(app.test_client())
    assert ask(app)[1]["served"] == "photos:2"
    signed.stored_alias().write_bytes(old)
    assert not until(lambda: ask(app)[1]["served"] != "photos:2", 0.5)
    restarted = router_app(signed, stack)
    assert until(lambda: "was taken before" in ask(restarted)[1]["error"])
    assert ask(restarted)[0] == 503
    # A folder without memory takes the old one; there the expiry is the bound.
    fresh = router_app(signed, stack, cache="fresh")
    ready(fresh.test_client())
    assert ask(fresh)[1]["served"] == "photos:1"


def test_a_frozen_registry_serves_no_longer_than_its_alias_is_valid(signed: Signed, stack: ExitStack) -> None:
    signed.sign("1")
    signed.promote("1", expires_s=1.5)
    app = router_app(signed, stack)
    ready(app.test_client())
    assert ask(app)[0] == 200
    # Whoever freezes the registry may as well take it away.
    signed.photos.folder.rename(signed.folder / "away")
    assert until(lambda: ask(app)[0] != 200)
    (signed.folder / "away").rename(signed.photos.folder)
    assert until(lambda: ask(app)[1]["facts"].get("reason") == "expired")
    signed.promote("1")
    assert until(lambda: ask(app)[0] == 200)


def test_versions_cannot_be_exchanged_by_whoever_writes_to_the_registry(signed: Signed) -> None:
    for number in ("1", "2"):
        signed.sign(number)
    folder = signed.photos.folder / "models" / "photos" / "versions"
    assert signed.trusting_registry().resolve("photos:2").version == "2"
    shutil.copyfile(folder / "1", folder / "2")
    assert reason_of(lambda: signed.trusting_registry().resolve("photos:2")) == "altered"
    # Nor under the name of another model.
    other = signed.photos.folder / "models" / "other" / "versions"
    other.mkdir(parents=True)
    shutil.copyfile(folder / "1", other / "1")
    assert reason_of(lambda: signed.trusting_registry().resolve("other:1")) == "altered"


def test_a_name_without_a_signed_alias_never_means_the_newest_version(signed: Signed) -> None:
    for number in ("1", "2"):
        signed.sign(number)
    signed.stored_alias().unlink()
    assert signed.registry.resolve("photos").version == "2"
    assert reason_of(lambda: signed.trusting_registry().resolve("photos")) == "not_signed"


def test_nothing_is_published_for_a_signed_alias_that_moves_with_a_key_alone(signed: Signed) -> None:
    signed.promote("1")
    newer = msgspec.structs.replace(signed.photos.bundle, source={"note": "3"})
    assert reason_of(lambda: signed.registry.publish(newer, {}, alias="prod")) == "not_signed"
    assert [each.version for each in signed.registry.versions("photos")] == ["1", "2"]
    assert signed.registry.publish(newer, {}).version == "3"


def test_unsigned_aliases_are_not_listed(signed: Signed) -> None:
    assert signed.trusting_registry().aliases("photos") == {}
    signed.promote("1")
    assert signed.trusting_registry().aliases("photos") == {"prod": "1"}


def test_an_alias_that_nobody_trusts_any_more_keeps_its_version(signed: Signed) -> None:
    """It may be signed anew."""
    registry = signed.trusting_registry()
    with pytest.raises(RegistryError, match="is what prod means"):
        remove_version(registry, "photos", "1")
    collect(registry, older_than_s=0)
    signed.sign("1")
    signed.promote("1")
    assert registry.resolve("photos").version == "1"


def test_a_baked_segment_is_verified_by_the_signatures_beside_it(signed: Signed, tmp_path: Path) -> None:
    signed.sign("1")
    settings = RegistrySettings(trusted_keys=str(signed.keyring), cache_dir=str(tmp_path / "cache"))
    folder = tmp_path / "baked"
    folder.mkdir()
    bundle = signed.photos.bundle
    with SegmentCache(signed.registry, tmp_path / "tools", 2**30).locate(signed.photos.digest, "..") as located:
        shutil.copyfile(located.path, folder / "segment.onnx")
        (folder / "weights.bin").write_bytes((located.path.parent / "weights.bin").read_bytes())
    (folder / "manifest.json").write_bytes(to_json(bundle))
    parts = {"graph": bundle.segments[".."].graph, "weights": bundle.weights.blob}
    (folder / "segment.json").write_text(json.dumps({"segment": ".."} | {n: _blob(b) for n, b in parts.items()}))
    assert BakedSegment(folder).digest == signed.photos.digest
    assert reason_of(lambda: BakedSegment(folder, demanded_trust(settings))) == "not_signed"
    envelopes = [data.decode() for data in signed.registry.signatures.of(signed.photos.digest)]
    (folder / SIGNATURES).write_text(json.dumps(envelopes))
    assert BakedSegment(folder, demanded_trust(settings)).bundle(signed.photos.digest) == bundle


def _blob(blob: Blob) -> dict[str, Any]:
    return {"digest": blob.digest, "size": blob.size}


def test_a_keyring_that_is_absent_or_broken_stops_the_start(signed: Signed) -> None:
    signed.keyring.write_text("junk")
    with pytest.raises(SettingsError) as e:
        signed.trusting_registry()
    assert e.value.facts["variable"] == "trusted_keys"
    signed.keyring.unlink()
    with pytest.raises(SettingsError, match="cannot be read"):
        signed.trusting_registry()


def test_the_secret_demands_signatures_unless_the_setting_says_none(signed: Signed, tmp_path: Path) -> None:
    secrets = {"registry": str(signed.photos.folder), "secrets_dir": str(tmp_path), "cache_dir": str(tmp_path / "c")}
    assert open_registry(RegistrySettings(**secrets)).trust is not None
    keyring = demanded_keyring(RegistrySettings(**secrets))
    assert keyring is not None
    assert list(keyring.keys) == [signed.key.id]
    assert open_registry(RegistrySettings(**secrets, trusted_keys="none")).trust is None
    assert open_registry(RegistrySettings(**secrets | {"secrets_dir": str(tmp_path / "absent")})).trust is None


def test_the_signers_of_a_version_are_told_apart(signed: Signed) -> None:
    for key in (signed.key, signed.stranger):
        signed.sign("1", key)
    signed.registry.signatures.put(signed.photos.digest, "f" * 64, b"junk")
    settings = RegistrySettings(trusted_keys=str(signed.keyring))
    listed = signers(signed.registry, signed.photos.digest, demanded_keyring(settings))
    assert {(each.key, each.state) for each in listed} == {
        (signed.key.id, "trusted"),
        (signed.stranger.id, "unknown_key"),
        ("", "altered"),
    }


def test_a_collection_removes_signatures_with_their_manifests(signed: Signed) -> None:
    digests = [signed.version(number).digest for number in ("1", "2")]
    for number in ("1", "2"):
        signed.sign(number)
    remove_version(signed.registry, "photos", "2")
    collect(signed.registry, older_than_s=0)
    assert [len(signed.registry.signatures.of(digest)) for digest in digests] == [1, 0]


def test_manifests_become_bundles_in_one_place() -> None:
    """So that no source of bundles forgets the signatures."""
    users = {
        str(path.relative_to(SHARED))
        for path in (SHARED / "isthmus").rglob("*.py")
        if "read_manifest(" in path.read_text() or "manifest.from_json" in path.read_text()
    }
    # registry.py reads what it is about to publish.
    assert users == {"isthmus/registry/content.py", "isthmus/registry/registry.py"}
