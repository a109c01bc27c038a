"""Where the results of async calls may be sent: the engine calls an address that its caller names.

The engine reaches more than its callers may: services of this machine, a cloud's metadata address, the networks around.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from isthmus.errors import LocalError, RequestMalformed
from isthmus.http import sockets
from isthmus_tools.engine.fleet import IN_CLUSTER

MAX_URL_CHARACTERS = 2048
RESOLVE_TIMEOUT_S = 2.0
"""How long the name in an X-Callback-Url may take to be resolved."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PRINTABLE = re.compile(r"[!-~]+")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_CALLS = ("/function/", "/async-function/")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks in CIDR notation, such as 127.0.0.0/8 or fd00::/8; a plain address is a network of one.

    Raises:
        LocalError: one of them is none.
    """
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as e:
        raise LocalError(f"{e}; a network that callbacks may reach is written 127.0.0.0/8 or 10.1.2.3") from e


class CallbackPolicy:
    """Callbacks reach public addresses, those in `allowed`, and the gateway's own functions by its name in a cluster.

    `gateway` is the engine's own URL, of which no callback reaches anything but function calls.
    """

    def __init__(self, gateway: str, allowed: Sequence[Network] = ()) -> None:
        self._gateway = URL(gateway)
        self._allowed = tuple(allowed)

    async def check(self, text: str) -> URL:
        """The URL in `text`, where results may be sent there.

        A name that does not resolve at this moment passes: its addresses are checked again when it is called.

        Raises:
            RequestMalformed: no http URL with a host, or one that leads to an address that is not permitted.
        """
        named = IN_CLUSTER.match(text)
        url = _parse(text if named is None else f"{self._gateway.origin()}{text[named.end() :]}")
        host = url.host or ""
        if named is not None:
            self._check_path(url)
            return url
        addresses = await _addresses(host, url.port or 0)
        if addresses and not any(map(self.permits, addresses)):
            raise RequestMalformed(
                f"X-Callback-Url leads to {host}, which is not public",
                hint="`isthmus up --allow-callbacks 127.0.0.0/8` lets callbacks reach that network",
            )
        if url.port == self._gateway.port and any(map(self._is_own, addresses)):
            self._check_path(url)
        return url

    def permits(self, address: Address) -> bool:
        """Whether callbacks may reach `address`."""
        address = _embedded(address)
        return any(address in network for network in self._allowed) or (
            address.is_global and not address.is_multicast and not address.is_reserved
        )

    def _is_own(self, address: Address) -> bool:
        own = ipaddress.ip_address(self._gateway.host or "")
        address = _embedded(address)
        return own.is_unspecified or address == own or (own.is_loopback and not address.is_global)

    def _check_path(self, url: URL) -> None:
        if not url.raw_path.startswith(_CALLS):
            raise RequestMalformed("X-Callback-Url is this gateway's, of which only function calls can be called back")


class PermittedOnly(AbstractResolver):
    """Resolves names to permitted addresses: one that changed since it was checked leads nowhere else."""

    def __init__(self, policy: CallbackPolicy) -> None:
        self._policy = policy

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """See `AbstractResolver.resolve`.

        Raises:
            OSError: the name is unknown, or none of its addresses is permitted.
        """
        permitted = [
            ResolveResult(
                hostname=host,
                host=str(sockaddr[0]),
                port=port,
                family=found,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for found, _, protocol, _, sockaddr in await _look_up(host, port)
            if family in (socket.AF_UNSPEC, found) and self._policy.permits(_address(str(sockaddr[0])))
        ]
        if not permitted:
            raise OSError(f"{host} leads to no address that callbacks may reach")
        return permitted

    async def close(self) -> None:
        """Nothing is held."""


def _parse(text: str) -> URL:
    if len(text) > MAX_URL_CHARACTERS:
        raise RequestMalformed(f"X-Callback-Url has {len(text)} characters; at most {MAX_URL_CHARACTERS} are taken")
    if not _PRINTABLE.fullmatch(text):
        raise RequestMalformed("X-Callback-Url holds spaces, control characters or others that a URL writes as %XX")
    try:
        # As it is: a signed URL quoted anew would be another one.
        url = URL(text, encoded=True)
        host = url.host or ""
    except ValueError as e:  # UnicodeError among them
        raise RequestMalformed(f"X-Callback-Url is no URL: {e}") from e
    if url.scheme not in ("http", "https") or not host:
        raise RequestMalformed("X-Callback-Url must be an http or https URL with a host")
    if not url.port:
        raise RequestMalformed("X-Callback-Url has the port 0, where nothing can listen")
    if not _is_host(host):
        raise RequestMalformed(f"X-Callback-Url names the host {host[:80]!r}, which is neither a name nor an address")
    return url


def _is_host(text: str) -> bool:
    """Whether `text` is an address, or a name that can be resolved: no empty label, and no number such as 127.1."""
    if _literal(text) is not None:
        return True
    labels = text.removesuffix(".").split(".")
    return len(text) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()


def _literal(text: str) -> Address | None:
    try:
        return _address(text)
    except ValueError:
        return None


def _address(text: str) -> Address:
    return ipaddress.ip_address(text.partition("%")[0])


async def _addresses(host: str, port: int) -> list[Address]:
    """The addresses of `host`; none where they are not known in time."""
    if (literal := _literal(host)) is not None:
        return [literal]
    try:
        return [_address(str(entry[4][0])) for entry in await _look_up(host, port)]
    except OSError:  # TimeoutError among them
        return []


async def _look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    """The addresses of `host` as `socket.getaddrinfo` gives them; OSError where they are not known in time."""
    async with asyncio.timeout(RESOLVE_TIMEOUT_S):
        return await asyncio.to_thread(sockets.resolve, host, port, timeout_s=RESOLVE_TIMEOUT_S)


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 address leads to, where it is mapped, 6to4 or NAT64; else `address`."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
