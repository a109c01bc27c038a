"""GCS's XML API on this machine: moto's S3, behind a translation of what the two differ in.

No emulator of the XML API can be installed from a package index. The translation follows Google's reference of the
API; it is not Google's server, and what it does not show is how that one behaves.

Source: cloud.google.com/storage/docs/xml-api/reference-headers.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

TOKEN = "gcs-test-token"
# Not the bucket of `moto_s3`: the servers of one process share their objects.
BUCKET = "isthmus-gcs-tests"
_S3_KEY = "AWS4-HMAC-SHA256 Credential=TESTKEYID/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class GcsServer:
    """One bucket on a free port until `stop`.

    The next requests for which `fails` is true are answered 503; a page of a listing has at most `page` keys.
    """

    def __init__(self) -> None:
        self._s3 = DomainDispatcherApplication(create_backend_app)
        self._generations, self._numbers = dict[str, int](), itertools.count(1)
        self._lock = threading.Lock()
        self.fails: Callable[[str], bool] = lambda request: False
        self.page, self.requests = 1000, list[str]()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._ask("PUT", f"/{BUCKET}")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            if "list-type" in environ["QUERY_STRING"]:
                environ["QUERY_STRING"] += f"&max-keys={self.page}"
            self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}")
            if self.fails(self.requests[-1]):
                return _error(start_response, "503 Service Unavailable", "SlowDown")
            if environ.get("HTTP_AUTHORIZATION") != f"Bearer {TOKEN}":
                return _error(start_response, "401 Unauthorized", "AuthenticationRequired")
            return self._translated(environ, start_response)

    def _translated(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        wanted = environ.get("HTTP_X_GOOG_IF_GENERATION_MATCH")
        if wanted is not None and int(wanted) != self._generations.get(path, 0):
            return _error(start_response, "412 Precondition Failed", "PreconditionFailed")
        environ["HTTP_AUTHORIZATION"] = _S3_KEY
        # moto takes names from the raw path, in which obstore escapes more characters than S3's clients.
        environ["RAW_URI"] = environ["REQUEST_URI"] = f"{path}?{environ['QUERY_STRING']}".rstrip("?")

        def answer(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            # A part of an upload makes no generation; its completion does.
            if status.startswith("2") and method in ("PUT", "POST") and not _is_part(environ["QUERY_STRING"]):
                self._generations[path] = next(self._numbers)
            if status.startswith("2") and method == "DELETE":
                self._generations.pop(path, None)
            return start_response(status, [*headers, ("x-goog-generation", str(self._generations.get(path, 0)))], *rest)

        return list(self._s3(environ, answer))

    def _ask(self, method: str, path: str) -> None:
        connection = HTTPConnection("127.0.0.1", self._server.server_port)
        connection.request(method, path, headers={"Authorization": f"Bearer {TOKEN}", "Content-Length": "0"})
        assert connection.getresponse().status == 200
        connection.close()


def _is_part(query: str) -> bool:
    return re.search(r"partNumber=|uploads", query) is not None


def _error(start_response: Callable[..., Any], status: str, code: str) -> Iterable[bytes]:
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[GcsServer]:
    server = GcsServer()
    yield server
    server.stop()
