"""Protection of the calls between router and segment functions: sealed or signed, as the setting hop_security says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isthmus.security.keys import HopKeys
from isthmus.security.protected_call import SEALED_TYPE, Buffer, CallFacts, SentCall, TakenCall
from isthmus.security.sealing import CallOpener, CallSealer, ReplyKey
from isthmus.security.signing import CallSigner, SignedCall


class HopProtection:
    """Protects own calls, and takes the calls of others; thread-safe.

    A function that seals takes sealed calls alone; one that signs takes both.
    """

    def __init__(self, keys: HopKeys, *, seals: bool, skew_s: float) -> None:
        self._seals = seals
        self._sealer, self._opener = CallSealer(keys), CallOpener(keys, skew_s=skew_s)
        self._signer = CallSigner(keys, skew_s=skew_s)

    def protect(self, body: Sequence[Buffer], facts: CallFacts) -> SentCall:
        """A call to another function."""
        return _SealedOut(self._sealer, body, facts) if self._seals else _SignedOut(self._signer, body, facts)

    def take(self, headers: Mapping[str, str], body: bytes | memoryview, facts: CallFacts) -> TakenCall:
        """A call of another function.

        Raises:
            CallerUnknown: not protected as this function demands, or not by a key that it knows.
        """
        if self._seals or facts.content_type == SEALED_TYPE:
            opened, reply = self._opener.open(body, facts)
            return _SealedIn(opened, reply)
        return _SignedIn(self._signer, self._signer.verify_call(headers, body, facts), body)


class _SealedOut:
    def __init__(self, sealer: CallSealer, body: Sequence[Buffer], facts: CallFacts) -> None:
        # Of the content type only that it is sealed is seen on the way.
        self.body, self._reply = sealer.seal(body, CallFacts(facts.method, facts.path, SEALED_TYPE))
        self.headers = {"Content-Type": SEALED_TYPE}

    def open_reply(self, status: int, headers: Mapping[str, str], body: bytes | bytearray) -> bytes | bytearray:
        return self._reply.open(body)


class _SealedIn:
    def __init__(self, body: bytes, reply: ReplyKey) -> None:
        self.body, self._reply = body, reply

    def protect_reply(self, status: int, body: bytes) -> tuple[list[bytes], Mapping[str, str]]:
        return self._reply.seal(body), {"Content-Type": SEALED_TYPE}


class _SignedOut:
    def __init__(self, signer: CallSigner, body: Sequence[Buffer], facts: CallFacts) -> None:
        self._signer, self._call = signer, signer.sign_call(body, facts)
        self.body, self.headers = body, self._call.headers

    def open_reply(self, status: int, headers: Mapping[str, str], body: bytes | bytearray) -> bytes | bytearray:
        self._signer.verify_reply(self._call, status, headers, body)
        return body


class _SignedIn:
    def __init__(self, signer: CallSigner, call: SignedCall, body: bytes | memoryview) -> None:
        self._signer, self._call, self.body = signer, call, body

    def protect_reply(self, status: int, body: bytes) -> tuple[list[bytes], Mapping[str, str]]:
        return [body], self._signer.sign_reply(self._call, status, body)
