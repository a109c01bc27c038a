"""Ed25519 keys by id: private keys in PEM files of mode 0600, public keys as PEM. Source: RFC 8032, RFC 8410."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from isthmus.errors import RequestMalformed

# A PEM file of one key has 120 bytes; a larger file is another file.
_MAX_KEY_FILE_BYTES = 16 * 2**10
_PUBLIC_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True)
class PublicKey:
    """The public half of a signing key."""

    key: Ed25519PublicKey

    @cached_property
    def id(self) -> str:
        """SHA-256 of the key's DER form in hex, as `openssl pkey -pubin -outform DER | sha256sum` prints."""
        return sha256(self.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the signature over `message` is by this key."""
        try:
            self.key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def pem(self) -> str:
        """The key as PEM."""
        return self.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


@dataclass(frozen=True, repr=False)
class SigningKey:
    """A private key; its `repr` holds nothing of it."""

    key: Ed25519PrivateKey

    @cached_property
    def public(self) -> PublicKey:
        """The public half."""
        return PublicKey(self.key.public_key())

    @property
    def id(self) -> str:
        """The id of the public key."""
        return self.public.id

    def sign(self, message: bytes) -> bytes:
        """The signature over `message`."""
        return self.key.sign(message)


def new_signing_key(path: Path) -> SigningKey:
    """Create a private key in a new file that its owner alone may read.

    Raises:
        RequestMalformed: the file is there already, or cannot be created.
    """
    key = SigningKey(Ed25519PrivateKey.generate())
    write_private_key(path, key.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def write_private_key(path: Path, data: bytes) -> None:
    """Write a private key to a new file that its owner alone may read.

    Raises:
        RequestMalformed: the file is there already, or cannot be created.
    """
    try:
        # O_EXCL: a key that is lost to a second one cannot be had again.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
            f.write(data)
    except OSError as e:
        raise RequestMalformed(f"no key can be written to {path}: {e.strerror}", path=str(path)) from e


def read_signing_key(path: Path) -> SigningKey:
    """The private key in a PEM file.

    Raises:
        RequestMalformed: the file cannot be read or holds no Ed25519 private key; the message holds nothing of it.
    """
    try:
        with path.open("rb") as f:
            key = load_pem_private_key(f.read(_MAX_KEY_FILE_BYTES), password=None)
    except OSError as e:
        raise RequestMalformed(f"the signing key {path} cannot be read: {e.strerror}", path=str(path)) from e
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # TypeError: the key is encrypted. `from None`: an error of a parser may quote what it parsed.
        raise _no_private_key(path) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_private_key(path)
    return SigningKey(key)


def parse_public_keys(pem: bytes) -> list[PublicKey]:
    """The Ed25519 public keys of a PEM text, in order.

    Raises:
        ValueError: a key is of another kind or malformed, or there is none.
    """
    keys = []
    for block in _PUBLIC_PEM.findall(pem):
        try:
            key = load_pem_public_key(block)
        except UnsupportedAlgorithm as e:
            raise ValueError(f"a key of an unknown kind: {e}") from None
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError(f"a key of another kind than Ed25519: {type(key).__name__}")
        keys.append(PublicKey(key))
    if not keys:
        raise ValueError("no PEM of a public key")
    return keys


def _no_private_key(path: Path) -> RequestMalformed:
    return RequestMalformed(
        f"{path} holds no Ed25519 private key as unencrypted PEM",
        path=str(path),
        hint="create one: isthmus key new FILE",
    )
