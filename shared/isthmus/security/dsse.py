"""DSSE envelopes: a payload, its type, and signatures over both.

Source: Dead Simple Signing Envelope 1.0.2, https://github.com/secure-systems-lab/dsse (protocol.md, envelope.md).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta, Struct

from isthmus.errors import Untrusted

# The payload of a statement has some hundred bytes, an alias document fewer than 4,096.
MAX_ENVELOPE_BYTES = 64 * 2**10
# Each signature costs a verification, and whoever writes to the store chooses how many there are.
MAX_SIGNATURES = 16


class Verifier(Protocol):
    """A public key."""

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the signature over `message` is by this key."""
        ...


class Signer(Protocol):
    """A private key. `id` is the id of its public key."""

    @property
    def id(self) -> str:
        """The id of the public key."""
        ...

    def sign(self, message: bytes) -> bytes:
        """The signature over `message`."""
        ...


@dataclass(frozen=True)
class Envelope:
    """A payload, its type, and signatures as pairs of key id and bytes; the id is a hint and may be empty."""

    payload: bytes
    payload_type: str
    signatures: Sequence[tuple[str, bytes]]

    def verified_by(self, keys: Mapping[str, Verifier]) -> list[str]:
        """The ids of the keys that signed this payload under this type.

        An id in the envelope narrows the keys to try and proves nothing: envelope.md, "KEYID".
        """
        message = pae(self.payload_type, self.payload)
        verified = []
        for named, signature in self.signatures:
            candidates = [named] if named else list(keys)
            verified += [key for key in candidates if key in keys and keys[key].verifies(signature, message)]
        return list(dict.fromkeys(verified))


class _SignatureField(Struct):
    sig: str
    keyid: str | None = None


# Unknown fields are ignored, as the specification demands of consumers.
class _EnvelopeJson(Struct, rename={"payload_type": "payloadType"}):
    payload: str
    payload_type: str
    signatures: Annotated[list[_SignatureField], Meta(max_length=MAX_SIGNATURES)]


def pae(payload_type: str, payload: bytes) -> bytes:
    """The signed message, Pre-Authentication Encoding: lengths in bytes and the two texts, unambiguous."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, payload_type: str, signers: Iterable[Signer]) -> bytes:
    """The envelope of `payload`, as JSON."""
    message = pae(payload_type, payload)
    signatures = [_SignatureField(_base64(signer.sign(message)), signer.id) for signer in signers]
    return msgspec.json.encode(_EnvelopeJson(_base64(payload), payload_type, signatures))


def is_envelope(data: bytes) -> bool:
    """Whether the bytes look like an envelope; whether they are one, `read_envelope` says."""
    return b'"payloadType"' in data and b'"signatures"' in data


def read_envelope(data: bytes) -> Envelope:
    """Parse an envelope; no signature is verified yet.

    Raises:
        Untrusted: longer than MAX_ENVELOPE_BYTES, more than MAX_SIGNATURES, or no envelope; reason `altered`.
    """
    if len(data) > MAX_ENVELOPE_BYTES:
        raise _malformed(f"it has {len(data)} bytes; at most {MAX_ENVELOPE_BYTES} are read")
    try:
        document = msgspec.json.decode(data, type=_EnvelopeJson)
        signatures = [(each.keyid or "", _bytes(each.sig)) for each in document.signatures]
        return Envelope(_bytes(document.payload), document.payload_type, signatures)
    except (msgspec.MsgspecError, binascii.Error, ValueError, RecursionError) as e:
        raise _malformed(str(e)[:200]) from e


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    """Base64 in either alphabet: verifiers accept both, says protocol.md."""
    return base64.b64decode(text.translate(_STANDARD), validate=True)


_STANDARD = str.maketrans("-_", "+/")


def _malformed(why: str) -> Untrusted:
    return Untrusted(f"a signature is no DSSE envelope: {why}", reason="altered", hint="sign it again: isthmus sign")
