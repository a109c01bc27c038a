"""Security of running functions as a stranger sees them through a gateway, and as a holder of the keys does."""

from __future__ import annotations

import email.utils
import ssl
import time
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from isthmus.client import Client
from isthmus.context import Deadline
from isthmus.errors import (
    CallerUnknown,
    HopError,
    HopRejected,
    HopTimeout,
    HopUnavailable,
    IsthmusError,
    ProfilingOff,
    http_status,
)
from isthmus.http.sockets import connect
from isthmus.http.tls import TlsTrust, open_trust
from isthmus.pipeline import HttpHop
from isthmus.security.protected_call import CallProtection, open_protection
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus.wire.frame import CONTENT_TYPE
from isthmus_tools.engine.stack import Stack
from isthmus_tools.usecases.secret_checks import DAY_S, EXPIRING_DAYS
from isthmus_tools.usecases.security_findings import SecurityFinding, Severity, judged, unknown
from isthmus_tools.usecases.stack_security import is_router, is_segment_function

# No bundle has this digest: a call that is let in ends in 404, and nothing runs.
_NO_BUNDLE = "sha256:" + "0" * 64
# The default of the setting hop_clock_skew_s; protected calls fail beyond it.
MAX_SKEW_S = 30.0
# Replies of a load are short; more is no function of Isthmus.
_MAX_REPLY_BYTES = 2**20


def gateway_findings(
    gateway: str, stack: Stack, settings: RegistrySettings, timeout_s: float
) -> Iterator[SecurityFinding]:
    """What a gateway and the stack's functions behind it leave open; functions that are not there are left out.

    Raises:
        SettingsError: the secret hop-keys or a file for TLS cannot be used.
        HopError: the gateway cannot be reached.
    """
    trust = open_trust(settings)
    protection = open_protection(SegmentSettings(**vars(settings)))
    yield from _transport(gateway, trust, timeout_s)
    yield _administration(gateway, trust, timeout_s)
    for name, function in stack.functions.items():
        url = f"{gateway}/function/{name}"
        probe = FunctionProbe(name, url, trust, timeout_s)
        if not probe.is_deployed():
            continue
        yield from probe.clock()
        if is_segment_function(function):
            yield probe.runs_for_strangers()
            yield probe.profiles()
            yield from probe.keys(protection)
        elif is_router(function):
            yield probe.serves_strangers(is_here=_is_here(gateway))


class FunctionProbe:
    """Calls to a function that show what it lets in, and run nothing."""

    def __init__(self, name: str, url: str, trust: TlsTrust, timeout_s: float) -> None:
        self._name, self._url, self._trust, self._timeout_s = name, url, trust, timeout_s
        self._client = Client(url, timeout_s=timeout_s, trust=trust, api_key="")
        self._headers: Mapping[str, str] = {}
        self._answered_at = 0.0

    def is_deployed(self) -> bool:
        """Whether the gateway knows the function, and it is ready.

        Raises:
            HopError: the gateway cannot be reached.
        """
        began = time.time()
        try:
            self._headers = self._client.get("/ready").headers
        except HopRejected:
            return False
        except HopError:
            raise
        except IsthmusError:
            return True  # its own error: loading, or for callers alone
        self._answered_at = (began + time.time()) / 2
        return True

    def clock(self) -> Iterator[SecurityFinding]:
        """How far the function's clock is from this machine's; a header has whole seconds."""
        try:
            there = email.utils.parsedate_to_datetime(self._headers["date"]).timestamp()
        except (KeyError, ValueError):
            return
        off_s = abs(there - self._answered_at)
        severity: Severity = "high" if off_s > MAX_SKEW_S else "medium"
        yield judged(
            "clock",
            severity,
            [self._name] if off_s > MAX_SKEW_S / 2 else [],
            f"its clock differs from this machine's by {off_s:.0f} s; protected calls fail beyond {MAX_SKEW_S:.0f} s",
            "have all machines take their time from NTP",
            right=f"the clock of {self._name} is right within {MAX_SKEW_S / 2:.0f} s",
        )

    def runs_for_strangers(self) -> SecurityFinding:
        """Whether the function reads a frame of someone without a key."""
        return self._judge(
            "strangers",
            "critical",
            not _is_closed(self._refusal("/", CONTENT_TYPE)),
            "it reads frames of callers without a key: whoever reaches the gateway can run every segment",
            "give it and the router the secret hop-keys: docs/reference/sealing.md",
            f"{self._name} refuses callers without a key",
        )

    def serves_strangers(self, *, is_here: bool) -> SecurityFinding:
        """Whether the router takes a request of someone without credentials; on this machine it may take ours alone."""
        is_closed = _is_closed(self._refusal("/", "image/png"))
        if is_here and not is_closed:
            text = "it serves this machine without credentials; whether it serves others cannot be seen from here"
            return unknown("callers", "high", self._url, text, "name the gateway by an address of its network")
        return self._judge(
            "callers",
            "high",
            not is_closed,
            "the router serves whoever reaches the gateway",
            "configure callers, or put an ingress before the gateway that authenticates",
            "the router refuses callers without credentials",
        )

    def profiles(self) -> SecurityFinding:
        """Whether the function measures for holders of a token."""
        refusal = self._refusal("/profile", CONTENT_TYPE)
        is_off = isinstance(refusal, ProfilingOff | CallerUnknown)
        return self._judge(
            "profiling",
            "low",
            not is_off,
            "holders of profile-token can have segments run and measured",
            "take the secret profile-token from the function once profiles are stored",
            f"profiling is off at {self._name}",
        )

    def keys(self, protection: CallProtection | None) -> Iterator[SecurityFinding]:
        """Whether the function has the key of the folder of secrets; asks for a segment that cannot exist."""
        if protection is None:
            return
        # Through a real hop: its key, cipher and clock are those of a router.
        hop = HttpHop(
            self._url,
            attempts=1,
            connect_timeout_s=self._timeout_s,
            max_reply_bytes=_MAX_REPLY_BYTES,
            protection=protection,
            trust=self._trust,
        )
        try:
            hop.load(_NO_BUNDLE, "..", Deadline.after(self._timeout_s))
        except HopRejected as e:
            error = e.facts.get("error") or {}
            refused = [self._name] if e.facts.get("status") == 401 else []
            yield judged(
                "one-key",
                "high",
                refused,
                f"it refuses calls with the key of this folder: {error.get('error', 'another key, or clock')}",
                "give all functions the same hop-keys, and their clocks the same time",
                right=f"{self._name} has the same key",
            )
        except IsthmusError as e:
            yield unknown("one-key", "high", self._name, e.message, e.hint)
        finally:
            hop.close()

    def _judge(
        self, check: str, severity: Severity, is_open: bool, observed: str, advice: str, right: str
    ) -> SecurityFinding:
        return judged(check, severity, [self._url] if is_open else [], observed, advice, right=right)

    def _refusal(self, path: str, content_type: str) -> IsthmusError | None:
        """The error of an empty body without credentials; None where even that is served."""
        try:
            self._client.post(path, [b""], {"Content-Type": content_type}, {})
        except IsthmusError as e:
            return e
        return None


