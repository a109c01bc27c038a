"""Sealed calls: body and reply encrypted and authenticated between two functions that share a key.

A sender is a process: it draws a random id, derives keys of its own (HKDF-SHA256), and counts its calls, so that no
nonce comes twice. The call's method, path, content type and time are authenticated with it; its reply is bound to the
call. AES-256-GCM, or ChaCha20-Poly1305 where a processor has no instructions for AES: the sender measures.
Sources: NIST SP 800-38D; RFC 8439; RFC 5869. Layout: docs/reference/sealing.md.
"""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from isthmus.errors import CallerUnknown
from isthmus.security.keys import HopKeys
from isthmus.security.protected_call import Buffer, CallFacts
from isthmus.security.replays import CounterWindow

CALL, REPLY = b"ISTHSEA\x01", b"ISTHSEA\x02"
_SENDER_BYTES, _NONCE_BYTES, _TAG_BYTES = 16, 12, 16
# Cipher, length of the key's id; sender, counter, milliseconds since 1970.
_HEAD, _CALL = struct.Struct(">BB"), struct.Struct(f">{_SENDER_BYTES}sQQ")
_Cipher = AESGCM | ChaCha20Poly1305
_CIPHERS: dict[int, type[AESGCM] | type[ChaCha20Poly1305]] = {1: AESGCM, 2: ChaCha20Poly1305}
# As large as a frame of activations; the measurement takes half a millisecond.
_TRIED_BYTES, _TRIES = 2**16, 3
# The derived keys of senders; deriving one takes 10 microseconds.
_MAX_DERIVED = 1024

Clock = Callable[[], float]


@dataclass(frozen=True)
class ReplyKey:
    """The cipher for the reply of one call."""

    cipher: _Cipher
    call: bytes

    def seal(self, body: Buffer) -> list[bytes]:
        """The reply's body, sealed, in parts: a copy of a megabyte takes longer than its encryption."""
        nonce = os.urandom(_NONCE_BYTES)
        return [REPLY + nonce, self.cipher.encrypt(nonce, body, self.call)]

    def open(self, data: Buffer) -> bytes:
        """The body of a sealed reply.

        Raises:
            CallerUnknown: not sealed, or not the reply of this call.
        """
        view, start = memoryview(data), len(REPLY) + _NONCE_BYTES
        if view[: len(REPLY)] != REPLY:
            raise CallerUnknown("the reply is not sealed", reason="not_sealed")
        try:
            return self.cipher.decrypt(bytes(view[len(REPLY) : start]), view[start:], self.call)
        except InvalidTag:
            raise CallerUnknown("the reply is not the one of this call, or was altered", reason="altered") from None


class CallSealer:
    """Seals the calls of this process with the first key; thread-safe."""

    def __init__(self, keys: HopKeys, clock: Clock = time.time) -> None:
        self._id, self._clock = keys.first, clock
        self._sender, self._counter = os.urandom(_SENDER_BYTES), itertools.count()
        self._cipher = fastest_cipher()
        self._calls = _derived(keys.by_id[self._id], self._sender, "call", self._cipher)
        self._replies = _derived(keys.by_id[self._id], self._sender, "reply", self._cipher)

    def seal(self, body: Sequence[Buffer], facts: CallFacts) -> tuple[list[bytes], ReplyKey]:
        """The call's body, sealed, in parts, and the key of its reply."""
        counter = next(self._counter)
        name = self._id.encode()
        head = CALL + _HEAD.pack(self._cipher, len(name)) + name
        head += _CALL.pack(self._sender, counter, round(self._clock() * 1000))
        plain = body[0] if len(body) == 1 else b"".join(body)
        sealed = self._calls.encrypt(_nonce(counter), plain, head + facts.encoded())
        return [head, sealed], ReplyKey(self._replies, head)


