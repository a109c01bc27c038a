"""A registry that strangers write to: altered manifests, signatures, aliases, grants and sealed blobs run nothing."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient

from isthmus.artifacts import alias as alias_documents
from isthmus.artifacts.alias import ALIAS_TYPE
from isthmus.artifacts.bundle import digest_of, to_json
from isthmus.artifacts.version_statement import VERSION_TYPE
from isthmus.errors import IsthmusError, http_status
from isthmus.registry import FolderStore, Registry, open_registry
from isthmus.registry.aliases import AliasSigner
from isthmus.registry.registry import Resolved
from isthmus.registry.sealed_content import grant_key, grants_of
from isthmus.security.dsse import read_envelope, sign
from isthmus.security.ed25519 import SigningKey
from isthmus.security.keyring import KeyringDocument
from isthmus.security.keyring import to_json as keyring_json
from isthmus.security.recipients import new_pair
from isthmus.serving import create_segment_app
from isthmus.settings import RegistrySettings
from isthmus.wire import frame as frames
from isthmus_tools.usecases.encryption import EncryptRequest, encrypt
from isthmus_tools.usecases.signing import sign_version
from support.altered_documents import ODD, altered, encoded, paths
from support.attacks import MIN_CASES, Attack, Target, flips
from support.bundles import Published, framed, publish_photos, publish_two_versions, ready, segment_settings
from support.signing import new_key, signed_statement, trusted

HEADERS = {"Content-Type": frames.CONTENT_TYPE}
NOW = datetime.now(UTC)


@dataclass(frozen=True)
class Signed:
    """Two signed versions of the model for photos, and a function that trusts their key."""

    photos: Published
    folder: Path
    key: SigningKey
    stranger: SigningKey

    @property
    def registry(self) -> Registry:
        return self.photos.registry

    def version(self, number: str) -> Resolved:
        return self.registry.resolve(f"photos:{number}")

    def trusting(self, cache: str) -> Registry:
        return open_registry(
            RegistrySettings(
                registry=str(self.photos.folder),
                trusted_keys=str(self.folder / "keyring"),
                cache_dir=str(self.folder / cache),
            )
        )


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    folder = tmp_path_factory.mktemp("signed")
    photos = publish_two_versions(folder)
    setup = Signed(photos, folder, new_key(folder, "release"), new_key(folder, "stranger"))
    (folder / "keyring").write_bytes(keyring_json(KeyringDocument((trusted(setup.key),), ())))
    sign_version(setup.registry, setup.version("1"), setup.key)
    return setup


@contextmanager
def segment_target(photos: Published, cache: Path, segment: str = "..", **given: Any) -> Iterator[Target]:
    with pytest.MonkeyPatch.context() as patch:
        # Each case is looked up, and none is answered by the refusal of the one before.
        patch.setattr("isthmus.runtime.store._MISSING_S", 0.0)
        app = create_segment_app(segment_settings(photos, cache, **given))
    data = framed(photos, segment)

    def good(client: FlaskClient) -> int:
        return client.post("/", data=data, headers=HEADERS).status_code

    yield Target(ready(app.test_client()), good)
    app.extensions["isthmus"].close()


@pytest.fixture(scope="module")
def target(signed: Signed) -> Iterator[Target]:
    keyring = str(signed.folder / "keyring")
    with segment_target(signed.photos, signed.folder / "function", trusted_keys=keyring) as target:
        yield target


@pytest.fixture(scope="module")
def open_target(signed: Signed) -> Iterator[Target]:
    """A function without trusted keys."""
    with segment_target(signed.photos, signed.folder / "open") as target:
        yield target


def blob_path(photos: Published, digest: str) -> Path:
    return photos.folder / "blobs" / "sha256" / digest.removeprefix("sha256:")


# Manifests


def manifests(signed: Signed) -> list[tuple[str, bytes]]:
    """The manifest of the first version with values altered, and bytes flipped."""
    data = to_json(signed.photos.bundle)
    places = random.Random(5).sample(range(len(data)), 15)
    return [*altered(json.loads(data), 60), *((f"byte {place}", changed) for place, changed in flips(data, places))]


def test_an_altered_manifest_is_refused_where_its_digest_does_not_fit(signed: Signed, open_target: Target) -> None:
    """Under digests of their own, so that no memory of an earlier case answers."""
    stored: list[Path] = []

    def attacks() -> Iterator[Attack]:
        for what, data in manifests(signed):
            digest = "sha256:" + hashlib.sha256(b"another" + data).hexdigest()
            stored.append(blob_path(signed.photos, digest))
            stored[-1].write_bytes(data)
            yield Attack(what, 502, framed(signed.photos, bundle=digest), HEADERS)

    open_target.refuses("manifest", attacks())
    for path in stored:
        path.unlink()


def test_a_manifest_that_nobody_signed_is_refused_whatever_is_in_it(signed: Signed, target: Target) -> None:
    """Under their right digests: a stranger's bundle, whole or altered, beside signatures of others."""
    envelope = signed.registry.signatures.of(signed.photos.digest)[0]

    def attacks() -> Iterator[Attack]:
        for number, (what, data) in enumerate(manifests(signed)):
            digest = digest_of(data)
            blob_path(signed.photos, digest).write_bytes(data)
            if number % 3 == 1:
                signed.registry.signatures.put(digest, signed.key.id, envelope)
            elif number % 3 == 2:
                forged = signed_statement(signed.stranger, digest=digest, name="photos")
                signed.registry.signatures.put(digest, signed.key.id, forged)
            yield Attack(what, 403, framed(signed.photos, bundle=digest), HEADERS)

    target.refuses("manifest", attacks())


