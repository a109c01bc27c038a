"""Results by POST to a URL: signed, repeated while the receiver is away, and only to permitted addresses."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from urllib.parse import quote

import stamina

from isthmus.context import Deadline
from isthmus.errors import BrokerRefused, BrokerUnavailable, ConfigurationMalformed
from isthmus.events.broker import check_size
from isthmus.events.configuration import CallbackPlace, where_of
from isthmus.events.message import Message
from isthmus.events.places.signing import sign, signing_keys
from isthmus.http.addresses import AddressPolicy, parse_networks, parse_url
from isthmus.http.pool import BrokenOff, ConnectionPool, ResponseTooLong, Unreachable, retry_after_seconds
from isthmus.http.sockets import AddressRefused
from isthmus.retries import backoff

MAX_BODY_BYTES = 64 * 2**20
"""A result is in memory until its callback has responded."""
ATTEMPTS = 5
MAX_TOTAL_S = 60.0
"""For all attempts of a result; the trigger repeats the result later where the receiver stays away."""
_ATTEMPT_S, _CONNECT_S = 15.0, 5.0
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.2, 10.0
# The body of a response is not used; its first bytes may tell a reason, which logs do not show to others.
_MAX_RESPONSE_BYTES = 4096
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
# Headers of a connection, credentials of the request that led to the result, and those that this module writes.
_OWN = frozenset(
    (
        "authorization",
        "connection",
        "content-length",
        "cookie",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-call-id",
        "x-callback-url",
        "webhook-id",
        "webhook-signature",
        "webhook-timestamp",
    )
)
_TRANSIENT = frozenset((408, 425, 429))


class CallbackPublisher:
    """Sends each message to one URL, with the headers of OpenFaaS's callbacks; redirects are not followed.

    `secret` is the text of the secret that `place.signing_secret` names.

    Raises:
        ConfigurationMalformed: the URL or a network of `allow` is none.
        SettingsError: the secret cannot sign.
    """

    def __init__(self, place: CallbackPlace, secret: str = "", *, clock: Callable[[], float] = time.time) -> None:
        try:
            parse_url(place.url)
        except ValueError as e:
            raise ConfigurationMalformed(f"the URL of a callback {e}", where="url") from e
        try:
            policy = AddressPolicy(parse_networks(place.allow))
        except ValueError as e:
            raise ConfigurationMalformed(f"allow of a callback: {e}", where="allow") from e
        self._url, self._clock = where_of(place), clock
        self._keys = signing_keys(secret, place.signing_secret) if place.signing_secret else ()
        self._pool = ConnectionPool(place.url, connect_timeout_s=_CONNECT_S, permits=policy.permits)

    @property
    def url(self) -> str:
        return self._url

    @property
    def max_bytes(self) -> int:
        return MAX_BODY_BYTES

    def publish(self, message: Message) -> None:
        """Post until a response has a status of 2xx, at most ATTEMPTS times and MAX_TOTAL_S seconds.

        Raises:
            MessageTooLarge: beyond MAX_BODY_BYTES.
            BrokerUnavailable: no response, or 408, 425, 429 or 5xx, at the last attempt as well.
            BrokerRefused: any other status, redirects among them, or an address that is not permitted.
        """
        check_size(message, MAX_BODY_BYTES)
        pauses = backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S)

        def pause_after(error: Exception) -> bool | float:
            return isinstance(error, BrokerUnavailable) and float(error.facts.get("retry_after_s") or next(pauses))

        deadline = Deadline.after(MAX_TOTAL_S)
        caller = stamina.RetryingCaller(attempts=ATTEMPTS, timeout=MAX_TOTAL_S)
        caller(pause_after, self._post, message, deadline)

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close()

    def _post(self, message: Message, deadline: Deadline) -> None:
        headers = callback_headers(message)
        if self._keys:  # each attempt is signed with its own time
            headers |= sign(self._keys, message.id, message.body, self._clock())
        try:
            response = self._pool.post(
                [message.body],
                headers,
                Deadline.after(min(_ATTEMPT_S, deadline.remaining())),
                max_bytes=_MAX_RESPONSE_BYTES,
                max_error_bytes=_MAX_RESPONSE_BYTES,
            )
        except ResponseTooLong:
            return  # status 200: the result is there, and nobody reads the response
        except AddressRefused as e:
            raise BrokerRefused(
                f"{self._url} leads to an address that is not public",
                broker=self._url,
                hint='allow = ["10.0.0.0/8"] lets a callback reach that network',
            ) from e
        except (Unreachable, BrokenOff, TimeoutError) as e:
            raise BrokerUnavailable(f"{self._url} does not respond: {e or 'in time'}", broker=self._url) from e
        if 200 <= response.status < 300:
            return
        reason = f"{self._url} responded {response.status}"
        if response.status in _TRANSIENT or response.status >= 500:
            pause_s = retry_after_seconds(response.headers.get("retry-after", ""))
            raise BrokerUnavailable(
                reason, broker=self._url, retry_after_s=pause_s and min(_MAX_PAUSE_S, pause_s), status=response.status
            )
        raise BrokerRefused(reason, broker=self._url, status=response.status)


def callback_headers(message: Message) -> dict[str, str]:
    """The message's own headers, with X-Call-Id and defaults for what OpenFaaS's callbacks have.

    Values that a header cannot have are percent-encoded, as the HTTP binding of CloudEvents asks.
    """
    own = {
        name: quote(value, safe=_PRINTABLE)
        for name, value in message.headers.items()
        if name not in _OWN and _TOKEN.fullmatch(name)
    }
    defaults = {
        "content-type": "application/octet-stream",
        "x-function-name": "router",
        "x-function-status": "200",
    }
    return defaults | own | {"x-call-id": message.id}
