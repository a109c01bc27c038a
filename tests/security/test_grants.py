"""Grants: opened by their recipient alone, with nothing altered; and the key pairs of recipients."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from msgspec.structs import replace

from isthmus.artifacts.bundle import digest_of
from isthmus.artifacts.grant import GRANT, Grant, to_json
from isthmus.artifacts.segment_id import SegmentId
from isthmus.errors import Corrupt, RegistryError, SettingsError
from isthmus.security.grants import SealedKeys, make_grant, new_sealing, open_grant
from isthmus.security.recipients import (
    RecipientKey,
    Wrapping,
    new_pair,
    parse_recipient_key,
    read_recipient,
    read_recipient_key,
)

MANIFEST = digest_of(b"manifest")
FACTS = Grant(MANIFEST, "edge", (SegmentId("", "1"),), False, (digest_of(b"variant"),))


def key_pair(wrapping: Wrapping = "hpke-x25519") -> RecipientKey:
    return parse_recipient_key(new_pair(wrapping, bits=2048)[0], where="here")


@pytest.fixture(scope="module")
def edge() -> RecipientKey:
    return key_pair()


@pytest.fixture(scope="module")
def module_key() -> RecipientKey:
    return key_pair("rsa-oaep-sha256")


@pytest.fixture(scope="module")
def blobs() -> list[SealedKeys]:
    return [new_sealing(digest_of(b"weights"), 1000, [300]), new_sealing(digest_of(b""), 0)]


def test_a_recipient_opens_its_grant_with_either_kind_of_key(
    edge: RecipientKey, module_key: RecipientKey, blobs: list[SealedKeys]
) -> None:
    for key in (edge, module_key):
        grant = GRANT.decode(to_json(make_grant(FACTS, key.recipient, blobs)))
        opened = open_grant(grant, key)
        assert {digest: (each.header, each.keys) for digest, each in opened.items()} == {
            each.digest: (each.header, each.keys) for each in blobs
        }


def test_a_grant_of_a_range_holds_the_keys_of_its_regions_alone(edge: RecipientKey, blobs: list[SealedKeys]) -> None:
    grant = make_grant(FACTS, edge.recipient, [blobs[0].of([(10, 20)])])
    (opened,) = open_grant(grant, edge).values()
    assert opened.keys == {0: blobs[0].keys[0]}
    assert not opened.complete
    assert blobs[0].keys[1] not in to_json(grant)


def test_another_recipient_cannot_open_a_grant_even_as_its_own(
    edge: RecipientKey, module_key: RecipientKey, blobs: list[SealedKeys]
) -> None:
    for key, other in ((edge, key_pair()), (module_key, key_pair("rsa-oaep-sha256"))):
        grant = make_grant(FACTS, key.recipient, blobs)
        for claimed in (grant, replace(grant, recipient=other.id)):
            with pytest.raises(Corrupt):
                open_grant(claimed, other)


@pytest.mark.parametrize("wrapping", ["hpke-x25519", "rsa-oaep-sha256"])
def test_no_altered_field_of_a_grant_passes(
    wrapping: str, edge: RecipientKey, module_key: RecipientKey, blobs: list[SealedKeys]
) -> None:
    key = edge if wrapping == "hpke-x25519" else module_key
    grant = make_grant(FACTS, key.recipient, blobs)
    flip = lambda data, at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]  # noqa: E731
    altered = [
        replace(grant, manifest=digest_of(b"another")),
        replace(grant, label="cloud"),
        replace(grant, segments=(SegmentId(),)),
        replace(grant, whole=True),
        replace(grant, reaches=()),
        replace(grant, recipient="0" * 32),
        replace(grant, sealed={}),
        replace(grant, sealed={**grant.sealed, blobs[0].digest: "0" * 32}),
        replace(grant, wrapping="hpke-x25519" if wrapping != "hpke-x25519" else "rsa-oaep-sha256"),
        *(replace(grant, wrapped=flip(grant.wrapped, at)) for at in (0, 31, 32, len(grant.wrapped) - 1)),
        *(replace(grant, keys=flip(grant.keys, at)) for at in (0, len(grant.keys) // 2, len(grant.keys) - 1)),
        replace(grant, keys=grant.keys[:-1]),
        replace(grant, wrapped=b""),
    ]
    for each in altered:
        with pytest.raises(Corrupt):
            open_grant(each, key)


def test_a_key_of_another_length_or_of_no_region_is_refused(edge: RecipientKey, blobs: list[SealedKeys]) -> None:
    for keys in ({0: b"short"}, {2: bytes(32)}, {-1: bytes(32)}):
        grant = make_grant(FACTS, edge.recipient, [SealedKeys(blobs[0].header, keys)])
        with pytest.raises(Corrupt):
            open_grant(grant, edge)


@pytest.mark.parametrize(
    "text", [b"", b"{}", b'{"format":"isthmus.grant/2"}', b'{"format":"isthmus.grant/1","manifest":"x"}']
)
def test_what_is_no_grant_is_refused(text: bytes) -> None:
    with pytest.raises(RegistryError, match="grant"):
        GRANT.decode(text)


def test_an_id_is_that_of_the_public_key_and_shows_no_key(edge: RecipientKey) -> None:
    private, public = new_pair()
    assert parse_recipient_key(private, where="a").id == read_recipient(public, where="b").id != edge.id
    assert repr(edge) == f"RecipientKey({edge.id})"


def private_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, password: bytes = b"") -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def test_other_and_weak_keys_are_refused_and_never_quoted() -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505
    private, public = new_pair()
    broken = private.replace(b"MC4", b"MC5")
    for pem in (
        private_pem(curve),
        private_pem(weak),
        private_pem(curve, b"word"),
        public,
        broken,
        b"secret\n",
        b"\xff",
    ):
        with pytest.raises(SettingsError, match="no private key") as caught:
            parse_recipient_key(pem, where="the secret")
        # The body of the key, below its first line.
        assert not pem[30:50] or pem[30:50].decode("latin-1") not in str(caught.value.document())
        assert caught.value.__cause__ is None
    public_pems = [
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in (curve, weak)
    ]
    for pem in (*public_pems, b"", b"x" * 20_000):
        with pytest.raises(SettingsError, match="no public key"):
            read_recipient(pem, where="the file")
    with pytest.raises(SettingsError, match="never leaves its recipient"):
        read_recipient(private, where="the file")


def test_the_secret_is_a_file_of_several_lines(tmp_path: Path) -> None:
    assert read_recipient_key(str(tmp_path)) is None
    private, public = new_pair()
    (tmp_path / "recipient-key").write_bytes(private)
    key = read_recipient_key(str(tmp_path))
    assert key is not None
    assert key.id == read_recipient(public, where="b").id
    (tmp_path / "recipient-key").write_bytes(b"x" * 100_000)
    with pytest.raises(SettingsError, match="more than"):
        read_recipient_key(str(tmp_path))
