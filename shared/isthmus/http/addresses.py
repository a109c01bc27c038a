"""Which addresses a URL of somebody else's choice may lead to, and which hosts are this machine's or the cluster's.

The former is against server-side request forgery. A callback's URL is called by a process that reaches services which
the URL's author may not: its own machine, a cloud's metadata address, local networks.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from urllib.parse import SplitResult, urlsplit

MAX_URL_CHARACTERS = 2048
"""A URL is stored with each queued call."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Control characters and line breaks would split the request line or a log line.
_PRINTABLE = re.compile(r"[!-~]+")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
# Names of Kubernetes' DNS, which lead to no other host than the cluster's.
_IN_CLUSTER = (".svc", ".svc.cluster.local")
# RFC 3879: private addresses of old IPv6 networks, global to `ipaddress`.
_SITE_LOCAL = ipaddress.IPv6Network("fec0::/10")
# RFC 6052: an IPv4 address behind this prefix is reached through the NAT64 gateway.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks in CIDR notation, such as 127.0.0.0/8 or fd00::/8; a plain address is a network of one address.

    Raises:
        ValueError: a text is no network.
    """
    return tuple(ipaddress.ip_network(text) for text in texts)


def parse_address(text: str) -> Address:
    """An address as `socket.getaddrinfo` writes it, where IPv6 may have a scope.

    Raises:
        ValueError: not an address.
    """
    return ipaddress.ip_address(text.partition("%")[0])


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback interface: an address of that, or `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_near(host: str) -> bool:
    """Whether a host is this machine or a service of the cluster: a name without dots, such as faasd's gateway."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return "." not in host or host.endswith(_IN_CLUSTER)


class AddressPolicy:
    """Permits public addresses and those in `allowed`."""

    def __init__(self, allowed: Sequence[Network] = ()) -> None:
        self._allowed = tuple(allowed)

    def permits(self, address: Address) -> bool:
        """Whether a connection to `address` is permitted; an IPv4 address inside an IPv6 one counts as itself."""
        address = embedded_address(address)
        is_special = address.is_multicast or address.is_reserved or address in _SITE_LOCAL
        return any(address in network for network in self._allowed) or (address.is_global and not is_special)


def embedded_address(address: Address) -> Address:
    """The IPv4 address inside a mapped, 6to4 or NAT64 address, else `address`."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def parse_url(text: str) -> SplitResult:
    """An http or https URL with a host and a port that a connection can be made to; quoting stays as it is.

    Raises:
        ValueError: any other text; the message is the predicate of a sentence about the URL, such as `is no URL`.
    """
    if len(text) > MAX_URL_CHARACTERS:
        raise ValueError(f"has {len(text)} characters; at most {MAX_URL_CHARACTERS} are taken")
    if not _PRINTABLE.fullmatch(text):
        raise ValueError("holds spaces, control characters or others that a URL writes as %XX")
    try:
        url = urlsplit(text)
        host, port = url.hostname or "", url.port
    except ValueError as e:
        raise ValueError(f"is no URL: {e}") from e
    if url.scheme not in ("http", "https") or not host:
        raise ValueError("must be an http or https URL with a host")
    if port == 0:
        raise ValueError("has the port 0, where nothing can listen")
    if not _is_host(host):
        raise ValueError(f"names the host {host[:80]!r}, which is neither a name nor an address")
    return url


def literal_address(host: str) -> Address | None:
    """The address that `host` is; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_host(text: str) -> bool:
    """Whether `text` is an address without a scope, or a DNS name without empty labels; 127.1 is neither."""
    if literal_address(text) is not None:
        return "%" not in text
    labels = text.removesuffix(".").split(".")
    return len(text) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()
