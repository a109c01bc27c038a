"""TCP and TLS connections with a bound on all phases together, name resolution included."""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from isthmus.http.addresses import Address, parse_address

_LOOKUPS: dict[tuple[str, int], _Lookup] = {}
_LOCK = threading.Lock()


class AddressRefused(OSError):
    """A host has no address that its caller permits."""


def connect(
    host: str,
    port: int,
    *,
    timeout_s: float,
    tls: ssl.SSLContext | None = None,
    permits: Callable[[Address], bool] | None = None,
) -> socket.socket:
    """Resolve, connect and, with `tls`, shake hands, all within `timeout_s` seconds; TCP_NODELAY is set.

    Addresses are tried in the resolver's order, each for an equal share of the time that is left. With `permits`, only
    addresses for which it is true: the check and the connection use one look-up, so that a name whose addresses change
    in between (DNS rebinding) gains nothing.

    Raises:
        AddressRefused: `permits` is true for no address.
        TimeoutError: the time is over; the message names the phase.
        OSError: the name is unknown, no address takes the connection, or the TLS handshake failed.
    """
    until = time.monotonic() + timeout_s
    addresses = resolve(host, port, timeout_s=timeout_s)
    if permits is not None:
        addresses = [entry for entry in addresses if permits(parse_address(str(entry[4][0])))]
        if not addresses:
            raise AddressRefused(f"{host} has no permitted address")
    for n, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.001, (until - time.monotonic()) / (len(addresses) - n)))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            sock.close()
            if n == len(addresses) - 1:
                raise
            continue
        return sock if tls is None else _handshake(sock, tls, host, until)
    raise OSError(f"{host} has no address")


def resolve(host: str, port: int, *, timeout_s: float) -> list[tuple[Any, ...]]:
    """The addresses of `host` as `socket.getaddrinfo` gives them for TCP.

    getaddrinfo has no timeout of its own (a DNS server that does not answer takes 10 to 30 s), so a daemon
    thread runs it, and callers leave when their time is over. Callers of the same name share a look-up: there are at
    most as many threads as names.

    Raises:
        TimeoutError: no answer within `timeout_s` seconds.
        socket.gaierror: the name is unknown.
    """
    with _LOCK:
        lookup = _LOOKUPS.get((host, port))
        if lookup is None:
            lookup = _LOOKUPS[host, port] = _Lookup(host, port)
            lookup.start()
    if not lookup.done.wait(max(0.0, timeout_s)):
        raise TimeoutError(f"the name {host} was not resolved in {timeout_s:.3g} s")
    if lookup.error is not None:
        raise lookup.error
    return lookup.addresses


class _Lookup(threading.Thread):
    """A look-up in progress."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(name=f"resolve {host}", daemon=True)
        self._host, self._port = host, port
        self.done = threading.Event()
        self.addresses: list[tuple[Any, ...]] = []
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            self.addresses = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as e:
            self.error = e
        except UnicodeError as e:  # a label of more than 63 characters, as IDNA reports
            self.error = socket.gaierror(socket.EAI_NONAME, f"{self._host} is no host name: {e}")
        finally:
            with _LOCK:
                del _LOOKUPS[self._host, self._port]
            self.done.set()


def _handshake(sock: socket.socket, tls: ssl.SSLContext, host: str, until: float) -> ssl.SSLSocket:
    """A socket's own timeout is for each read of a handshake; a peer that sends single bytes would exceed the bound."""
    try:
        secure = tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    except BaseException:
        sock.close()
        raise
    try:
        secure.setblocking(False)
        while True:
            try:
                secure.do_handshake()
                return secure
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            poll = select.poll()
            poll.register(secure, event)
            left_s = until - time.monotonic()
            if left_s <= 0 or not poll.poll(max(1, left_s * 1000)):
                raise TimeoutError(f"the TLS handshake with {host} did not end in time")
    except BaseException:
        secure.close()
        raise
