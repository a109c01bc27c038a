"""The public keys of a tokens' issuer: a JSON web key set from a file or URL, in a cache that outlives short outages.

Source: RFC 7517. Only public keys of RSA, P-256 and Ed25519 are taken: with a symmetric key in the set, whoever can
read the set could sign.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey, RSAKey

from isthmus.context import Deadline
from isthmus.errors import IssuerUnavailable, SettingsError
from isthmus.http.addresses import is_near
from isthmus.http.pool import BrokenOff, ConnectionPool, ResponseTooLong, Unreachable, is_url

MAX_SET_BYTES = 256 * 2**10
MAX_KEYS = 64
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
# A key set is fetched within requests, so that requests wait for the fetch.
FETCH_S = 5.0
# Between fetches for unknown key ids: callers choose the ids of their tokens.
MIN_AGE_S = 10.0
_CURVES = {"ES256": "P-256", "EdDSA": "Ed25519"}
PublicKey = RSAKey | ECKey | OKPKey


class KeySetSource(Protocol):
    """Reads the key set anew."""

    def __call__(self) -> bytes:
        """The document.

        Raises:
            IssuerUnavailable: it is not there, too long, or does not come in time.
        """
        ...


class IssuerKeys:
    """The keys by algorithm and id; thread-safe.

    A set older than `refresh_s` is read again; while that fails, the old set is used up to `max_age_s`. A single
    request reads; the rest take the set that is there, and wait for the read where that lacks their key.
    """

    def __init__(
        self,
        source: KeySetSource,
        *,
        refresh_s: float,
        max_age_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source, self._clock = source, clock
        self._refresh_s, self._max_age_s = refresh_s, max(max_age_s, refresh_s)
        self._keys: Mapping[tuple[str, str], PublicKey] = {}
        self._read_at: float | None = None
        self._tried_at: float | None = None
        self._error: IssuerUnavailable | None = None
        self._lock = threading.Lock()

    def find(self, algorithm: str, key_id: str) -> PublicKey | None:
        """The key for tokens of that algorithm and key id, or the set's only key for it where the token names no id.

        Raises:
            IssuerUnavailable: no set was ever read, or the last one is older than `max_age_s`.
        """
        if self._age() >= self._refresh_s:
            self._refresh(wait=self._read_at is None)
        key = self._look_up(algorithm, key_id)
        if key is None and self._age() >= MIN_AGE_S:
            self._refresh(wait=True)
            key = self._look_up(algorithm, key_id)
        if self._age() > self._max_age_s:
            raise self._unavailable()
        return key

    def _age(self) -> float:
        return float("inf") if self._read_at is None else self._clock() - self._read_at

    def _look_up(self, algorithm: str, key_id: str) -> PublicKey | None:
        keys = self._keys
        if key_id:
            return keys.get((algorithm, key_id))
        of_algorithm = [key for (name, _), key in keys.items() if name == algorithm]
        return of_algorithm[0] if len(of_algorithm) == 1 else None

    def _refresh(self, *, wait: bool) -> None:
        if not self._lock.acquire(timeout=FETCH_S if wait else 0):
            return
        try:
            now = self._clock()
            # Of several that waited for the lock the first has read; and a failure is not repeated at once.
            if self._tried_at is not None and now - self._tried_at < MIN_AGE_S:
                return
            self._tried_at = now
            try:
                self._keys = parse_key_set(self._source())
            except IssuerUnavailable as e:
                self._error = e
            else:
                self._read_at, self._error = now, None
        finally:
            self._lock.release()

    def _unavailable(self) -> IssuerUnavailable:
        reason = "it has not been read yet" if self._error is None else self._error.message
        state = "" if self._read_at is None else f"the key set of the tokens' issuer is {self._age():.0f} s old, and "
        return IssuerUnavailable(f"{state}{reason}", hint="see the settings jwt_keys and jwt_keys_max_age_s")


def parse_key_set(data: bytes) -> dict[tuple[str, str], PublicKey]:
    """The usable public keys of a key set, by algorithm and id; keys of other kinds are left out.

    Raises:
        IssuerUnavailable: no key set, one with more than MAX_KEYS keys, or without a usable key.
    """
    try:
        documents = json.loads(data)["keys"]
        if not isinstance(documents, list) or len(documents) > MAX_KEYS:
            raise ValueError("no list of keys, or too long a one")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise IssuerUnavailable("the key set of the tokens' issuer is no JSON web key set") from None
    keys: dict[tuple[str, str], PublicKey] = {}
    for document in documents:
        if (known := _public_key(document)) is not None:
            algorithm, key = known
            keys.setdefault((algorithm, str(document.get("kid", ""))[:256]), key)
    if not keys:
        raise IssuerUnavailable("the key set of the tokens' issuer has no key for RS256, ES256 or EdDSA")
    return keys


def _public_key(document: Any) -> tuple[str, PublicKey] | None:
    """A key and its algorithm; None for any other key."""
    if not isinstance(document, dict) or document.get("use", "sig") != "sig":
        return None
    kind, curve = document.get("kty"), document.get("crv")
    algorithm = "RS256" if kind == "RSA" else next((a for a, c in _CURVES.items() if c == curve), "")
    if not algorithm or document.get("alg", algorithm) not in (algorithm, curve):
        return None
    # Of a private key, misplaced in a key set, the public part alone.
    public = {name: document[name] for name in ("kty", "crv", "x", "y", "n", "e") if name in document}
    try:
        if kind == "RSA":
            rsa = RSAKey.import_key(public)
            return ("RS256", rsa) if MIN_RSA_BITS <= rsa.public_key.key_size <= MAX_RSA_BITS else None
        if kind == "EC":
            return ("ES256", ECKey.import_key(public)) if algorithm == "ES256" else None
        return ("EdDSA", OKPKey.import_key(public)) if kind == "OKP" and algorithm == "EdDSA" else None
    except (JoseError, ValueError, TypeError, KeyError):
        return None


def key_set_source(address: str) -> KeySetSource:
    """The reader of the key set at the URL or path `address`.

    Raises:
        SettingsError: a URL of http:// whose host is beyond this machine and cluster: whoever is on the way could put
            in keys of his own.
    """
    if "://" not in address:
        return _FileSource(Path(address))
    parts = urlsplit(address)
    if not is_url(address) or not (parts.scheme == "https" or is_near(parts.hostname or "")) or parts.username:
        raise SettingsError(
            f"the setting jwt_keys is {address[:200]!r}; it is a file's path or a URL of https://; http:// leads only"
            " to this machine or to a name within the cluster",
            variable="jwt_keys",
        )
    return _UrlSource(address)


class _FileSource:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self) -> bytes:
        try:
            with self._path.open("rb") as f:
                data = f.read(MAX_SET_BYTES + 1)
        except OSError as e:
            raise IssuerUnavailable(f"the key set {self._path} cannot be read: {e.strerror}") from e
        if len(data) > MAX_SET_BYTES:
            raise IssuerUnavailable(f"the key set {self._path} has more than {MAX_SET_BYTES} bytes")
        return data


class _UrlSource:
    def __init__(self, url: str) -> None:
        self._url, self._base = url, url.partition("?")[0]

    def __call__(self) -> bytes:
        pool = ConnectionPool(self._url, connect_timeout_s=FETCH_S)
        try:
            response = pool.post(
                (),
                {"Accept": "application/jwk-set+json, application/json"},
                Deadline.after(FETCH_S),
                max_bytes=MAX_SET_BYTES,
                max_error_bytes=MAX_SET_BYTES,
                method="GET",
            )
        except TimeoutError as e:
            raise IssuerUnavailable(f"{self._base} did not give the key set within {FETCH_S:g} s") from e
        except (Unreachable, BrokenOff) as e:
            raise IssuerUnavailable(f"{self._base} cannot be reached for the key set: {e}") from e
        except ResponseTooLong as e:
            raise IssuerUnavailable(f"the key set at {self._base} has more than {MAX_SET_BYTES} bytes") from e
        finally:
            pool.close()
        if response.status != 200:
            raise IssuerUnavailable(f"{self._base} answered {response.status} where the key set should be")
        return bytes(response.body)
