"""DSSE envelopes against the specification's vector and another implementation, and with every field altered."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope as ReferenceEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from isthmus.errors import Untrusted
from isthmus.security.dsse import MAX_ENVELOPE_BYTES, MAX_SIGNATURES, pae, read_envelope, sign
from isthmus.security.ed25519 import PublicKey, SigningKey, new_signing_key

TYPE = "application/vnd.isthmus.version+json"
PAYLOAD = b'{"digest":"sha256:0"}'
# protocol.md, "Test Vectors".
VECTOR = (
    b'{"payload": "aGVsbG8gd29ybGQ=", "payloadType": "http://example.com/HelloWorld", "signatures":'
    b' [{"sig": "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="}]}'
)
X = 46950820868899156662930047687818585632848591499744589407958293238635476079160
Y = 5640078356564379163099075877009565129882514886557779369047442380624545832820


class EcdsaKey:
    """The key of the specification's vector: P-256, the signature as r and s."""

    def __init__(self) -> None:
        self._key = ec.EllipticCurvePublicNumbers(X, Y, ec.SECP256R1()).public_key()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
        try:
            self._key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return new_signing_key(tmp_path_factory.mktemp("keys") / "key.pem")


def test_the_specifications_vector_is_read_and_verified() -> None:
    envelope = read_envelope(VECTOR)
    assert pae(envelope.payload_type, envelope.payload) == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert envelope.verified_by({"vector": EcdsaKey()}) == ["vector"]
    assert read_envelope(VECTOR.replace(b"A3Jq", b"A3Jr")).verified_by({"vector": EcdsaKey()}) == []


def test_lengths_are_of_bytes_not_of_characters() -> None:
    assert pae("é", b"") == "DSSEv1 2 é 0 ".encode()


def test_another_implementation_verifies_our_envelope(key: SigningKey) -> None:
    envelope = ReferenceEnvelope.from_dict(json.loads(sign(PAYLOAD, TYPE, [key])))
    assert set(envelope.verify([SSlibKey.from_crypto(key.public.key, keyid=key.id)], 1)) == {key.id}
    envelope.payload += b" "
    with pytest.raises(VerificationError):
        envelope.verify([SSlibKey.from_crypto(key.public.key, keyid=key.id)], 1)


def test_we_verify_the_envelope_of_another_implementation() -> None:
    signer = CryptoSigner.generate_ed25519()
    envelope = ReferenceEnvelope(PAYLOAD, TYPE, {})
    envelope.sign(signer)
    public = PublicKey(Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer.public_key.keyval["public"])))
    read = read_envelope(json.dumps(envelope.to_dict()).encode())
    assert read.payload == PAYLOAD
    assert read.verified_by({signer.public_key.keyid: public}) == [signer.public_key.keyid]


def test_signatures_of_several_keys_count_each_once(tmp_path: Path, key: SigningKey) -> None:
    other, stranger = (new_signing_key(tmp_path / f"{i}.pem") for i in range(2))
    envelope = read_envelope(sign(PAYLOAD, TYPE, [key, stranger, other, key]))
    assert envelope.verified_by({other.id: other.public, key.id: key.public}) == [key.id, other.id]


def test_a_key_id_is_a_hint_and_proves_nothing(tmp_path: Path, key: SigningKey) -> None:
    other = new_signing_key(tmp_path / "other.pem")
    document = json.loads(sign(PAYLOAD, TYPE, [key]))
    document["signatures"][0]["keyid"] = other.id
    keys = {key.id: key.public, other.id: other.public}
    assert read_envelope(json.dumps(document).encode()).verified_by(keys) == []
    for absent in (None, ""):
        document["signatures"][0]["keyid"] = absent
        assert read_envelope(json.dumps(document).encode()).verified_by(keys) == [key.id]


def test_both_alphabets_of_base64_and_unknown_fields_are_taken(key: SigningKey) -> None:
    document: dict[str, Any] = json.loads(sign(b"\xff\xfe" * 9, TYPE, [key])) | {"later": 1}
    assert "/" in document["payload"]
    document["payload"] = document["payload"].translate(str.maketrans("+/", "-_"))
    envelope = read_envelope(json.dumps(document).encode())
    assert envelope.payload == b"\xff\xfe" * 9
    assert envelope.verified_by({key.id: key.public}) == [key.id]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"payload": "", "payloadType": ""}',
        b'{"payload": "!", "payloadType": "", "signatures": []}',
        b'{"payload": "QQ", "payloadType": "", "signatures": []}',
        b'{"payload": "\xc3\xa9", "payloadType": "", "signatures": []}',
        b'{"payload": 1, "payloadType": "", "signatures": []}',
        b'{"payload": "", "payloadType": "", "signatures": [{}]}',
        b'{"payload": "", "payloadType": "", "signatures": [%s]}' % b",".join([b'{"sig": ""}'] * (MAX_SIGNATURES + 1)),
        b'{"payload": "%s", "payloadType": "", "signatures": []}' % (b"A" * MAX_ENVELOPE_BYTES),
        b"[" * 10_000,
    ],
    ids=lambda data: str(data[:40]),
)
def test_what_is_no_envelope_is_altered(data: bytes) -> None:
    with pytest.raises(Untrusted) as e:
        read_envelope(data)
    assert e.value.facts["reason"] == "altered"


@given(st.data())
def test_no_altered_character_of_the_signed_parts_verifies(key: SigningKey, data: st.DataObject) -> None:
    original = sign(PAYLOAD, TYPE, [key])
    document = json.loads(original)
    place: Any = data.draw(st.sampled_from([document, document["signatures"][0]]))
    name = data.draw(st.sampled_from(["payload", "payloadType"] if place is document else ["sig", "keyid"]))
    index = data.draw(st.integers(0, len(place[name]) - 1))
    letter = data.draw(st.sampled_from(string.ascii_letters + string.digits + "+/=-."))
    place[name] = place[name][:index] + letter + place[name][index + 1 :]
    try:
        envelope = read_envelope(json.dumps(document).encode())
    except Untrusted:
        return
    # Base64 has spare bits in its last letter, so that another text may mean the same bytes.
    same = envelope == read_envelope(original)
    assert envelope.verified_by({key.id: key.public}) == ([key.id] if same else [])
