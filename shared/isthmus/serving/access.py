"""Access to a function: every request is authenticated, held against the table of roles, and counted by its caller.

Source: docs/how-to/callers.md.
"""

from __future__ import annotations

import base64
import binascii
import functools
import ipaddress
import logging
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from flask import Request
from werkzeug.datastructures import Headers

from isthmus.context import ROUTE_HEADER
from isthmus.errors import CallerForbidden, CallerUnauthenticated, SettingsError
from isthmus.security.caller_keys import CallerFile
from isthmus.security.callers import EVERYONE, Caller, CallerLimits, Role
from isthmus.security.rate_limits import RateLimiter, rate_headers
from isthmus.serving.route_roles import Need
from isthmus.settings import AccessSettings

# Tokens of identity providers with many groups have some thousand bytes.
MAX_CREDENTIAL_BYTES = 16 * 2**10
REALM = "isthmus"
# By their names in a WSGI environment: every request of an open function looks for all of these.
_FORWARDED = {
    "HTTP_X_FORWARDED_FOR": "X-Forwarded-For",
    "HTTP_X_FORWARDED_HOST": "X-Forwarded-Host",
    "HTTP_X_REAL_IP": "X-Real-Ip",
    "HTTP_FORWARDED": "Forwarded",
    "HTTP_VIA": "Via",
}
# The longest name (RFC 1035, 2.3.4) with a port and a dot at its end. Longer texts are no hosts, and fill no cache.
_MAX_HOST = 260
_UNCONFIGURED = (
    "create a key with `isthmus caller new NAME --role infer` and give the function the secret callers, or set"
    " access=anyone to open it to whoever reaches it: docs/how-to/callers.md"
)


