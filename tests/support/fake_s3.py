"""A small S3 server inside the test's process: objects in memory, requests noted, refusals as a test wants them."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote

from isthmus.registry import RetryPolicy, S3Store

Response = tuple[int, dict[str, str], bytes]
QUICK = RetryPolicy(attempts=4, timeout_s=5.0)


@dataclass(frozen=True)
class Request:
    """What came in; `key` holds no bucket and is empty for the bucket itself."""

    method: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class FakeS3:
    """`refuse` may answer a request in the server's place; it is called before anything is done."""

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    refuse: Callable[[Request], Response | None] = lambda request: None
    page_size: int = 1000
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def store(self, *, retry_policy: RetryPolicy = QUICK, **given: Any) -> S3Store:
        return S3Store(
            "b", "p", **{"endpoint": self.url, "key_id": "k", "secret": "s", "retry_policy": retry_policy} | given
        )

    @property
    def received_bytes(self) -> int:
        return sum(len(request.body) for request in self.requests)

    def answer(self, request: Request) -> Response:
        with self.lock:
            self.requests.append(request)
            return self.refuse(request) or getattr(self, f"_{request.method.lower()}")(request)

    def _put(self, request: Request) -> Response:
        md5 = hashlib.md5(request.body, usedforsecurity=False)
        if request.headers.get("content-md5", base64.b64encode(md5.digest()).decode()).encode() != base64.b64encode(
            md5.digest()
        ):
            return error(400, "BadDigest")
        if "uploadId" in request.query:
            self.uploads[request.query["uploadId"]][int(request.query["partNumber"])] = request.body
        elif not self._holds(request):
            return error(412, "PreconditionFailed")
        else:
            self.objects[request.key] = request.body
        return 200, {"ETag": f'"{md5.hexdigest()}"'}, b""

    def _post(self, request: Request) -> Response:
        if "uploads" in request.query:
            name = str(len(self.uploads) + 1)
            self.uploads[name] = {}
            return _xml(
                200, f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            )
        self.objects[request.key] = b"".join(b for _, b in sorted(self.uploads.pop(request.query["uploadId"]).items()))
        return _xml(200, '<CompleteMultipartUploadResult><ETag>"x"</ETag></CompleteMultipartUploadResult>')

    def _delete(self, request: Request) -> Response:
        if "uploadId" in request.query:
            self.uploads.pop(request.query["uploadId"], None)
        else:
            self.objects.pop(request.key, None)
        return 204, {}, b""

    def _head(self, request: Request) -> Response:
        return self._get(request)

    def _get(self, request: Request) -> Response:
        if not request.key:
            found = sorted(key for key in self.objects if key.startswith(request.query.get("prefix", "")))
            found = [key for key in found if key > request.query.get("continuation-token", "")]
            page, rest = found[: self.page_size], found[self.page_size :]
            rows = "".join(f"<Contents><Key>{html.escape(k)}</Key><Size>1</Size></Contents>" for k in page)
            token = f"<NextContinuationToken>{html.escape(page[-1])}</NextContinuationToken>" if rest else ""
            more = str(bool(rest)).lower()
            return _xml(200, f"<ListBucketResult><IsTruncated>{more}</IsTruncated>{token}{rows}</ListBucketResult>")
        if (data := self.objects.get(request.key)) is None:
            return error(404, "NoSuchKey")
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", "")):
            if int(found[1]) >= len(data):
                return error(416, "InvalidRange")
            part = data[int(found[1]) : int(found[2]) + 1]
            return 206, {"Content-Range": f"bytes {found[1]}-{int(found[1]) + len(part) - 1}/{len(data)}"}, part
        return 200, {"ETag": self._tag(request.key)}, data

    def _holds(self, request: Request) -> bool:
        if "if-none-match" in request.headers:
            return request.key not in self.objects
        return request.headers.get("if-match") in (None, self._tag(request.key))

    def _tag(self, key: str) -> str:
        return f'"{hashlib.md5(self.objects.get(key, b""), usedforsecurity=False).hexdigest()}"'


def error(status: int, code: str, inside: str = "", **headers: str) -> Response:
    """A refusal as S3 writes it; header names are given with '_' for '-'."""
    response = _xml(status, f"<Error><Code>{code}</Code><Message>{code} here</Message>{inside}</Error>")
    return status, response[1] | {name.replace("_", "-"): value for name, value in headers.items()}, response[2]


def _xml(status: int, text: str) -> Response:
    return status, {"Content-Type": "application/xml"}, f"<?xml version='1.0'?>{text}".encode()


@contextmanager
def serving(s3: FakeS3) -> Iterator[FakeS3]:
    """`s3`, on a free port for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        # HTTP/1.0 closes each connection, so that no thread outlives the block.
        def log_message(self, *_: Any) -> None:
            pass

        def _serve(self) -> None:
            if self.headers.get("Expect"):
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            path, _, query = self.path.partition("?")
            request = Request(
                self.command,
                unquote(path).lstrip("/").partition("/")[2],
                dict(parse_qsl(query, keep_blank_values=True)),
                {name.lower(): value for name, value in self.headers.items()},
                self.rfile.read(int(self.headers.get("Content-Length") or 0)),
            )
            status, headers, body = s3.answer(request)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    class Server(ThreadingHTTPServer):
        daemon_threads = False

        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    s3.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield s3
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
