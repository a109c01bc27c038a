"""A registry in S3, or in any server that speaks its protocol (MinIO, Ceph, R2, …). The only importer of boto3."""

from __future__ import annotations

import base64
import builtins
import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from isthmus.errors import Denied, RegistryError, RegistryUnavailable, SettingsError
from isthmus.registry.blobs import check_key, check_range, ended_early, missing_blob, missing_registry, too_long
from isthmus.registry.patience import WIDTH, Patience

_PART_BYTES = 16 * 2**20
_CHUNK_BYTES = 2**18
_SLOWEST = 64 * 2**10
"""Bytes a second below which a transfer that trickles counts as one that has stopped."""

_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401", "403"}
_NO_KEY = {"NoSuchKey", "NotFound", "404"}
_SPOILT = {"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}
_PASSING = _SPOILT | {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted"}


class S3Store:
    """Keys are objects under `prefix` of one bucket. `endpoint` is empty for AWS; any other server is asked path-style.

    `key_id` and `secret` are the credentials; without them boto3's own chain is used (environment, files, the
    instance's role). boto3 makes one try for all but the parts of an upload; those it tries as `patience` says.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str = "",
        region: str = "us-east-1",
        key_id: str = "",
        secret: str = "",
        patience: Patience | None = None,
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self._endpoint, self._region = endpoint, region
        self._key_id, self._secret = key_id, secret
        self._patience = patience or Patience()
        self._clients: dict[int, Any] = {}

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
                raise

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._client().put_object(**self._at(key), **_body_of(data))

    def put_file(self, key: str, path: Path) -> None:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=WIDTH)
        with path.open("rb") as f, self._errors(key):
            client = self._client(self._patience.attempts)
            client.upload_fileobj(f, self._bucket, self._prefix + check_key(key), Config=config)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        # Not every server enforces If-None-Match. Looking first and reading back afterwards leaves such a server only
        # the moment between the two (docs/registry.md, "Publishers at the same time").
        if self.exists(key):
            return False
        with self._errors(key):
            try:
                self._client().put_object(**self._at(key), **_body_of(data), IfNoneMatch="*")
            except self._client().exceptions.ClientError as e:
                if _status(e) == 412:
                    return False
                if _status(e) != 501:
                    raise
                self._client().put_object(**self._at(key), **_body_of(data))
        return self.get(key, max_bytes=max(len(data), 2**20)) == data

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._client().delete_object(**self._at(key))

    def list(self, prefix: str) -> builtins.list[str]:
        if prefix:
            check_key(prefix.removesuffix("/"))
        with self._errors(prefix):
            pages = self._client().get_paginator("list_objects_v2")
            return sorted(
                item["Key"].removeprefix(self._prefix)
                for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix)
                for item in page.get("Contents", ())
            )

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def _body(self, key: str, body: Any, length: int) -> bytes:
        # The socket's own timeout bounds silence; this bounds a body that trickles.
        deadline = time.monotonic() + self._patience.try_s + length / _SLOWEST
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

    def _client(self, attempts: int = 1) -> Any:
        with _CONNECTING:
            if attempts not in self._clients:
                self._clients[attempts] = self._connect(attempts)
            return self._clients[attempts]

    def _connect(self, attempts: int) -> Any:
        from botocore.config import Config

        session = _session(self._key_id, self._secret)
        config = Config(
            retries={"total_max_attempts": max(1, attempts), "mode": "standard"},
            connect_timeout=self._patience.try_s,
            read_timeout=self._patience.try_s,
            max_pool_connections=2 * WIDTH,
            s3={"addressing_style": "path" if self._endpoint else "auto"},
            # Servers other than AWS stumble over the newer checksum headers; reads are verified here by SHA-256, and
            # a signed write carries its own.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            return session.client("s3", endpoint_url=self._endpoint or None, region_name=self._region, config=config)
        except ValueError as e:
            raise SettingsError(
                f"the setting s3_endpoint is {self._endpoint!r}: {e}", variable="s3_endpoint", value=self._endpoint
            ) from e

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
        from urllib3.exceptions import HTTPError

        facts = {"registry": self.url, "blob": key}
        try:
            yield
        except ClientError as e:
            raise self._ours(e, key) from e
        except (NoCredentialsError, PartialCredentialsError) as e:
            raise Denied(f"there are no credentials for {self.url}", hint=_SECRETS, **facts) from e
        except (BotoCoreError, Boto3Error, HTTPError, OSError) as e:
            raise RegistryUnavailable(f"{self.url} did not answer for {key}: {type(e).__name__}: {e}", **facts) from e

    def _ours(self, e: Any, key: str) -> RegistryError:
        code, status = str(e.response["Error"].get("Code", "")), _status(e)
        facts = {"registry": self.url, "blob": key}
        if code == "NoSuchBucket":
            return missing_registry(self.url)
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