@dataclass(frozen=True)
class AdmittedCaller:
    """An admitted request: its caller, the roles needed for its model, and headers of the caller's limits."""

    caller: Caller
    roles: tuple[Role, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_authenticated(self) -> bool:
        """Whether the caller has shown a key or token."""
        return self.caller is not EVERYONE


ADMITTED: ContextVar[AdmittedCaller | None] = ContextVar("grant", default=None)
"""Of the request that this thread works on; None outside of requests, where nothing is refused."""


def permit_model(reference: str) -> None:
    """Refuse a model, NAME or NAME:VERSION, that this thread's request may not use.

    Raises:
        CallerForbidden: whether or not there is such a model.
    """
    if (grant := ADMITTED.get()) is None:
        return
    name = reference.partition(":")[0]
    for role in grant.roles:
        if not grant.caller.may(role, name):
            raise _forbidden(grant.caller, role, name[:80])


def may_see(name: str) -> bool:
    """Whether lists that this thread's request asks for have the model of that name."""
    grant = ADMITTED.get()
    return grant is None or all(grant.caller.may(role, name) for role in grant.roles)


class Access:
    """Admits the requests of a function whose routes have the needs of `table`, by endpoint."""

    def __init__(self, settings: AccessSettings, table: Mapping[str, Need], log: logging.Logger) -> None:
        self._settings, self._table, self._log = settings, table, log
        self._keys = CallerFile(settings.secrets_dir, self._report)
        self._tokens = None
        if settings.takes_tokens:
            from isthmus.security.tokens import open_tokens  # a function without an issuer never loads the library

            self._tokens = open_tokens(settings)
        self.names_callers = self._keys.is_configured or self._tokens is not None
        self._limiter = RateLimiter()
        limits = CallerLimits(settings.caller_requests_per_s, settings.caller_bytes_per_s, settings.caller_burst_s)
        self._limits = limits if limits.requests_per_s or limits.bytes_per_s else None

    def warn(self) -> None:
        """Log a warning at the start where the function is open, or where no caller has a key yet."""
        if self._settings.access == "anyone":
            text = "access=anyone: whoever reaches this function may use it"
        elif not self.names_callers:
            text = "no callers are configured: requests are taken of this machine alone"
            if self._settings.fprocess:
                text += ", and behind of-watchdog that is nobody: it cannot be known where requests come from"
        else:
            return
        self._log.warning(text, extra={"facts": {"hint": _UNCONFIGURED}})

    def admit(self, request: Request) -> AdmittedCaller:
        """The grant of a request, before its body is read.

        Raises:
            CallerUnauthenticated: no key or token, or none that is taken.
            CallerForbidden: the caller does not have the role for any model, or the route has no row.
            CallerLimited: the caller's limits.
            IssuerUnavailable: a token, and no keys to verify it.
        """
        endpoint, headers = request.endpoint, request.headers
        need = self._table.get(endpoint or "")
        if need is not None and need.is_open:
            return AdmittedCaller(EVERYONE)
        credential = credential_of(headers)
        caller = self._caller(credential, request.environ, need)
        if endpoint is None:  # authenticated callers get the 404 of an unknown path
            return AdmittedCaller(caller)
        if need is None:
            raise CallerForbidden(f"the route {endpoint} has no row in the table of roles, so nobody may use it")
        is_pinned = bool(headers.get(ROUTE_HEADER)) or any(request.args.get(name) for name in need.pins)
        roles = tuple(role for role in (need.role, Role.PIN if is_pinned else None) if role is not None)
        for role in roles:
            if not caller.has(role):
                raise _forbidden(caller, role)
        limits = caller.limits or self._limits
        if limits is None or need.by_itself:
            return AdmittedCaller(caller, roles)
        states = self._limiter.take(caller.name, limits, int(request.environ.get("CONTENT_LENGTH") or 0))
        return AdmittedCaller(caller, roles, rate_headers(states))

    def _caller(self, credential: str, environ: Mapping[str, Any], need: Need | None) -> Caller:
        if need is not None and need.by_itself:
            # The credential may be of another kind: the profile's token.
            return self._keys.find(credential) or EVERYONE if credential else EVERYONE
        if self.names_callers and credential:
            return self._known(credential)
        if self._settings.access == "anyone":
            return EVERYONE
        if self.names_callers:
            raise CallerUnauthenticated(
                "this function needs an API key or a token",
                reason="missing",
                hint="send Authorization: Bearer KEY, or X-API-Key: KEY; calls between functions need hop-keys",
            )
        if self._settings.fprocess or (stranger := stranger_in(environ)):
            where = "" if self._settings.fprocess else f", and this one came over {stranger[:80]}"
            raise CallerUnauthenticated(
                f"no callers are configured, so requests are taken of the function's own machine alone{where}",
                reason="not_configured",
                hint=_UNCONFIGURED,
            )
        return EVERYONE

    def _known(self, credential: str) -> Caller:
        if len(credential) > MAX_CREDENTIAL_BYTES:
            raise CallerUnauthenticated(
                f"the key or token has more than {MAX_CREDENTIAL_BYTES} bytes", reason="malformed"
            )
        if not credential.isascii() or not credential.isprintable() or " " in credential:
            raise CallerUnauthenticated("the key or token holds characters that none has", reason="malformed")
        if self._tokens is not None and credential.count(".") == 2:
            return self._tokens.verify(credential)
        if (caller := self._keys.find(credential)) is None:
            raise CallerUnauthenticated(
                "the API key is not one of this function's",
                reason="unknown",
                hint="a key is printed once, by `isthmus caller new NAME`; the secret callers has its entry",
            )
        return caller

    def _report(self, error: SettingsError) -> None:
        self._log.error("the callers stay as they were: %s", error.message, extra={"facts": {"hint": error.hint}})


def credential_of(headers: Headers) -> str:
    """The key or token of a request: of X-API-Key, else of Authorization as a bearer or, from browsers, a password.

    Empty where there is none; faas-cli without a login sends an empty bearer.
    """
    if key := headers.get("X-API-Key", "").strip():
        return key
    scheme, _, text = headers.get("Authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return text.strip()
    if scheme.lower() == "basic" and len(text) <= 2 * MAX_CREDENTIAL_BYTES:
        # Browsers send the password of their dialogue with every request, a foreign page's too.
        if headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            return ""
        try:
            return base64.b64decode(text.strip(), validate=True).decode("ascii").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def stranger_in(environ: Mapping[str, Any]) -> str:
    """The part of a request that names another machine; empty for a request of this machine.

    Headers can be forged or absent, and a relay on this machine may hide where a request came from: headers only ever
    refuse here. The host, and the origin of a page, are those that a browser was sent to (DNS rebinding).
    """
    peer = str(environ.get("REMOTE_ADDR", ""))
    if not _is_loopback(peer):
        return f"the address {peer}"
    if not _is_local_host(environ.get("HTTP_HOST", "localhost")):
        return "the host of its header Host"
    if (origin := environ.get("HTTP_ORIGIN")) is not None and not _is_local_host(origin.partition("://")[2]):
        return "a page of another origin"
    for key, name in _FORWARDED.items():
        if not (value := environ.get(key)):
            continue
        texts = value.split(",") if name != "X-Forwarded-Host" else [value]
        if any(text.strip() and not _is_local_host(text.strip()) for text in texts):
            return f"the proxy that its header {name} names"
    return ""


def challenges(headers: Headers, method: str) -> list[str]:
    """The values of WWW-Authenticate: a browser asks for a key where it opens a page, and nowhere else."""
    is_page = method == "GET" and "text/html" in headers.get("Accept", "")
    return [f'Bearer realm="{REALM}"', *([f'Basic realm="{REALM}: the password is the API key"'] if is_page else [])]


def _is_local_host(text: str) -> bool:
    return len(text) <= _MAX_HOST and _is_local_name(text)


# Clients send the same few hosts with every request.
@functools.lru_cache(256)
def _is_local_name(text: str) -> bool:
    if _is_loopback(text):
        return True
    try:
        host = urlsplit(f"//{text}").hostname if text.isascii() and text.isprintable() and "@" not in text else None
    except ValueError:
        return False
    return host is not None and (host == "localhost" or host.endswith(".localhost") or _is_loopback(host))


@functools.lru_cache(256)
def _is_loopback(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _forbidden(caller: Caller, role: Role, model: str = "") -> CallerForbidden:
    about = f" for the model {model!r}" if model else ""
    return CallerForbidden(
        f"the caller {caller.name} does not have the role {role.value}{about}",
        role=role.value,
        **({"model": model} if model else {}),
        hint="whoever administers the secret callers, or issues the token, grants roles",
    )
