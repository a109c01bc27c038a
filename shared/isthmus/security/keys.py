"""The keys that functions share for their calls, from the secret `hop-keys`."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass

from isthmus.errors import SettingsError
from isthmus.settings import read_secret

SECRET = "hop-keys"  # noqa: S105
MIN_KEY_BYTES, MAX_KEY_BYTES, MAX_KEYS = 32, 64, 16
_ID = re.compile(r"[A-Za-z0-9._-]{1,32}")
_FORM = "ID:KEY, or several with commas between; KEY is 32 to 64 random bytes in base64"
_ADVICE = f"create it: faas-cli secret create {SECRET} --from-literal=k1:$(openssl rand -base64 32)"


@dataclass(frozen=True)
class HopKeys:
    """Keys by id. Calls are protected with the first, and taken under any: so that keys can be replaced one by one."""

    by_id: Mapping[str, bytes]

    @property
    def first(self) -> str:
        """The id of the key for own calls."""
        return next(iter(self.by_id))

    def __repr__(self) -> str:
        """The ids alone: a key must not get into a log."""
        return f"HopKeys({', '.join(self.by_id)})"


def read_hop_keys(folder: str) -> HopKeys | None:
    """The keys in the folder of secrets; None without the secret.

    Raises:
        SettingsError: the secret cannot be read, or is no list of keys. The message never holds the secret.
    """
    text = read_secret(folder, SECRET)
    return parse_hop_keys(text, where=f"the secret {SECRET} in {folder}") if text else None


def parse_hop_keys(text: str, *, where: str) -> HopKeys:
    """The keys of `text`.

    Raises:
        SettingsError: not of that form, an id twice, a key too short, or too many.
    """
    keys: dict[str, bytes] = {}
    for number, entry in enumerate(text.split(","), start=1):
        name, _, encoded = entry.partition(":")
        if not _ID.fullmatch(name) or name in keys:
            raise _refusal(
                where, f"entry {number} has no id of 1 to 32 letters, digits, '.', '_' and '-', or one twice"
            )
        try:
            keys[name] = base64.b64decode(encoded, altchars=None, validate=True)
        except (binascii.Error, ValueError):
            raise _refusal(where, f"the key of entry {number} is no base64") from None
        if not MIN_KEY_BYTES <= len(keys[name]) <= MAX_KEY_BYTES:
            raise _refusal(where, f"the key of entry {number} has {len(keys[name])} bytes")
    if len(keys) > MAX_KEYS:
        raise _refusal(where, f"it holds {len(keys)} keys; at most {MAX_KEYS} are taken")
    return HopKeys(keys)


def _refusal(where: str, reason: str) -> SettingsError:
    return SettingsError(f"{where} is no list of keys: {reason}. Its form is {_FORM}", variable=SECRET, hint=_ADVICE)
