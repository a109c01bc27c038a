"""Recipients of data keys: their key pairs, and one key wrapped for one recipient.

X25519 by HPKE (RFC 9180, base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM), or RSA by OAEP with SHA-256
(RFC 8017), which hardware modules and key services offer. A recipient's id is the SHA-256 of its public key
(SubjectPublicKeyInfo), abbreviated to 128 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding, rsa, x25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from isthmus.errors import Corrupt, SettingsError
from isthmus.settings import read_secret_file

SECRET = "recipient-key"  # noqa: S105
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
MAX_PEM_BYTES = 16 * 2**10
Wrapping = Literal["hpke-x25519", "rsa-oaep-sha256"]
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_OAEP = padding.OAEP(mgf=padding.MGF1(algorithm=SHA256()), algorithm=SHA256(), label=None)
_ADVICE = (
    "make a pair: isthmus key new FILE.pem --kind recipient; the private one is the secret:"
    f" faas-cli secret create {SECRET} --from-file=FILE.pem"
)
_PublicKey = x25519.X25519PublicKey | rsa.RSAPublicKey
_PrivateKey = x25519.X25519PrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Recipient:
    """A public key that data keys are wrapped for."""

    id: str
    wrapping: Wrapping
    _key: _PublicKey

    def wrap(self, key: bytes, context: bytes) -> bytes:
        """The key, for the holder of the private key alone. HPKE binds it to `context` too; OAEP does not."""
        if isinstance(self._key, x25519.X25519PublicKey):
            return _SUITE.encrypt(key, self._key, info=context)
        return self._key.encrypt(key, _OAEP)


class Unwrapper(Protocol):
    """A recipient's private side: a key in this process, or a module or service that holds it."""

    @property
    def id(self) -> str:
        """The recipient's id."""
        ...

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """The key that was wrapped for this recipient.

        Raises:
            Corrupt: altered, of another context, or wrapped for another recipient.
        """
        ...


class RecipientKey:
    """A recipient's private key in this process."""

    def __init__(self, key: _PrivateKey) -> None:
        self._key = key
        self.recipient = _recipient(key.public_key())

    @property
    def id(self) -> str:
        """The recipient's id."""
        return self.recipient.id

    def __repr__(self) -> str:
        """The id alone: a key must not get into a log."""
        return f"RecipientKey({self.id})"

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """See `Unwrapper`."""
        try:
            if isinstance(self._key, x25519.X25519PrivateKey):
                return _SUITE.decrypt(wrapped, self._key, info=context)
            return self._key.decrypt(wrapped, _OAEP)
        except (InvalidTag, ValueError) as e:
            raise Corrupt(
                f"the key wrapped for recipient {self.id} does not open: it was altered, or wrapped for another",
                blob="",
                recipient=self.id,
            ) from e


def new_pair(wrapping: Wrapping = "hpke-x25519", *, bits: int = 3072) -> tuple[bytes, bytes]:
    """A private and a public key, as PEM. Units: `bits` of an RSA key."""
    key: _PrivateKey
    if wrapping == "hpke-x25519":
        key = x25519.X25519PrivateKey.generate()
    else:
        key = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def read_recipient(pem: bytes, *, where: str) -> Recipient:
    """The recipient of a public key; `where` names the file in messages.

    Raises:
        SettingsError: no public key of X25519 or of RSA with enough bits. A private key is never quoted.
    """
    key = _load(lambda: load_pem_public_key(pem), pem, where, "public")
    if not isinstance(key, x25519.X25519PublicKey | rsa.RSAPublicKey):
        raise _refusal(where, "public", f"it is of another kind: {type(key).__name__}")
    _check_bits(key, where, "public")
    return _recipient(key)


def read_recipient_key(folder: str) -> RecipientKey | None:
    """The private key in the folder of secrets; None without the secret.

    Raises:
        SettingsError: the secret cannot be read, or is no private key. The message never holds the secret.
    """
    pem = read_secret_file(folder, SECRET)
    return parse_recipient_key(pem, where=f"the secret {SECRET} in {folder}") if pem else None


def parse_recipient_key(pem: bytes, *, where: str) -> RecipientKey:
    """The private key of `pem`.

    Raises:
        SettingsError: no private key of X25519 or of RSA with enough bits.
    """
    key = _load(lambda: load_pem_private_key(pem, None), pem, where, "private")
    if not isinstance(key, x25519.X25519PrivateKey | rsa.RSAPrivateKey):
        raise _refusal(where, "private", f"it is of another kind: {type(key).__name__}")
    _check_bits(key.public_key(), where, "private")
    return RecipientKey(key)


def _load(load: Callable[[], object], pem: bytes, where: str, half: str) -> object:
    if len(pem) > MAX_PEM_BYTES:
        raise _refusal(where, half, f"it has {len(pem)} bytes")
    if half == "public" and b"PRIVATE KEY-----" in pem:
        raise _refusal(where, half, "it is a private key, which never leaves its recipient")
    try:
        return load()
    # TypeError: a private key under a password.
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Without a cause: the library's messages may quote what they could not parse.
        raise _refusal(where, half, "it is no PEM of one, or is under a password") from None


def _check_bits(key: _PublicKey, where: str, half: str) -> None:
    if isinstance(key, rsa.RSAPublicKey) and not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        raise _refusal(where, half, f"it has {key.key_size} bits, and {MIN_RSA_BITS} to {MAX_RSA_BITS} are taken")


def _recipient(key: _PublicKey) -> Recipient:
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    wrapping: Wrapping = "hpke-x25519" if isinstance(key, x25519.X25519PublicKey) else "rsa-oaep-sha256"
    return Recipient(hashlib.sha256(der).hexdigest()[:32], wrapping, key)


def _refusal(where: str, half: str, reason: str) -> SettingsError:
    return SettingsError(f"{where} is no {half} key of X25519 or RSA: {reason}", variable=SECRET, hint=_ADVICE)
