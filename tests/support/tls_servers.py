"""Servers behind TLS with certificates of a CA of the test's own; some demand a client certificate."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import trustme


class Echo(BaseHTTPRequestHandler):
    """Answers a POST with its body: the frame of a hop comes back as its reply."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """No-op: standard error is the test's."""


class TlsServer(ThreadingHTTPServer):
    """Shakes hands in the thread of a connection, so that a client that refuses ends that thread alone."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), Echo)
        self.context = context

    def finish_request(self, request: object, client_address: object) -> None:
        try:
            with self.context.wrap_socket(request, server_side=True) as secure:  # type: ignore[call-overload]
                super().finish_request(secure, client_address)  # type: ignore[arg-type]
        except OSError:
            pass


def server_context(certificate: trustme.LeafCert, demanded_by: trustme.CA | None = None) -> ssl.SSLContext:
    """The server's side of TLS; with `demanded_by` clients must show a certificate of that CA."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    if demanded_by is not None:
        demanded_by.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextmanager
def tls_server(context: ssl.SSLContext, host: str = "localhost") -> Iterator[str]:
    """The URL of a server with that side of TLS."""
    server = TlsServer(context)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"https://{host}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_secrets(folder: Path, *, ca: trustme.CA | None = None, client: trustme.LeafCert | None = None) -> Path:
    """The secrets of a function that trusts `ca` and shows `client`."""
    folder.mkdir(exist_ok=True)
    if ca is not None:
        ca.cert_pem.write_to_path(folder / "hop-ca")
    if client is not None:
        (folder / "hop-client-cert").write_bytes(b"".join(blob.bytes() for blob in client.cert_chain_pems))
        client.private_key_pem.write_to_path(folder / "hop-client-key")
    return folder
