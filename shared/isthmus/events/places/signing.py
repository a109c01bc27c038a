"""Signatures of callbacks by HMAC-SHA256, so that a receiver can tell ours from forgeries and replays.

Source: Standard Webhooks 1.0.0 (standardwebhooks.com), "Signature scheme": header names, the signed text, `v1,` before
the base64 of the digest, and secrets in base64 with the prefix `whsec_`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from isthmus.errors import SettingsError

_PREFIX = "whsec_"
# Bounds of the specification: shorter keys can be guessed, longer ones add nothing to SHA-256.
_MIN_KEY_BYTES, _MAX_KEY_BYTES = 24, 64
# During a rotation the old and the new key sign; more would only lengthen the header.
_MAX_KEYS = 4


def signing_keys(secret: str, name: str) -> tuple[bytes, ...]:
    """The keys in the text of a secret: one in base64, or several with spaces between them while keys are rotated.

    `name` is the secret's name in messages.

    Raises:
        SettingsError: not base64, too short, too long, or too many keys. The message never holds the secret.
    """
    texts = secret.split()
    if not 1 <= len(texts) <= _MAX_KEYS:
        raise _refused(name, f"it holds {len(texts)} keys; 1 to {_MAX_KEYS} are taken")
    return tuple(_key(text, name) for text in texts)


def sign(keys: Sequence[bytes], message_id: str, body: bytes, timestamp: float) -> dict[str, str]:
    """The headers webhook-id, webhook-timestamp and webhook-signature, with a signature for each key.

    Every attempt is signed with the time of the attempt: receivers refuse timestamps that are minutes old. `message_id`
    is the same for every attempt, and is what receivers recognise a repetition by. Units: seconds since the epoch.
    """
    seconds = str(int(timestamp))
    if "." in message_id:  # full stops join the parts: the same bytes could mean another id
        message_id = f"sha256-{hashlib.sha256(message_id.encode()).hexdigest()}"
    content = b".".join((message_id.encode(), seconds.encode(), body))
    digests = (hmac.new(key, content, hashlib.sha256).digest() for key in keys)
    signatures = (f"v1,{base64.b64encode(digest).decode()}" for digest in digests)
    return {"webhook-id": message_id, "webhook-timestamp": seconds, "webhook-signature": " ".join(signatures)}


def _key(text: str, name: str) -> bytes:
    try:
        key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise _refused(name, "it is not base64") from None  # the cause would show the secret
    if not _MIN_KEY_BYTES <= len(key) <= _MAX_KEY_BYTES:
        raise _refused(name, f"a key has {len(key)} bytes; {_MIN_KEY_BYTES} to {_MAX_KEY_BYTES} are taken")
    return key


def _refused(name: str, reason: str) -> SettingsError:
    return SettingsError(
        f"the secret {name} cannot sign callbacks: {reason}",
        variable=name,
        hint='make one with: printf "whsec_%s" "$(openssl rand -base64 32)"',
    )
