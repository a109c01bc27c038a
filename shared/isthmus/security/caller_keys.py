"""API keys of callers, from the secret `callers`: a line of JSON each, with the digest of the key and never the key.

A key is 32 random bytes, so that a plain SHA-256 suffices where a password would need a slow hash.
Source: docs/how-to/callers.md.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from isthmus.artifacts.constraints import Digest, matching
from isthmus.errors import SettingsError
from isthmus.files import file_stamp
from isthmus.security.callers import ALL_MODELS, Caller, CallerLimits, Role
from isthmus.settings import read_secret_file

SECRET = "callers"  # noqa: S105
# Recognised by scanners of repositories for secrets.
KEY_PREFIX = "isthmus_"
_KEY_BYTES = 32
MAX_CALLERS = 256
NAME = r"[A-Za-z0-9._@-]{1,64}"
_MODEL = re.compile(r"\*|[a-z0-9._-]{1,63}")
# A changed secret is read within this time: Kubernetes writes secrets into running pods.
_LOOK_S = 5.0
_ADVICE = (
    "create a line: isthmus caller new NAME --role infer; then"
    f" faas-cli secret create {SECRET} --from-file=callers.jsonl"
)


class CallerEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A line of the secret. `roles` maps each role to its models; `*` is every model."""

    name: Annotated[str, matching(NAME)]
    key: Digest
    roles: dict[Role, Annotated[list[str], Meta(min_length=1, max_length=256)]]
    requests_per_s: Annotated[float, Meta(ge=0)] = 0.0
    bytes_per_s: Annotated[int, Meta(ge=0)] = 0
    burst_s: Annotated[float, Meta(gt=0, le=3600)] = 10.0

    def caller(self) -> Caller:
        """The caller of this line."""
        limits = CallerLimits(self.requests_per_s, self.bytes_per_s, self.burst_s)
        is_limited = bool(self.requests_per_s or self.bytes_per_s)
        models = {role: frozenset(names) for role, names in self.roles.items()}
        return Caller(self.name, self.name, models, limits if is_limited else None)


def new_key() -> str:
    """A random key."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def key_digest(key: str) -> str:
    """The stored digest of a key."""
    return f"sha256:{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()}"


class CallerKeys:
    """Callers by the digests of their keys.

    The index is keyed by an HMAC under a key of this process: how long a look-up takes tells nothing of a digest.
    """

    def __init__(self, entries: Mapping[str, Caller]) -> None:
        self._secret = secrets.token_bytes(32)
        self._callers = {self._index(digest): (digest, caller) for digest, caller in entries.items()}

    def __len__(self) -> int:
        return len(self._callers)

    def find(self, key: str) -> Caller | None:
        """The caller of a key; None for an unknown key."""
        digest = key_digest(key)
        known, caller = self._callers.get(self._index(digest), ("", None))
        return caller if hmac.compare_digest(known, digest) else None

    def _index(self, digest: str) -> bytes:
        return hmac.digest(self._secret, digest.encode(), "sha256")


def parse_caller_keys(lines: list[str], *, where: str) -> CallerKeys:
    """The callers of a secret's lines.

    Raises:
        SettingsError: a line is no entry, a name or key comes twice, or there are too many. Lines are counted, and
            never quoted: somebody may have put the key itself there.
    """
    callers: dict[str, Caller] = {}
    names = set[str]()
    for number, line in enumerate(lines, start=1):
        entry = _entry(line, number, where)
        if entry.key in callers or entry.name in names:
            raise _refusal(where, f"line {number} has a name or a key that an earlier line has")
        callers[entry.key] = entry.caller()
        names.add(entry.name)
    if len(callers) > MAX_CALLERS:
        raise _refusal(where, f"it has {len(callers)} callers; at most {MAX_CALLERS} are taken")
    return CallerKeys(callers)


def _entry(line: str, number: int, where: str) -> CallerEntry:
    try:
        entry = msgspec.json.decode(line, type=CallerEntry)
    except (ValueError, RecursionError) as e:
        # msgspec names the field at fault and quotes no value, but unknown fields and roles: of these only the place.
        reason = str(e).partition(" - at ")[2] or "the line"
        raise _refusal(where, f"line {number} is no entry: see {reason[:60]}") from None
    if wrong := [name for names in entry.roles.values() for name in names if not _MODEL.fullmatch(name)]:
        raise _refusal(where, f"line {number} names {len(wrong)} models by no model's name; {ALL_MODELS} is all models")
    return entry


def _refusal(where: str, reason: str) -> SettingsError:
    return SettingsError(f"{where} is no list of callers: {reason}", variable=SECRET, hint=_ADVICE)


class CallerFile:
    """The callers of the secret in `folder`, read again where it changed; thread-safe.

    A secret that was there at the start and has gone since has no callers: its absence lets no caller in.
    `on_error` hears of a change that cannot be used; the callers from before it stay.
    """

    def __init__(
        self, folder: str, on_error: Callable[[SettingsError], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._on_error, self._clock = folder, on_error, clock
        self._lock = threading.Lock()
        self._stamp = self._state()
        self._keys = self._read()
        self._look_at = clock() + _LOOK_S

    @property
    def is_configured(self) -> bool:
        """Whether the secret was there at the start."""
        return self._keys is not None

    def find(self, key: str) -> Caller | None:
        """The caller of a key; None for an unknown key."""
        if self._keys is not None and self._clock() >= self._look_at:
            self._refresh()
        return None if self._keys is None else self._keys.find(key)

    def _refresh(self) -> None:
        with self._lock:
            if self._clock() < self._look_at:
                return
            self._look_at = self._clock() + _LOOK_S
            if (stamp := self._state()) == self._stamp:
                return
            self._stamp = stamp
            try:
                self._keys = self._read() or CallerKeys({})
            except SettingsError as e:
                self._on_error(e)

    def _state(self) -> tuple[int, int, int] | None:
        return file_stamp(Path(self._folder) / SECRET)

    def _read(self) -> CallerKeys | None:
        data = read_secret_file(self._folder, SECRET)
        if not data and self._state() is None:
            return None
        where = f"the secret {SECRET} in {self._folder}"
        if not data.isascii():
            raise _refusal(where, "it has characters beyond ASCII")
        lines = [line.strip() for line in data.decode("ascii").splitlines() if line.strip()]
        return parse_caller_keys(lines, where=where)
