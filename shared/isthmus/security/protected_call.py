"""Protected calls between router and segment functions, as hops and functions see them.

What protects a call, and the library behind it, is loaded where the secret `hop-keys` is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from isthmus.errors import CallerUnknown
from isthmus.security.keys import read_hop_keys
from isthmus.settings import SegmentSettings

SEALED_TYPE = "application/vnd.isthmus.sealed"
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class CallFacts:
    """What of a call is authenticated beside its body. `path` is below the function's URL, as the function sees it."""

    method: str
    path: str
    content_type: str

    def encoded(self) -> bytes:
        """As bytes; no two calls have the same."""
        return b"\0".join(part.encode() for part in (self.method, self.path, self.content_type))


class SentCall(Protocol):
    """A protected call: what is sent, and how its reply is taken."""

    @property
    def body(self) -> Sequence[Buffer]:
        """The body as sent, in parts."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the body and of its protection."""
        ...

    def open_reply(self, status: int, headers: Mapping[str, str], body: bytes | bytearray) -> bytes | bytearray:
        """The reply's body.

        Raises:
            CallerUnknown: the reply is not protected, not this call's, or was altered.
        """
        ...


class TakenCall(Protocol):
    """An authenticated call: its body, and how its reply is protected."""

    @property
    def body(self) -> bytes | memoryview:
        """The body as its sender had it."""
        ...

    def protect_reply(self, status: int, body: bytes) -> tuple[list[bytes], Mapping[str, str]]:
        """The reply's body as sent, in parts, and further headers."""
        ...


class CallProtection(Protocol):
    """Protects own calls, and takes the calls of others; thread-safe. It is `hop_protection.HopProtection`."""

    def protect(self, body: Sequence[Buffer], facts: CallFacts) -> SentCall:
        """A call to another function."""
        ...

    def take(self, headers: Mapping[str, str], body: bytes | memoryview, facts: CallFacts) -> TakenCall:
        """A call of another function.

        Raises:
            CallerUnknown: not protected as this function demands, or not by a key that it knows.
        """
        ...


def open_protection(settings: SegmentSettings) -> CallProtection | None:
    """The protection that the settings and the secret `hop-keys` demand; None without the secret.

    Raises:
        SettingsError: the secret cannot be used.
    """
    if (keys := read_hop_keys(settings.secrets_dir)) is None:
        return None
    from isthmus.security.hop_protection import HopProtection  # cryptography takes 15 MB

    return HopProtection(keys, seals=settings.hop_security == "sealed", skew_s=settings.hop_clock_skew_s)


def refuse_sealed(content_type: str) -> None:
    """Refuse a sealed call to a function without keys.

    Raises:
        CallerUnknown: with what to do.
    """
    if content_type == SEALED_TYPE:
        raise CallerUnknown(
            "the call is sealed, and this function has no keys",
            reason="key",
            hint="give this function the secret hop-keys, as its caller has",
        )