# Signatures


def envelopes(signed: Signed) -> Iterator[tuple[str, bytes]]:
    """Envelopes for the second version that no trusted key signed over it."""
    digest = signed.version("2").digest
    good = signed_statement(signed.key, digest=digest, name="photos", version=2)
    document = json.loads(good)
    statement = json.loads(base64.b64decode(document["payload"]))
    for path in paths(statement):
        for value in (*ODD[::4], "photos2", 3, "2027-01-01T00:00:00Z"):
            changed = copy.deepcopy(statement)
            changed[path[0]] = value
            if changed != statement:
                payload = base64.b64encode(json.dumps(changed).encode()).decode()
                yield (
                    f"payload {path}={str(value)[:20] if not isinstance(value, int) else 'number'}",
                    encoded(document | {"payload": payload}),
                )
    for what, data in altered(document, 70):
        # Without an id every trusted key is tried, and the signature is theirs.
        if not what.startswith("('signatures', 0, 'keyid'): ") or what.rpartition(": ")[2] not in (
            "None",
            "Ellipsis",
            "",
        ):
            yield f"envelope {what}", data
    signature = base64.b64decode(document["signatures"][0]["sig"])
    for place, changed in flips(signature, range(0, len(signature), 3)):
        sig = base64.b64encode(changed).decode()
        yield f"signature at {place}", encoded(document | {"signatures": [{"sig": sig, "keyid": signed.key.id}]})
    other = json.loads(signed_statement(signed.stranger, digest=digest, name="photos", version=2))
    other["signatures"][0]["keyid"] = signed.key.id
    yield "a stranger's under a trusted id", encoded(other)
    yield "a stranger's", signed_statement(signed.stranger, digest=digest, name="photos", version=2)
    yield "of the first version", signed_statement(signed.key, digest=signed.photos.digest, name="photos")
    payload = base64.b64decode(document["payload"])
    yield "of an alias", sign(payload, ALIAS_TYPE, [signed.key])
    yield "of no type", sign(payload, "", [signed.key])
    yield "of a type more", sign(payload, VERSION_TYPE + " ", [signed.key])
    yield "17 signatures", encoded(document | {"signatures": document["signatures"] * 17})
    yield "of 65 kB", good[:-1] + b" " * 2**16 + b"}"
    for size in (0, 1, 50, len(good) // 2, len(good) - 1):
        yield f"cut after {size}", good[:size]
    yield "twice", good + good
    yield "nested", b"[" * 5000


def test_an_altered_signature_runs_nothing(signed: Signed, target: Target) -> None:
    digest = signed.version("2").digest
    made = {data: what for what, data in envelopes(signed)}
    # The request is one; what differs is the registry.
    attacks = [
        Attack(what, 403, framed(signed.photos, bundle=digest, request=f"r{n}"), HEADERS)
        for n, what in enumerate(made.values())
    ]
    waiting = iter(made)
    target.refuses("signature", attacks, lambda _: signed.registry.signatures.put(digest, signed.key.id, next(waiting)))
    # The right signature alone is what was missing.
    sign_version(signed.registry, signed.version("2"), signed.key)
    answer = target.client.post("/", data=framed(signed.photos, bundle=digest), headers=HEADERS)
    assert answer.status_code == 200, answer.json


# Aliases


def refused_with(act: Callable[[], object]) -> int:
    with pytest.raises(IsthmusError) as caught:
        act()
    assert len(caught.value.message) < 1000
    return http_status(caught.value)


def test_old_and_altered_aliases_are_refused(signed: Signed) -> None:
    sign_version(signed.registry, signed.version("2"), signed.key)
    path = signed.photos.folder / "models" / "photos" / "aliases" / "prod"
    signer = AliasSigner(signed.key, 3600.0)
    earlier = []
    for number in ("1", "2", "1", "2", "1"):
        signed.registry.move_alias("photos", "prod", number, signer=signer)
        earlier.append(path.read_bytes())
    trusting = signed.trusting("aliases")
    assert trusting.resolve("photos:prod").version == "1"
    *old, latest = earlier
    document = json.loads(read_envelope(latest).payload)
    envelope = json.loads(latest)

    def signed_as(key: SigningKey, payload_type: str = ALIAS_TYPE, **fields: Any) -> bytes:
        return sign(json.dumps(document | fields).encode(), payload_type, [key])

    far, past = (NOW + timedelta(days=9)).isoformat(), (NOW - timedelta(hours=1)).isoformat()
    cases = {
        **{f"replayed {n}": data for n, data in enumerate(old)},
        **{
            what: encoded(envelope | {"payload": base64.b64encode(data).decode()})
            for what, data in altered(document, 60)
        },
        **{
            f"a stranger's {what}": signed_as(signed.stranger, **fields)
            for what, fields in {
                "as it was": {},
                "of later": {"counter": 99},
                "of version 2": {"version": 2, "counter": 6},
                "for ever": {"expires": far},
            }.items()
        },
        # Signed by the key itself, for another place, time or end.
        "of another alias": signed_as(signed.key, alias="next", counter=9),
        "of another model": signed_as(signed.key, name="other", counter=9),
        "of a statement's type": signed_as(signed.key, VERSION_TYPE, counter=9),
        "expired": signed_as(signed.key, counter=9, expires=past),
        "forked": signed_as(signed.key, version=2, digest=signed.version("2").digest),
        "without a counter": signed_as(signed.key, counter=0),
        "a bare number": b"1",
        "unsigned": alias_documents.to_json(alias_documents.from_json(read_envelope(latest).payload, "photos", "prod")),
        "empty": b"",
        "cut": latest[: len(latest) // 2],
    }
    wrong = []
    for what, data in cases.items():
        path.write_bytes(data)
        status = refused_with(lambda: trusting.resolve("photos:prod"))
        if status != 403:
            wrong.append(f"{what}: {status}")
    assert not wrong
    assert len(cases) >= MIN_CASES["alias"]
    path.write_bytes(latest)
    assert trusting.resolve("photos:prod").version == "1"


# Encryption


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The model for photos, sealed for an edge node (its head) and the cloud."""
    folder = tmp_path_factory.mktemp("encrypted")
    published = publish_photos(folder)
    for name in ("edge", "cloud"):
        private, public = new_pair()
        (folder / name).mkdir()
        (folder / name / "recipient-key").write_bytes(private)
        (folder / f"{name}.pem").write_bytes(public)
    recipients = [f"{folder}/edge.pem@head", f"{folder}/cloud.pem"]
    encrypt(
        EncryptRequest(model="photos", recipients=recipients, registry=RegistrySettings(registry=str(published.folder)))
    )
    return published


def test_altered_sealed_blobs_run_nothing(encrypted: Published, tmp_path: Path) -> None:
    graph = encrypted.bundle.segments["6.."].graph
    (path,) = (encrypted.folder / "sealed" / graph.digest.removeprefix("sha256:")).iterdir()
    (other,) = (encrypted.folder / "sealed" / encrypted.bundle.segments["1.."].graph.digest[7:]).iterdir()
    sealed = path.read_bytes()
    start = len(sealed) - graph.size
    body = random.Random(6).sample(range(max(0, start), len(sealed)), 40)
    contents = [data for _, data in flips(sealed, body)]
    contents += [sealed[:size] for size in (0, 1, 40, 80, start, len(sealed) // 2, len(sealed) - 16, len(sealed) - 1)]
    contents += [other.read_bytes(), bytes(len(sealed)), sealed[::-1]]
    waiting = iter(contents)
    taken = encrypted.bundle.segments["6.."].inputs
    tail = replace(encrypted, inputs={spec.name: np.zeros(spec.shape, spec.dtype) for spec in taken})
    attacks = [Attack(f"sealed {n}", 502, framed(tail, "6..", request=f"r{n}"), HEADERS) for n in range(len(contents))]
    secrets = str(encrypted.folder.parent / "cloud")
    with segment_target(encrypted, tmp_path / "cache", "..6", secrets_dir=secrets) as cloud:
        cloud.refuses("sealed blob", attacks, lambda _: path.write_bytes(next(waiting)))
        path.write_bytes(sealed)
        assert cloud.client.post("/", data=framed(tail, "6.."), headers=HEADERS).status_code == 200


def test_altered_grants_open_nothing(encrypted: Published, tmp_path: Path) -> None:
    store = FolderStore(encrypted.folder)
    secrets = encrypted.folder.parent

    def reads(who: str) -> bytes:
        settings = RegistrySettings(registry=str(encrypted.folder), secrets_dir=str(secrets / who), registry_attempts=1)
        registry = open_registry(settings)
        registry.bundle(encrypted.digest)
        return bytes(registry.blob(encrypted.bundle.segments["6.."].graph))

    by_recipient = {
        name: encrypted.folder / grant_key(encrypted.digest, name) for name in grants_of(store, encrypted.digest)
    }
    edge, cloud = sorted(by_recipient.values(), key=lambda path: path.stat().st_size)
    good, lesser = cloud.read_bytes(), edge.read_bytes()
    assert reads("cloud")
    assert refused_with(lambda: reads("edge")) == 403
    count = 0
    document = json.loads(good)
    for what, data in altered(document, 60):
        cloud.write_bytes(data)
        assert refused_with(lambda: reads("cloud")) == 502, what
        count += 1
    # The edge's grant widened by its holder, and the cloud's under the edge's name.
    widened = json.loads(lesser) | {"segments": document["segments"], "whole": True, "sealed": document["sealed"]}
    for data in (
        encoded(widened),
        good,
        encoded(document | {"recipient": edge.name}),
        encoded(json.loads(lesser) | {"keys": document["keys"]}),
    ):
        edge.write_bytes(data)
        assert refused_with(lambda: reads("edge")) == 502
        count += 1
    edge.write_bytes(lesser)
    cloud.write_bytes(good)
    assert reads("cloud")
    assert count >= MIN_CASES["grant"]
