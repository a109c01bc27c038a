"""Signed calls: HMAC-SHA256 over method, path, content type, time, number used once, and the body's digest.

The form is that of HTTP Message Signatures (RFC 9421) with Content-Digest (RFC 9530), by http-message-signatures. The
reply's signature covers its status and body, and the signature of its call. Bodies can be read on the way: for hops
without TLS there are sealed calls.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from http_message_signatures import (
    HTTPMessageSigner,
    HTTPMessageVerifier,
    HTTPSignatureKeyResolver,
    InvalidSignature,
    algorithms,
)
from http_message_signatures.exceptions import HTTPMessageSignaturesException

from isthmus.errors import CallerUnknown
from isthmus.security.keys import HopKeys
from isthmus.security.protected_call import Buffer, CallFacts
from isthmus.security.replays import NonceSet
from isthmus.security.sealing import check_time

HEADERS = ("Signature", "Signature-Input", "Content-Digest")
# The library wants a whole URL, and a function behind a gateway does not know its own.
_ORIGIN = "http://function"
_OF_CALL = ("@method", "@path", "content-type", "content-digest")
_OF_REPLY = ("@status", "content-digest", '"signature";req')
_CALL_TAG, _REPLY_TAG = "isthmus-call", "isthmus-reply"
_NONCE_BYTES = 16
# Times are compared here, so that an error can name the difference.
_ANY_TIME = timedelta(days=36_500)


@dataclass
class SignedCall:
    """A call as the library sees it."""

    method: str
    url: str
    headers: MutableMapping[str, str]


@dataclass
class SignedReply:
    """A reply as the library sees it."""

    status_code: int
    headers: MutableMapping[str, str]
    request: SignedCall


class _Secrets(HTTPSignatureKeyResolver):
    """The library's look-up of keys."""

    def __init__(self, keys: HopKeys) -> None:
        self._keys = keys

    def resolve_private_key(self, key_id: str) -> bytes:
        return self._keys.by_id[key_id]

    def resolve_public_key(self, key_id: str) -> bytes | None:
        return self._keys.by_id.get(key_id)


class CallSigner:
    """Signs calls and replies with the first key, and verifies both under any; thread-safe.

    Units: a call's time differs from this clock's by at most `skew_s` seconds.
    """

    def __init__(self, keys: HopKeys, *, skew_s: float, clock: Callable[[], float] = time.time) -> None:
        self._keys, self._skew_s, self._clock = keys, skew_s, clock
        self._nonces = NonceSet(2 * skew_s)

    def sign_call(self, body: Sequence[Buffer], facts: CallFacts) -> SignedCall:
        """The call with its signature among the headers."""
        call = SignedCall(facts.method, _ORIGIN + facts.path, {"Content-Type": facts.content_type})
        self._sign(call, _CALL_TAG, _OF_CALL, b"".join(body))
        return call

    def verify_call(self, headers: Mapping[str, str], body: Buffer, facts: CallFacts) -> SignedCall:
        """The verified call.

        Raises:
            CallerUnknown: not signed, under no known key, altered, sent at another time, or sent before.
        """
        call = SignedCall(facts.method, _ORIGIN + facts.path, _signed(headers, facts.content_type))
        parameters = self._verified(call, _CALL_TAG, _OF_CALL, body)
        check_time(float(parameters["created"]), self._clock(), self._skew_s)
        if not self._nonces.take(parameters.get("nonce")):
            raise CallerUnknown("the call came before", reason="replayed")
        return call

    def sign_reply(self, call: SignedCall, status: int, body: Buffer) -> Mapping[str, str]:
        """The headers of a reply's signature."""
        reply = SignedReply(status, {}, call)
        self._sign(reply, _REPLY_TAG, _OF_REPLY, body)
        return reply.headers

    def verify_reply(self, call: SignedCall, status: int, headers: Mapping[str, str], body: Buffer) -> None:
        """Refuse a reply that is not the call's.

        Raises:
            CallerUnknown: not signed, or not the reply of this call.
        """
        self._verified(SignedReply(status, _signed(headers), call), _REPLY_TAG, _OF_REPLY, body)

    def _sign(self, message: SignedCall | SignedReply, tag: str, components: Sequence[str], body: Buffer) -> None:
        signer = HTTPMessageSigner(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=_Secrets(self._keys))
        signer.sign(
            message,
            key_id=self._keys.first,
            nonce=secrets.token_hex(_NONCE_BYTES),
            label="isthmus",
            tag=tag,
            covered_component_ids=components,
            body=bytes(body),
        )

    def _verified(
        self, message: SignedCall | SignedReply, tag: str, components: Sequence[str], body: Buffer
    ) -> Mapping[str, str | int]:
        if "Signature" not in message.headers:
            raise CallerUnknown(
                "the call is not signed" if tag == _CALL_TAG else "the reply is not signed",
                reason="not_signed",
                hint="both functions need the secret hop-keys",
            )
        verifier = HTTPMessageVerifier(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=_Secrets(self._keys))
        verifier.max_clock_skew = _ANY_TIME
        try:
            (result,) = verifier.verify(
                message, max_age=None, expect_tag=tag, require_components=components, body=bytes(body)
            )
        except (InvalidSignature, HTTPMessageSignaturesException, ValueError) as e:
            # The library's reason names parts of the message, and no key.
            raise CallerUnknown(f"the signature does not fit: {str(e)[:200]}", reason="altered") from None
        return result.parameters


def _signed(headers: Mapping[str, str], content_type: str | None = None) -> dict[str, str]:
    """The headers that a signature is made of; others are not looked at."""
    lower = {name.lower(): value for name, value in headers.items()}
    found = {name: lower[name.lower()] for name in HEADERS if name.lower() in lower}
    return found if content_type is None else {**found, "Content-Type": content_type}