class CallOpener:
    """Opens sealed calls; thread-safe. Units: a call's time differs from this clock's by at most `skew_s` seconds."""

    def __init__(self, keys: HopKeys, *, skew_s: float, clock: Clock = time.time) -> None:
        self._keys, self._skew_s, self._clock = keys, skew_s, clock
        self._window = CounterWindow()
        self._derived = lru_cache(_MAX_DERIVED)(_derived)

    def open(self, data: Buffer, facts: CallFacts) -> tuple[bytes, ReplyKey]:
        """The body of a sealed call, and the key of its reply.

        Raises:
            CallerUnknown: not sealed, under no known key, altered, sent at another time, or sent before.
        """
        view = memoryview(data)
        number, name, sender, counter, sent_ms, size = _read_head(view)
        if (secret := self._keys.by_id.get(name)) is None:
            raise CallerUnknown(
                "the call is sealed with a key that is not known here",
                reason="key",
                hint="both functions need a key of one id in their secret hop-keys",
            )
        head = bytes(view[:size])
        cipher = self._derived(secret, sender, "call", number)
        try:
            body = cipher.decrypt(_nonce(counter), view[size:], head + facts.encoded())
        except InvalidTag:
            raise CallerUnknown(
                "the call was altered, or sealed with another key of that id", reason="altered"
            ) from None
        check_time(sent_ms / 1000, self._clock(), self._skew_s)
        if not self._window.take((name, sender), counter):
            raise CallerUnknown("the call came before", reason="replayed")
        return body, ReplyKey(self._derived(secret, sender, "reply", number), head)


def check_time(sent_s: float, now_s: float, skew_s: float) -> None:
    """Refuse a call of another time.

    Raises:
        CallerUnknown: names the difference, as of a clock that is wrong.
    """
    if abs(off_s := now_s - sent_s) > skew_s:
        raise CallerUnknown(
            f"the call's time is {abs(off_s):.0f} s {'before' if off_s > 0 else 'after'} the clock here; at most"
            f" {skew_s:g} s are taken",
            reason="time",
            off_s=round(off_s, 3),
            hint="set both clocks, by NTP; a difference of seconds may be a call sent again",
        )


@lru_cache(1)
def fastest_cipher() -> int:
    """The number of the cipher that this processor is faster with."""
    data, times = bytes(_TRIED_BYTES), {}
    for number, cipher in _CIPHERS.items():
        made = cipher(os.urandom(32))
        times[number] = min(_seconds(made, data) for _ in range(_TRIES))
    return min(times, key=times.__getitem__)


def _seconds(cipher: _Cipher, data: bytes) -> float:
    began = time.perf_counter()
    cipher.encrypt(bytes(_NONCE_BYTES), data, None)
    return time.perf_counter() - began


def _derived(secret: bytes, sender: bytes, use: str, number: int) -> _Cipher:
    info = f"isthmus hop {use} {number}".encode()
    return _CIPHERS[number](HKDF(algorithm=SHA256(), length=32, salt=sender, info=info).derive(secret))


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(_NONCE_BYTES, "big")


def _read_head(view: memoryview) -> tuple[int, str, bytes, int, int, int]:
    """Cipher, key id, sender, counter, time and length of a sealed call's head."""
    fixed = len(CALL) + _HEAD.size
    if len(view) < fixed or view[: len(CALL)] != CALL:
        raise CallerUnknown(
            "the call is not sealed",
            reason="not_sealed",
            hint="this function takes sealed calls alone: give the caller the secret hop-keys",
        )
    number, length = _HEAD.unpack_from(view, len(CALL))
    if number not in _CIPHERS or len(view) < fixed + length + _CALL.size + _TAG_BYTES:
        raise CallerUnknown("the sealed call is cut short, or of a later version", reason="altered")
    name = bytes(view[fixed : fixed + length]).decode("latin-1")
    return number, name, *_CALL.unpack_from(view, fixed + length), fixed + length + _CALL.size
