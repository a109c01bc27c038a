"""Servers behind TLS with certificates of a CA of the test's own; some demand a client certificate."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

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

    def __init__(self, context: ssl.SSLContext, *, ends: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Echo)
        self.context, self.ends = context, ends

    def finish_request(self, request: object, client_address: object) -> None:
        try:
            with self.context.wrap_socket(request, server_side=True) as secure:  # type: ignore[call-overload]
                if not self.ends:
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
def tls_server(context: ssl.SSLContext, host: str = "localhost", *, ends: bool = False) -> Iterator[str]:
    """The URL of a server with that side of TLS; with `ends` it closes each connection after the handshake."""
    server = TlsServer(context, ends=ends)
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
        (folder / "hop-client-key").chmod(0o600)
    return folder


@contextmanager
def tls_proxy(context: ssl.SSLContext, target: str) -> Iterator[str]:
    """The https URL of a proxy that ends TLS before the http server at `target`, as an ingress does."""
    parts = urlsplit(target)
    address = parts.hostname or "", parts.port or 80
    open_now: set[socket.socket] = set()

    def relay(raw: socket.socket) -> None:
        with suppress(OSError), raw, context.wrap_socket(raw, server_side=True) as client, connected() as server:
            open_now.update((client, server))
            _relay(client, server)
            open_now.difference_update((client, server))

    def connected() -> socket.socket:
        return socket.create_connection(address)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(64) as threads:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threads.submit(relay, listener.accept()[0])

        threads.submit(accept)
        try:
            yield f"https://localhost:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for each in [*open_now]:
                with suppress(OSError):
                    socket.socket.shutdown(each, socket.SHUT_RDWR)


def _relay(client: ssl.SSLSocket, server: socket.socket) -> None:
    """Bytes both ways until one side ends, in one thread: a TLS socket is not for two."""
    while True:
        readable = [client] if client.pending() else select.select([client, server], [], [])[0]
        for source, sink in ((client, server), (server, client)):
            if source in readable:
                if not (data := source.recv(2**16)):
                    return
                sink.sendall(data)