def _is_here(gateway: str) -> bool:
    return urlsplit(gateway).hostname in ("127.0.0.1", "localhost", "::1")


def _is_closed(error: IsthmusError | None) -> bool:
    """Whether a refusal is for want of credentials: the function's own, or that of a proxy before it."""
    if isinstance(error, HopRejected):
        return error.facts.get("status") in (401, 403)
    return error is not None and http_status(error) in (401, 403)


def _transport(gateway: str, trust: TlsTrust, timeout_s: float) -> Iterator[SecurityFinding]:
    """Whether callers reach the gateway by TLS, and for how long its certificate is valid."""
    # Of https the certificate was verified by then: what is left is how long it holds.
    parts = urlsplit(gateway)
    host = parts.hostname or ""
    if parts.scheme == "http":
        yield judged(
            "gateway-tls",
            "high",
            [] if _is_here(gateway) else [gateway],
            "requests and predictions travel readable, over http",
            "put TLS before the gateway: docs/how-to/tls.md",
            right=f"{gateway} is on this machine",
        )
        return
    try:
        with connect(host, parts.port or 443, timeout_s=timeout_s, tls=trust.context()) as sock:
            certificate = sock.getpeercert() if isinstance(sock, ssl.SSLSocket) else None
    except OSError as e:
        yield unknown("gateway-tls", "high", gateway, str(e)[:200], "docs/how-to/tls.md, What a refusal is called")
        return
    days = (ssl.cert_time_to_seconds(str((certificate or {})["notAfter"])) - time.time()) / DAY_S
    yield judged(
        "gateway-tls",
        "medium",
        [gateway] if days < EXPIRING_DAYS else [],
        f"its certificate expires in {days:.0f} days",
        "renew it",
        right=f"{gateway} has a trusted certificate for {days:.0f} more days",
    )


def _administration(gateway: str, trust: TlsTrust, timeout_s: float) -> SecurityFinding:
    """Whether the gateway lets strangers list, and so deploy, functions."""
    try:
        Client(gateway, timeout_s=timeout_s, trust=trust, api_key="").get("/system/functions")
        wrong = [gateway]
    except (HopTimeout, HopUnavailable):
        raise
    except IsthmusError:
        wrong = []
    return judged(
        "administration",
        "critical",
        wrong,
        "anybody may list, deploy and delete functions: the gateway asks for no login",
        "turn on the gateway's basic authentication",
        right="the gateway asks for a login before it changes functions",
    )
