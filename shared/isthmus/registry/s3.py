"""A registry in S3 or a compatible server (MinIO, Ceph, R2, …). The only module that imports boto3."""

from __future__ import annotations

import base64
import builtins
import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from isthmus.errors import Denied, RegistryError, RegistryUnavailable, SettingsError
from isthmus.registry.blobs import (
    StoredKey,
    check_key,
    check_range,
    conditions_ignored,
    ended_early,
    missing_blob,
    missing_registry,
    probe_conditions,
    replace_retried,
    too_long,
)
from isthmus.registry.retry_policy import MAX_PARALLEL_REQUESTS, RetryPolicy, in_parallel
from isthmus.retries import RetryBudget
from isthmus.settings import is_secret

# S3 requires parts of at least 5 MiB; the memory of an upload is this times MAX_PARALLEL_REQUESTS.
_PART_BYTES = 16 * 2**20
_MAX_PARTS = 10_000
"""S3's limit on the parts of one object."""
_CHUNK_BYTES = 2**18
_MIN_BYTES_PER_S = 64 * 2**10
"""A slower transfer counts as stalled."""

_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401", "403"}
_WRONG_REGION = {
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "TemporaryRedirect",
    "IllegalLocationConstraintException",
}
# Statuses of a HEAD whose reason is in the response body, which only a GET has.
_NEEDS_BODY = {301, 307, 400, 403}
_AWS_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws")
_REGION = "us-east-1"
_MAX_REGION = 64
# boto3 follows redirects without a bound; see `_count_redirects`.
_MAX_REDIRECTS = 5
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}
_NO_KEY = {"NoSuchKey", "NotFound", "404"}
_DAMAGED_UPLOAD = {"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}
_TRANSIENT = _DAMAGED_UPLOAD | {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted"}


class S3Store:
    """Keys are objects under `prefix` of one bucket; an empty `endpoint` is AWS, any other server is addressed
    path-style.

    `any_key`: keys that others chose are taken as well, for objects that are read and are no registry's.

    Without `key_id` and `secret`, boto3's own credential chain applies (environment, files, instance role); with an
    empty `region`, boto3's own region. boto3 makes one attempt; `RetryPolicy` repeats requests.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str = "",
        region: str = "",
        key_id: str = "",
        secret: str = "",
        retry_policy: RetryPolicy | None = None,
        any_key: bool = False,
    ) -> None:
        self._any_key = any_key
        self._bucket = bucket
        self._prefix = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self._endpoint, self._region = endpoint, region
        self._key_id, self._secret = key_id, secret
        self._retry = retry_policy or RetryPolicy()
        self._connection: Any = None
        self._thread = threading.local()
        self._conditions_enforced = False

    def close(self) -> None:
        """Close idle connections."""
        with _CONNECTING:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self.get_tagged(key, max_bytes=max_bytes)[0]

    def get_tagged(self, key: str, *, max_bytes: int) -> tuple[bytes, str]:
        with self._errors(key):
            response = self._client().get_object(**self._at(key))
            if response["ContentLength"] > max_bytes:
                response["Body"].close()
                raise too_long(self.url, key, max_bytes)
            return self._body(key, response["Body"], response["ContentLength"]), str(response.get("ETag", ""))

    def read(self, key: str, start: int, stop: int) -> bytes:
        check_range(start, stop)
        if start == stop:
            return b""
        with self._errors(key):
            response = self._client().get_object(**self._at(key), Range=f"bytes={start}-{stop - 1}")
            if response["ContentLength"] == stop - start:
                return self._body(key, response["Body"], stop - start)
            response["Body"].close()
        if response["ContentLength"] < stop - start:
            raise ended_early(self.url, key, response["ContentLength"], stop - start)
        raise RegistryError(f"{self.url} ignores byte ranges: it cannot be a registry", registry=self.url, blob=key)

    def size(self, key: str) -> int | None:
        with self._errors(key):
            try:
                return int(self._client().head_object(**self._at(key))["ContentLength"])
            except self._client().exceptions.ClientError as e:
                if e.response["Error"]["Code"] in _NO_KEY:
                    return None
                if _status(e) not in _NEEDS_BODY:
                    raise
            # A HEAD has no response body. The body of a GET holds the reason, and the right region for boto3's own
            # redirect.
            return self._size_by_get(key)

    def _size_by_get(self, key: str) -> int | None:
        try:
            response = self._client().get_object(**self._at(key), Range="bytes=0-0")
        except self._client().exceptions.ClientError as e:
            if e.response["Error"]["Code"] in _NO_KEY:
                return None
            if _status(e) == 416:  # an empty object has no first byte
                return 0
            raise
        response["Body"].close()
        return int(response["ContentRange"].rpartition("/")[2])

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._client().put_object(**self._at(key), **_body_of(data))

    def put_file(self, key: str, path: Path, budget: RetryBudget | None = None) -> None:
        size, at, retry = path.stat().st_size, self._at(key), self._retry
        if size <= _PART_BYTES:
            data = path.read_bytes()
            retry(lambda: self.put(key, data), budget)
            return
        upload = at | {
            "UploadId": retry(lambda: self._request(key, "create_multipart_upload", **at)["UploadId"], budget)
        }
        length = max(_PART_BYTES, -(-size // _MAX_PARTS))

        def send(number: int) -> dict[str, Any]:
            with path.open("rb") as f:
                f.seek((number - 1) * length)
                body = _body_of(f.read(length))
            response = retry(lambda: self._request(key, "upload_part", **upload, **body, PartNumber=number), budget)
            return {"PartNumber": number, "ETag": response["ETag"]}

        try:
            parts = sorted(in_parallel(send, range(1, -(-size // length) + 1)), key=lambda part: part["PartNumber"])
            retry(
                lambda: self._request(key, "complete_multipart_upload", **upload, MultipartUpload={"Parts": parts}),
                budget,
            )
        except BaseException:
            # Parts of an unfinished upload would stay in the bucket, at a cost.
            with suppress(RegistryError):
                self._request(key, "abort_multipart_upload", **upload)
            raise

    def _request(self, key: str, operation: str, **arguments: Any) -> Any:
        with self._errors(key):
            return getattr(self._client(), operation)(**arguments)

    def put_if_absent(self, key: str, data: bytes, budget: RetryBudget | None = None) -> bool:
        # Some servers ignore If-None-Match. The look-up before and the read afterwards narrow the race on such servers
        # to one moment (docs/reference/registry.md, "Publishers at the same time").
        retry = self._retry
        if retry(lambda: self.exists(key), budget):
            return False
        if not retry(lambda: self._put_new(key, data), budget):
            return False
        return retry(lambda: self.get(key, max_bytes=max(len(data), 2**20)), budget) == data

    def _put_new(self, key: str, data: bytes) -> bool:
        with self._errors(key):
            try:
                self._client().put_object(**self._at(key), **_body_of(data), IfNoneMatch="*")
            except self._client().exceptions.ClientError as e:
                if _status(e) == 412:
                    return False
                if _status(e) != 501:
                    raise
                self._client().put_object(**self._at(key), **_body_of(data))
        return True

    def put_if_match(self, key: str, data: bytes, tag: str, budget: RetryBudget | None = None) -> bool:
        return replace_retried(self, self._retry, key, data, tag, budget)

    def require_conditions(self) -> None:
        if not self._conditions_enforced:
            probe_conditions(self, self._retry)
            self._conditions_enforced = True

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Store `data` where `key` has that ETag, or, for an empty one, where it is absent; the new ETag, else None.

        Source: S3's conditional writes, If-Match and If-None-Match.
        """
        condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
        with self._errors(key):
            try:
                return str(self._client().put_object(**self._at(key), **_body_of(data), **condition)["ETag"])
            except self._client().exceptions.ClientError as e:
                # 404: If-Match of a key that is gone.
                if _status(e) in (412, 404) and e.response["Error"]["Code"] != "NoSuchBucket":
                    return None
                if _status(e) == 501:
                    raise conditions_ignored(self.url) from e
                raise

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._client().delete_object(**self._at(key))

    def list(self, prefix: str) -> builtins.list[str]:
        return sorted(item["Key"].removeprefix(self._prefix) for item in self._objects(prefix))

    def entries(self, prefix: str) -> builtins.list[StoredKey]:
        objects = [
            StoredKey(item["Key"].removeprefix(self._prefix), int(item["Size"]), item["LastModified"].astimezone(UTC))
            for item in self._objects(prefix)
        ]
        return sorted(objects, key=lambda entry: entry.key)

    def _objects(self, prefix: str) -> builtins.list[dict[str, Any]]:
        if prefix:
            check_key(prefix.removesuffix("/"))
        query: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        objects, budget, more = list[dict[str, Any]](), self._retry.budget(), True
        while more:
            page = self._retry(lambda: self._request(prefix, "list_objects_v2", **query), budget)
            objects += page.get("Contents", ())
            token = page.get("NextContinuationToken", "")
            # A server that repeats a page's token would cause an endless loop.
            more = bool(page.get("IsTruncated")) and token not in ("", query.get("ContinuationToken"))
            query["ContinuationToken"] = token
        return objects

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + (key if self._any_key else check_key(key))}

    def _body(self, key: str, body: Any, length: int) -> bytes:
        # The socket timeout bounds silence; this deadline bounds a body that trickles.
        deadline = time.monotonic() + self._retry.try_s + length / _MIN_BYTES_PER_S
        parts, got = [], 0
        # botocore's own `read` blocks until all bytes have arrived, and so would check the deadline too late.
        read = getattr(getattr(body, "_raw_stream", body), "read1", body.read)
        with body:
            while got < length and (part := read(min(_CHUNK_BYTES, length - got))):
                parts.append(part)
                got += len(part)
                if time.monotonic() > deadline:
                    break
        # The response announced this length, so that the connection failed and the object is not truncated.
        if got != length:
            raise RegistryUnavailable(
                f"{self.url} stopped after {got} of {length} bytes of {key}", registry=self.url, blob=key
            )
        return b"".join(parts)

    def _client(self) -> Any:
        with _CONNECTING:
            if self._connection is None:
                self._connection = self._connect()
            return self._connection

    def _connect(self) -> Any:
        session = _session(self._key_id, self._secret)
        self._check_credentials(session)
        # boto3's configuration file may name an endpoint other than AWS.
        client = self._new_client(session, "path" if self._endpoint else "auto")
        if not self._endpoint and not urlsplit(client.meta.endpoint_url).netloc.endswith(_AWS_DOMAINS):
            client = self._new_client(session, "path")
        return client

    def _new_client(self, session: Any, style: Literal["auto", "path"]) -> Any:
        from botocore.config import Config

        config = Config(
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=self._retry.try_s,
            read_timeout=self._retry.try_s,
            max_pool_connections=2 * MAX_PARALLEL_REQUESTS,
            s3={"addressing_style": style},
            # Some servers reject the newer checksum headers. Reads are verified by SHA-256 here, and signed writes
            # carry a checksum of their own.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        region = self._region or session.region_name or _REGION
        try:
            client = session.client("s3", endpoint_url=self._endpoint or None, region_name=region, config=config)
        except ValueError as e:
            raise SettingsError(
                f"the setting s3_endpoint is {self._endpoint!r}: {e}", variable="s3_endpoint", value=self._endpoint
            ) from e

        client.meta.events.register_first("needs-retry.s3", self._count_redirects)
        return client

    def _count_redirects(self, response: Any = None, **_: Any) -> None:
        # boto3 looks up the region after each redirect. If the look-up is redirected, too, boto3 recurses until the
        # stack overflows.
        if response is None or not 300 <= response[0].status_code < 400:
            self._thread.redirects = 0
            return
        self._thread.redirects += 1
        if self._thread.redirects > _MAX_REDIRECTS:
            self._thread.redirects = 0
            raise RegistryError(
                f"{self.url} answers with redirects and names no region",
                registry=self.url,
                hint="set s3_endpoint to the server's own URL: https where http is redirected, and no proxy's",
            )

    def _check_credentials(self, session: Any) -> None:
        """Refuse credentials that no header can hold, since the error of the HTTP library would repeat the secret.

        Raises:
            Denied: a control character or a space; the message names the part, not its text.
        """
        if (credentials := session.get_credentials()) is None:
            return
        keys = credentials.get_frozen_credentials()
        parts = {"key id": keys.access_key, "secret key": keys.secret_key, "session token": keys.token}
        for part, text in parts.items():
            if text and not is_secret(text):
                raise Denied(
                    f"the S3 {part} (found by boto3: {credentials.method}) holds a space, a line break or another"
                    " character that no key has",
                    registry=self.url,
                    hint="set it again without the line break",
                )

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError

        facts = {"registry": self.url, "blob": key}
        self._thread.redirects = 0
        try:
            yield
        except boto.ClientError as e:
            raise self._translated(e, key) from e
        except (boto.NoCredentialsError, boto.PartialCredentialsError) as e:
            raise Denied(f"there are no credentials for {self.url}", hint=_SECRETS, **facts) from e
        except boto.HTTPClientError as e:
            # Either the HTTP library refused the request, or an unexpected failure. The text of a refused header
            # includes the signature, so that neither the text nor the cause is kept.
            if isinstance(e.kwargs.get("error"), ValueError):
                raise RegistryError(
                    f"a request to {self.url} cannot be sent: the HTTP library refuses one of its headers",
                    hint="see whether the keys and the token hold a line break",
                    **facts,
                ) from None
            raise RegistryUnavailable(f"{self.url} did not answer for {key}: {type(e).__name__}: {e}", **facts) from e
        except _transient_errors() as e:
            raise RegistryUnavailable(f"{self.url} did not answer for {key}: {type(e).__name__}: {e}", **facts) from e
        except boto.BotoCoreError as e:
            # An absent profile or an invalid region: a configuration error, permanent.
            raise Denied(
                f"{self.url} cannot be asked as this process is configured: {e}",
                hint="see AWS_PROFILE and boto3's other variables and files, or put the keys in secrets_dir",
                **facts,
            ) from e
        except ResponseParserError as e:
            raise RegistryError(
                f"{self.url} gave a response that is not S3's for {key}",
                hint="see whether the setting s3_endpoint names an S3 server's API, not its web console or a proxy",
                **facts,
            ) from e
        except (ValueError, KeyError) as e:
            # The text, and the cause's, may be a header with the signature.
            raise RegistryError(f"{self.url} cannot be asked for {key}: {type(e).__name__}", **facts) from None

    def _translated(self, e: Any, key: str) -> RegistryError:
        # An absent bucket answers 404, too, and must not look like an absent key.
        code, status = str(e.response["Error"].get("Code", "")), _status(e)
        facts = {"registry": self.url, "blob": key}
        if code == "NoSuchBucket":
            return missing_registry(self.url)
        if code in _CLOCK:
            theirs = str(
                e.response["Error"].get("ServerTime") or e.response["ResponseMetadata"]["HTTPHeaders"].get("date")
            )
            return Denied(
                f"{self.url} refuses this machine's clock: it is {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} here, and"
                f" {theirs[:40]} there ({code})",
                hint="set the clock (NTP): S3 refuses a request whose time differs by more than 15 minutes",
                **facts,
            )
        client_region = self._connection.meta.region_name if self._connection is not None else ""
        if (region := _region_of(e)) and region != client_region:
            return RegistryError(
                f"the bucket of {self.url} is in the region {region}; the request went to {client_region}"
                f" ({status} {code})",
                region=region,
                hint=f"set s3_region={region} (S3_REGION for commands and stack.yml)",
                **facts,
            )
        if code in _NO_KEY or status == 404:
            return missing_blob(self.url, key)
        if code in _TRANSIENT or status >= 500 or status in (408, 429):
            return RegistryUnavailable(f"{self.url} answered {status} {code} for {key}", **facts)
        if code in _DENIED or status in (401, 403):
            return Denied(f"{self.url} refused our credentials for {key} ({code})", hint=_SECRETS, **facts)
        if status == 416:
            return ended_early(self.url, key, 0, 1)
        return RegistryError(f"{self.url} answered {status} {code} for {key}", **facts)


_SECRETS = (
    "put s3-access-key-id and s3-secret-access-key in the setting secrets_dir; S3 also refuses a key that is not there"
    " to credentials that may not list the bucket"
)


_CONNECTING = threading.Lock()


@lru_cache(maxsize=1)
def _transient_errors() -> tuple[type[Exception], ...]:
    """Errors that a retry may cure: connections, truncated bodies, and a role endpoint without an answer."""
    from botocore import exceptions as boto
    from urllib3.exceptions import HTTPError

    return (
        boto.ConnectionError,
        boto.IncompleteReadError,
        boto.ChecksumError,
        boto.CredentialRetrievalError,
        boto.MetadataRetrievalError,
        HTTPError,
        OSError,
    )


def _region_of(e: Any) -> str:
    """The right region, as named in the header or body of a refusal; empty if absent."""
    headers = e.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = str(headers.get("x-amz-bucket-region") or e.response["Error"].get("Region") or "")
    # Refusals for other reasons carry the region as well.
    wrong = _status(e) in (301, 307) or str(e.response["Error"].get("Code", "")) in _WRONG_REGION
    return region if wrong and len(region) <= _MAX_REGION else ""


@lru_cache(maxsize=4)
def _session(key_id: str, secret: str) -> Any:
    # Sessions share boto3's parsed service models; parsing takes longer than the fetch of a small segment.
    import boto3

    return boto3.session.Session(aws_access_key_id=key_id or None, aws_secret_access_key=secret or None)


def _body_of(data: bytes) -> dict[str, Any]:
    """Content with its MD5: every server verifies MD5, some ignore the SHA-256 in the signature."""
    md5 = hashlib.md5(data, usedforsecurity=False).digest()
    return {"Body": data, "ContentMD5": base64.b64encode(md5).decode()}


def _status(e: Any) -> int:
    return int(e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
