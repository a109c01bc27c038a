"""A registry in S3, or in any server that speaks its protocol (MinIO, Ceph, R2, …). The only importer of boto3."""

from __future__ import annotations

import base64
import builtins
import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from isthmus.errors import Denied, RegistryError, RegistryUnavailable, SettingsError
from isthmus.registry.blobs import check_key, check_range, ended_early, missing_blob, missing_registry, too_long
from isthmus.registry.retry_policy import MAX_PARALLEL_REQUESTS, RetryPolicy, in_parallel
from isthmus.retries import RetryBudget
from isthmus.settings import is_secret

_PART_BYTES = 16 * 2**20
_MAX_PARTS = 10_000
"""S3's own limit for one object."""
_CHUNK_BYTES = 2**18
_SLOWEST = 64 * 2**10
"""Bytes a second below which a transfer that trickles counts as one that has stopped."""

_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401", "403"}
_ELSEWHERE = {
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "TemporaryRedirect",
    "IllegalLocationConstraintException",
}
_UNEXPLAINED = {301, 307, 400, 403}
_OF_AWS = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws")
_REGION = "us-east-1"
_MAX_REGION = 64
_MAX_REDIRECTS = 5
_NO_KEY = {"NoSuchKey", "NotFound", "404"}
_SPOILT = {"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}
_PASSING = _SPOILT | {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted"}


class S3Store:
    """Keys are objects under `prefix` of one bucket. `endpoint` is empty for AWS; any other server is asked path-style.

    `key_id` and `secret` are the credentials; without them boto3's own chain is used (environment, files, the
    instance's role). So is its region where `region` is empty. boto3 makes one try;
    isthmus.registry.retry_policy repeats it.
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
        patience: RetryPolicy | None = None,
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self._endpoint, self._region = endpoint, region
        self._key_id, self._secret = key_id, secret
        self._retry = patience or RetryPolicy()
        self._made: Any = None
        self._thread = threading.local()

    def close(self) -> None:
        """Close the connections that wait for the next request."""
        with _CONNECTING:
            if self._made is not None:
                self._made.close()
                self._made = None

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def get(self, key: str, *, max_bytes: int) -> bytes:
        with self._errors(key):
            reply = self._client().get_object(**self._at(key))
            if reply["ContentLength"] > max_bytes:
                reply["Body"].close()
                raise too_long(self.url, key, max_bytes)
            return self._body(key, reply["Body"], reply["ContentLength"])

    def read(self, key: str, start: int, stop: int) -> bytes:
        check_range(start, stop)
        if start == stop:
            return b""
        with self._errors(key):
            reply = self._client().get_object(**self._at(key), Range=f"bytes={start}-{stop - 1}")
            if reply["ContentLength"] == stop - start:
                return self._body(key, reply["Body"], stop - start)
            reply["Body"].close()
        if reply["ContentLength"] < stop - start:
            raise ended_early(self.url, key, reply["ContentLength"], stop - start)
        raise RegistryError(f"{self.url} ignores byte ranges: it cannot be a registry", registry=self.url, blob=key)

    def size(self, key: str) -> int | None:
        with self._errors(key):
            try:
                return int(self._client().head_object(**self._at(key))["ContentLength"])
            except self._client().exceptions.ClientError as e:
                if e.response["Error"]["Code"] in _NO_KEY:
                    return None
                if _status(e) not in _UNEXPLAINED:
                    raise
            # A HEAD's response has no body; that of a GET says why, or which region was meant, where boto3 asks then.
            return self._size_by_get(key)

    def _size_by_get(self, key: str) -> int | None:
        try:
            reply = self._client().get_object(**self._at(key), Range="bytes=0-0")
        except self._client().exceptions.ClientError as e:
            if e.response["Error"]["Code"] in _NO_KEY:
                return None
            if _status(e) == 416:  # of nothing, there is no first byte
                return 0
            raise
        reply["Body"].close()
        return int(reply["ContentRange"].rpartition("/")[2])

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
        upload = at | {"UploadId": retry(lambda: self._ask(key, "create_multipart_upload", **at)["UploadId"], budget)}
        length = max(_PART_BYTES, -(-size // _MAX_PARTS))

        def send(number: int) -> dict[str, Any]:
            with path.open("rb") as f:
                f.seek((number - 1) * length)
                body = _body_of(f.read(length))
            reply = retry(lambda: self._ask(key, "upload_part", **upload, **body, PartNumber=number), budget)
            return {"PartNumber": number, "ETag": reply["ETag"]}

        try:
            parts = sorted(in_parallel(send, range(1, -(-size // length) + 1)), key=lambda part: part["PartNumber"])
            retry(
                lambda: self._ask(key, "complete_multipart_upload", **upload, MultipartUpload={"Parts": parts}), budget
            )
        except BaseException:
            # Parts that nobody completes would be kept, and paid for.
            with suppress(RegistryError):
                self._ask(key, "abort_multipart_upload", **upload)
            raise

    def _ask(self, key: str, operation: str, **arguments: Any) -> Any:
        with self._errors(key):
            return getattr(self._client(), operation)(**arguments)

    def put_if_absent(self, key: str, data: bytes, budget: RetryBudget | None = None) -> bool:
        # Not every server enforces If-None-Match. Looking first and reading back afterwards leaves such a server only
        # the moment between the two (docs/registry.md, "Publishers at the same time").
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

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._client().delete_object(**self._at(key))

    def list(self, prefix: str) -> builtins.list[str]:
        if prefix:
            check_key(prefix.removesuffix("/"))
        where: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        keys, budget, more = list[str](), self._retry.budget(), True
        while more:
            page = self._retry(lambda: self._ask(prefix, "list_objects_v2", **where), budget)
            keys += [item["Key"].removeprefix(self._prefix) for item in page.get("Contents", ())]
            token = page.get("NextContinuationToken", "")
            # A page that is followed by itself would never end.
            more = bool(page.get("IsTruncated")) and token not in ("", where.get("ContinuationToken"))
            where["ContinuationToken"] = token
        return sorted(keys)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def _body(self, key: str, body: Any, length: int) -> bytes:
        # The socket's own timeout bounds silence; this bounds a body that trickles.
        deadline = time.monotonic() + self._retry.try_s + length / _SLOWEST
        parts, got = [], 0
        # botocore's own read waits until it has all that it was asked for, so that the deadline would be seen too late.
        read = getattr(getattr(body, "_raw_stream", body), "read1", body.read)
        with body:
            while got < length and (part := read(min(_CHUNK_BYTES, length - got))):
                parts.append(part)
                got += len(part)
                if time.monotonic() > deadline:
                    break
        # The length was announced, so that it is the connection that failed, not the object that is short.
        if got != length:
            raise RegistryUnavailable(
                f"{self.url} stopped after {got} of {length} bytes of {key}", registry=self.url, blob=key
            )
        return b"".join(parts)

    def _client(self) -> Any:
        with _CONNECTING:
            if self._made is None:
                self._made = self._connect()
            return self._made

    def _connect(self) -> Any:
        session = _session(self._key_id, self._secret)
        self._check_credentials(session)
        # boto3 may know of another server than AWS by itself, from its configuration file.
        client = self._make(session, "path" if self._endpoint else "auto")
        if not self._endpoint and not urlsplit(client.meta.endpoint_url).netloc.endswith(_OF_AWS):
            client = self._make(session, "path")
        return client

    def _make(self, session: Any, style: Literal["auto", "path"]) -> Any:
        from botocore.config import Config

        config = Config(
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=self._retry.try_s,
            read_timeout=self._retry.try_s,
            max_pool_connections=2 * MAX_PARALLEL_REQUESTS,
            s3={"addressing_style": style},
            # Servers other than AWS stumble over the newer checksum headers; reads are verified here by SHA-256, and
            # a signed write carries its own.
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
        # boto3 asks for the region after each redirect; where that is redirected too, it would go on until the stack
        # is full.
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
        """Refuse credentials that no header can hold: the HTTP library's own refusal would repeat them.

        Raises:
            Denied: a control character or a space; says in which part, and not what.
        """
        if (found := session.get_credentials()) is None:
            return
        keys = found.get_frozen_credentials()
        parts = {"key id": keys.access_key, "secret key": keys.secret_key, "session token": keys.token}
        for part, text in parts.items():
            if text and not is_secret(text):
                raise Denied(
                    f"the S3 {part} (found by boto3: {found.method}) holds a space, a line break or another character"
                    " that no key has",
                    registry=self.url,
                    hint="set it again without the line break",
                )

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            HTTPClientError,
            NoCredentialsError,
            PartialCredentialsError,
        )
        from botocore.parsers import ResponseParserError

        facts = {"registry": self.url, "blob": key}
        self._thread.redirects = 0
        try:
            yield
        except ClientError as e:
            raise self._ours(e, key) from e
        except (NoCredentialsError, PartialCredentialsError) as e:
            raise Denied(f"there are no credentials for {self.url}", hint=_SECRETS, **facts) from e
        except HTTPClientError as e:
            # The HTTP library refused the request before it was sent, or failed as nobody foresaw. The text of a
            # refused header is the header, signature included.
            if isinstance(e.kwargs.get("error"), ValueError):
                raise RegistryError(
                    f"a request to {self.url} cannot be sent: the HTTP library refuses one of its headers",
                    hint="see whether the keys and the token hold a line break",
                    **facts,
                ) from None
            raise RegistryUnavailable(f"{self.url} did not answer for {key}: {type(e).__name__}: {e}", **facts) from e
        except _failures_in_passing() as e:
            raise RegistryUnavailable(f"{self.url} did not answer for {key}: {type(e).__name__}: {e}", **facts) from e
        except BotoCoreError as e:
            # A profile that is not there, a region that is none: another try finds the same.
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
            # The text may be a header with the signature; so may that of its cause.
            raise RegistryError(f"{self.url} cannot be asked for {key}: {type(e).__name__}", **facts) from None

    def _ours(self, e: Any, key: str) -> RegistryError:
        code, status = str(e.response["Error"].get("Code", "")), _status(e)
        facts = {"registry": self.url, "blob": key}
        if code == "NoSuchBucket":
            return missing_registry(self.url)
        asked = self._made.meta.region_name if self._made is not None else ""
        if (region := _region_of(e)) and region != asked:
            return RegistryError(
                f"the bucket of {self.url} is in the region {region}; it was asked for in {asked} ({status} {code})",
                region=region,
                hint=f"set s3_region={region} (S3_REGION for commands and stack.yml)",
                **facts,
            )
        if code in _NO_KEY or status == 404:
            return missing_blob(self.url, key)
        if code in _PASSING or status >= 500 or status in (408, 429):
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
def _failures_in_passing() -> tuple[type[Exception], ...]:
    """What another try may mend: connections, bodies that end early, a role's endpoint that does not answer."""
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
    """The region that a refusal names, in its header or its body; empty where it names none."""
    headers = e.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    found = str(headers.get("x-amz-bucket-region") or e.response["Error"].get("Region") or "")
    # A refusal for another reason names the region, too.
    wrong = _status(e) in (301, 307) or str(e.response["Error"].get("Code", "")) in _ELSEWHERE
    return found if wrong and len(found) <= _MAX_REGION else ""


@lru_cache(maxsize=4)
def _session(key_id: str, secret: str) -> Any:
    # What a session has read of boto3's tables serves all its clients; reading it takes longer than a small segment.
    import boto3

    return boto3.session.Session(aws_access_key_id=key_id or None, aws_secret_access_key=secret or None)


def _body_of(data: bytes) -> dict[str, Any]:
    """Content with its MD5, which all servers check; not all check the SHA-256 that a request is signed with."""
    md5 = hashlib.md5(data, usedforsecurity=False).digest()
    return {"Body": data, "ContentMD5": base64.b64encode(md5).decode()}


def _status(e: Any) -> int:
    return int(e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
