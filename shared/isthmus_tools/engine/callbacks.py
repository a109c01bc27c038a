"""Policy for callback URLs, against server-side request forgery: a caller names an address that the engine calls.

The engine reaches services that its callers may not: this machine's, a cloud's metadata address, local networks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from isthmus.errors import LocalError, RequestMalformed
from isthmus.http import sockets
from isthmus.http.addresses import (
    Address,
    AddressPolicy,
    Network,
    embedded_address,
    literal_address,
    parse_address,
    parse_networks,
    parse_url,
)
from isthmus_tools.engine.fleet import IN_CLUSTER_GATEWAY

RESOLVE_TIMEOUT_S = 2.0
"""Timeout for resolving the host of an X-Callback-Url."""

_CALLS = ("/function/", "/async-function/")


def networks_of(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks that callbacks may reach, in CIDR notation; a plain address is a network of one address.

    Raises:
        LocalError: a text is no network.
    """
    try:
        return parse_networks(texts)
    except ValueError as e:
        raise LocalError(f"{e}; a network that callbacks may reach is written 127.0.0.0/8 or 10.1.2.3") from e


class CallbackPolicy(AddressPolicy):
    """Permits public addresses, addresses in `allowed`, and functions of this gateway by its in-cluster name.

    `gateway` is the engine's own URL: callbacks reach function calls of the gateway and nothing else.
    """

    def __init__(self, gateway: str, allowed: Sequence[Network] = ()) -> None:
        self._gateway = URL(gateway)
        super().__init__(allowed)

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

    def _is_own(self, address: Address) -> bool:
        # A gateway on 0.0.0.0 is reached by every address of this machine.
        own = ipaddress.ip_address(self._gateway.host or "")
        address = embedded_address(address)
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
            if family in (socket.AF_UNSPEC, address_family) and self._policy.permits(parse_address(str(sockaddr[0])))
        ]
        if not permitted:
            raise OSError(f"{host} leads to no address that callbacks may reach")
        return permitted

    async def close(self) -> None:
        """No-op: the resolver has no resources."""


def _parse(text: str) -> URL:
    try:
        parts = parse_url(text)
        # Stored as quoted: quoting again would break the signature of a signed URL.
        url = URL(text, encoded=True)
    except ValueError as e:  # includes UnicodeError
        raise RequestMalformed(f"X-Callback-Url {e}") from e
    # The address that was checked and the address of the connection must not differ by two readings of one text.
    if (url.host or "").lower() != parts.hostname:
        raise RequestMalformed("X-Callback-Url has a host that can be read in two ways")
    return url


async def _addresses(host: str, port: int) -> list[Address]:
    """Addresses of `host`, empty if resolution fails or times out."""
    if (literal := literal_address(host)) is not None:
        return [literal]
    try:
        return [parse_address(str(entry[4][0])) for entry in await _look_up(host, port)]
    except OSError:  # includes TimeoutError
        return []


async def _look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    """Entries of `socket.getaddrinfo`; OSError if resolution fails or times out."""
    async with asyncio.timeout(RESOLVE_TIMEOUT_S):
        return await asyncio.to_thread(sockets.resolve, host, port, timeout_s=RESOLVE_TIMEOUT_S)
