"""Policy for callback URLs, against server-side request forgery: a caller names an address that the engine calls.

The engine reaches services that its callers may not: this machine's, a cloud's metadata address, local networks.
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
from isthmus_tools.engine.fleet import IN_CLUSTER_GATEWAY

MAX_URL_CHARACTERS = 2048  # kept in memory with each queued call
RESOLVE_TIMEOUT_S = 2.0
"""Timeout for resolving the host of an X-Callback-Url."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Control characters and line breaks would split the request line or a log line.
_PRINTABLE = re.compile(r"[!-~]+")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_CALLS = ("/function/", "/async-function/")
# RFC 6052: an IPv4 address behind this prefix is reached through the NAT64 gateway.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks in CIDR notation, such as 127.0.0.0/8 or fd00::/8; a plain address is a network of one address.

    Raises:
        LocalError: a text is no network.
    """
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as e:
        raise LocalError(f"{e}; a network that callbacks may reach is written 127.0.0.0/8 or 10.1.2.3") from e


class CallbackPolicy:
    """Permits public addresses, addresses in `allowed`, and functions of this gateway by its in-cluster name.

    `gateway` is the engine's own URL: callbacks reach function calls of the gateway and nothing else.
    """

    def __init__(self, gateway: str, allowed: Sequence[Network] = ()) -> None:
        self._gateway = URL(gateway)
        self._allowed = tuple(allowed)

    async def check(self, text: str) -> URL:
        """Parse a callback URL and check its addresses.

        A name that does not resolve now passes: `PermittedResolver` checks the addresses at the call.

        Raises:
            RequestMalformed: not an http URL with a host, or its addresses are not permitted.
        """
        gateway = IN_CLUSTER_GATEWAY.match(text)
        url = _parse(text if gateway is None else f"{self._gateway.origin()}{text[gateway.end() :]}")
        host = url.host or ""
        if gateway is not None:
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
        # A gateway on 0.0.0.0 is reached by every address of this machine.
        own = ipaddress.ip_address(self._gateway.host or "")
        address = _embedded(address)
        return own.is_unspecified or address == own or (own.is_loopback and not address.is_global)

    def _check_path(self, url: URL) -> None:
        if not url.raw_path.startswith(_CALLS):
            raise RequestMalformed("X-Callback-Url is this gateway's, of which only function calls can be called back")


class PermittedResolver(AbstractResolver):
    """Resolver of permitted addresses alone: a name may resolve to another address than when it was checked."""

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
                family=address_family,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address_family, _, protocol, _, sockaddr in await _look_up(host, port)
            if family in (socket.AF_UNSPEC, address_family) and self._policy.permits(_address(str(sockaddr[0])))
        ]
        if not permitted:
            raise OSError(f"{host} leads to no address that callbacks may reach")
        return permitted

    async def close(self) -> None:
        """No-op: the resolver has no resources."""


def _parse(text: str) -> URL:
    if len(text) > MAX_URL_CHARACTERS:
        raise RequestMalformed(f"X-Callback-Url has {len(text)} characters; at most {MAX_URL_CHARACTERS} are taken")
    if not _PRINTABLE.fullmatch(text):
        raise RequestMalformed("X-Callback-Url holds spaces, control characters or others that a URL writes as %XX")
    try:
        # Kept as quoted: quoting anew would break the signature of a signed URL.
        url = URL(text, encoded=True)
        host = url.host or ""
    except ValueError as e:  # includes UnicodeError
        raise RequestMalformed(f"X-Callback-Url is no URL: {e}") from e
    if url.scheme not in ("http", "https") or not host:
        raise RequestMalformed("X-Callback-Url must be an http or https URL with a host")
    if not url.port:
        raise RequestMalformed("X-Callback-Url has the port 0, where nothing can listen")
    if not _is_host(host):
        raise RequestMalformed(f"X-Callback-Url names the host {host[:80]!r}, which is neither a name nor an address")
    return url


def _is_host(text: str) -> bool:
    """Whether `text` is an address or a DNS name, without empty labels; 127.1 is neither."""
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
    """Addresses of `host`, empty if resolution fails or times out."""
    if (literal := _literal(host)) is not None:
        return [literal]
    try:
        return [_address(str(entry[4][0])) for entry in await _look_up(host, port)]
    except OSError:  # includes TimeoutError
        return []


async def _look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    """Entries of `socket.getaddrinfo`; OSError if resolution fails or times out."""
    async with asyncio.timeout(RESOLVE_TIMEOUT_S):
        return await asyncio.to_thread(sockets.resolve, host, port, timeout_s=RESOLVE_TIMEOUT_S)


def _embedded(address: Address) -> Address:
    """The IPv4 address inside a mapped, 6to4 or NAT64 address, else `address`."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
