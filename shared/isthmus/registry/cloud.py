"""A registry in Google Cloud Storage or Azure Blob Storage. The only module that imports obstore."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import AzureStore, GCSStore

from isthmus.errors import Missing, RegistryError, RegistryMissing, RegistryUnavailable, SettingsError
from isthmus.registry.addresses import Address
from isthmus.registry.blobs import (
    StoredKey,
    check_key,
    check_range,
    ended_early,
    probe_conditions,
    replace_retried,
    too_long,
)
from isthmus.registry.cloud_errors import CloudFacts, translated
from isthmus.registry.retry_policy import MAX_PARALLEL_REQUESTS, RetryPolicy
from isthmus.retries import RetryBudget

# The memory of an upload is this times MAX_PARALLEL_REQUESTS, and once more in the HTTP client.
_PART_BYTES = 8 * 2**20
_MAX_PARTS = 10_000
"""GCS's limit on the parts of one object; Azure allows 50,000."""
_CHUNK_BYTES = 2**18
_PAGE = 1000
_MIN_BYTES_PER_S = 64 * 2**10
"""A slower transfer counts as stalled."""
_Build = Callable[[float, int], Any]
"""From the seconds of one request, and the number of its retries, to a client."""


class CloudStore:
    """Keys are objects under the prefix of one bucket or container; see `gcs_store` and `azure_store`.

    The library makes one attempt; `RetryPolicy` repeats requests. The parts of an upload are the exception: the library
    sends them, and repeats each by itself within the policy's attempts and time.
    """

    def __init__(self, place: Address, build: _Build, facts: CloudFacts, tag: str, retry: RetryPolicy) -> None:
        self._prefix = f"{place.prefix}/" if place.prefix else ""
        self._facts, self._tag, self._retry = facts, tag, retry
        self._conditions_enforced = False
        self._client = lru_cache(maxsize=4)(build)
        # Builds a client now: wrong settings stop the start, and no request is sent.
        self._reader()

    @property
    def url(self) -> str:
        return self._facts.url

    def close(self) -> None:
        """Drop the clients, and idle connections with them."""
        self._client.cache_clear()

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self.get_tagged(key, max_bytes=max_bytes)[0]

    def get_tagged(self, key: str, *, max_bytes: int) -> tuple[bytes, str]:
        path = self._at(key)
        with self._errors(key):
            result = obstore.get(self._reader(), path)
            if result.meta["size"] > max_bytes:
                raise too_long(self.url, key, max_bytes)
            return self._body(key, result, result.meta["size"]), self._tag_of(result.meta)

    def read(self, key: str, start: int, stop: int) -> bytes:
        check_range(start, stop)
        path = self._at(key)
        if start == stop:
            return b""
        with self._errors(key):
            result = obstore.get(self._reader(), path, options={"range": (start, stop)})
            got = result.range[1] - result.range[0]
            if got != stop - start:
                raise ended_early(self.url, key, got, stop - start)
            return self._body(key, result, got)

    def size(self, key: str) -> int | None:
        path = self._at(key)
        try:
            with self._errors(key):
                return int(obstore.head(self._reader(), path)["size"])
        except RegistryMissing:
            raise
        except Missing:
            return None

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def put(self, key: str, data: bytes) -> None:
        self._put(key, data, "overwrite")

    def put_file(self, key: str, path: Path, budget: RetryBudget | None = None) -> None:
        size, at = path.stat().st_size, self._at(key)
        if size <= _PART_BYTES:
            data = path.read_bytes()
            self._retry(lambda: self.put(key, data), budget)
            return
        length = max(_PART_BYTES, -(-size // _MAX_PARTS))
        client = self._client(self._upload_s(length), max(0, self._retry.attempts - 1))
        with self._errors(key), path.open("rb") as f:
            # obstore removes the parts of a failed upload; Azure's service also does so after a week.
            obstore.put(client, at, f, chunk_size=length, max_concurrency=MAX_PARALLEL_REQUESTS, use_multipart=True)

    def put_if_absent(self, key: str, data: bytes, budget: RetryBudget | None = None) -> bool:
        return self.put_if_match(key, data, "", budget)

    def put_if_match(self, key: str, data: bytes, tag: str, budget: RetryBudget | None = None) -> bool:
        return replace_retried(self, self._retry, key, data, tag, budget)

    def require_conditions(self) -> None:
        # The services do; the endpoint of another server may not.
        if not self._conditions_enforced:
            probe_conditions(self, self._retry)
            self._conditions_enforced = True

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Store `data` where `key` has that tag, or, for an empty one, where it is absent; the new tag, else None.

        Source: If-Match and If-None-Match of Azure's Put Blob, x-goog-if-generation-match of GCS's XML API.
        """
        check_key(key)
        if self._tag == "version" and tag and not tag.isdigit():
            return None  # no generation: GCS would refuse the request instead of its condition
        try:
            return self._put(key, data, {self._tag: tag} if tag else "create")
        except (AlreadyExistsError, PreconditionError):
            return None
        except RegistryMissing:
            raise
        except Missing:  # a condition on a key that is gone
            return None

    def delete(self, key: str) -> None:
        path = self._at(key)
        try:
            with self._errors(key):
                obstore.delete(self._reader(), path)
        except RegistryMissing:
            raise
        except Missing:
            return

    def list(self, prefix: str) -> builtins.list[str]:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> builtins.list[StoredKey]:
        if prefix:
            check_key(prefix.removesuffix("/"))
        budget, found, pages = self._retry.budget(), list[Any](), None

        def next_page() -> Any:
            nonlocal pages
            if pages is None:  # the first page, or the rest after a page that failed
                last = found[-1]["path"] if found else None
                pages = obstore.list(self._reader(), self._prefix + prefix or None, offset=last, chunk_size=_PAGE)
            try:
                with self._errors(""):
                    return next(pages, None)
            except RegistryError:
                pages = None
                raise

        while (page := self._retry(next_page, budget)) is not None:
            found += page
        entries = [
            StoredKey(item["path"].removeprefix(self._prefix), int(item["size"]), item["last_modified"].astimezone(UTC))
            for item in found
        ]
        return sorted(entries, key=lambda entry: entry.key)

    def _put(self, key: str, data: bytes, mode: Any) -> str:
        path = self._at(key)
        with self._errors(key, conditional=mode != "overwrite"):
            client = self._client(self._upload_s(len(data)), 0)
            return self._tag_of(obstore.put(client, path, data, mode=mode, use_multipart=False))

    def _reader(self) -> Any:
        return self._client(0.0, 0)

    def _upload_s(self, size: int) -> float:
        # Rounded up to whole parts, so that few clients serve all lengths.
        return self._retry.try_s + -(-size // _PART_BYTES) * _PART_BYTES / _MIN_BYTES_PER_S

    def _at(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _tag_of(self, meta: Mapping[str, Any]) -> str:
        return str(meta[self._tag] or "")

    def _body(self, key: str, result: Any, length: int) -> bytes:
        # The read timeout bounds silence; this deadline bounds a body that trickles.
        deadline = time.monotonic() + self._retry.try_s + length / _MIN_BYTES_PER_S
        parts, got = list[bytes](), 0
        for part in result.stream(min_chunk_size=_CHUNK_BYTES):
            parts.append(bytes(part))
            got += len(parts[-1])
            if got > length or time.monotonic() > deadline:
                break
        if got != length:
            raise RegistryUnavailable(
                f"{self.url} stopped after {got} of {length} bytes of {key}", registry=self.url, blob=key
            )
        return b"".join(parts)

    @contextmanager
    def _errors(self, key: str, *, conditional: bool = False) -> Iterator[None]:
        try:
            yield
        except RegistryError:
            raise
        except BaseException as e:
            if conditional and isinstance(e, AlreadyExistsError | PreconditionError):
                raise
            if not (isinstance(e, BaseError | OSError | ValueError) or _is_panic(e)):
                raise
            # Without the cause: its text may quote a request's headers and a server's document.
            raise translated(e, self._facts, key) from None


def gcs_store(place: Address, *, endpoint: str, key_file: str, retry_policy: RetryPolicy) -> CloudStore:
    """The store in a bucket of Google Cloud Storage, by its XML API; tags are generations.

    Without `key_file`, obstore's own chain applies: GOOGLE_… variables, the file of application default credentials,
    the instance's service account.

    Raises:
        SettingsError: `key_file` is not the key of a service account.
    """
    given: Any = {"service_account": key_file} if key_file else {}
    if endpoint:
        given["base_url"] = endpoint.rstrip("/")

    def build(seconds: float, retries: int) -> Any:
        with _settings("gcs-service-account"):
            return GCSStore(place.bucket, config=given, **_options(endpoint, retry_policy, seconds, retries))

    url = f"gs://{place.bucket}/{place.prefix}".rstrip("/")
    return CloudStore(place, build, CloudFacts(url, "gcs-service-account", "gcs_endpoint"), "version", retry_policy)


def azure_store(
    place: Address, *, account: str, endpoint: str, key: str, sas: str, retry_policy: RetryPolicy
) -> CloudStore:
    """The store in a container of Azure Blob Storage; tags are ETags.

    Without `key` and `sas`, obstore's own chain applies: AZURE_… variables, workload identity, the instance's identity.

    Raises:
        SettingsError: `key` or `sas` has no usable form.
    """
    given: Any = {"account_name": account} | ({"account_key": key} if key else {}) | ({"sas_key": sas} if sas else {})
    if endpoint:
        given["endpoint"] = endpoint.rstrip("/")

    def build(seconds: float, retries: int) -> Any:
        with _settings("azure-account-key or azure-sas-token"):
            return AzureStore(place.bucket, config=given, **_options(endpoint, retry_policy, seconds, retries))

    url = f"az://{place.bucket}/{place.prefix}".rstrip("/")
    facts = CloudFacts(url, "azure-account-key or azure-sas-token", "azure_account or azure_endpoint")
    return CloudStore(place, build, facts, "e_tag", retry_policy)


def _options(endpoint: str, policy: RetryPolicy, seconds: float, retries: int) -> dict[str, Any]:
    """`seconds`: of a whole request; 0 bounds each silence instead, since a body may be of any length."""
    silence = timedelta(seconds=policy.try_s)
    client: dict[str, Any] = {"connect_timeout": silence, "allow_http": endpoint.startswith("http://")}
    if seconds:
        client["timeout"] = timedelta(seconds=seconds)
    else:
        client |= {"read_timeout": silence, "timeout": timedelta(days=1)}
    return {
        "client_options": client,
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(seconds=policy.timeout_s)},
    }


@contextmanager
def _settings(secret: str) -> Iterator[None]:
    try:
        yield
    except (BaseError, ValueError, OSError):
        # Without the cause: its text may hold a part of the secret.
        raise SettingsError(
            f"the secret {secret} in the setting secrets_dir has no usable form",
            variable="secrets_dir",
            hint="create it again from the file or text that the provider gave",
        ) from None


def _is_panic(error: BaseException) -> bool:
    """Whether a Rust library gave up, as over a header that no request can hold; no subclass of Exception."""
    return type(error).__name__ == "PanicException"
