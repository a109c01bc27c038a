"""The present state of a router: routes, links, circuit breakers and queue."""

from __future__ import annotations

import msgspec

from isthmus.client import Client
from isthmus.errors import HopRejected
from isthmus.http.tls import TlsTrust
from isthmus.routing.state import RouterState


class RouterView:
    """A router at `url`, looked at again and again over one connection.

    Units: `timeout_s`, the longest wait for one response, in seconds; `api_key` as of `Client`.

    Raises:
        RequestMalformed: `url` is no URL.
    """

    def __init__(
        self, url: str, *, timeout_s: float, trust: TlsTrust | None = None, api_key: str | None = None
    ) -> None:
        self.url = url
        self._client = Client(url, timeout_s=timeout_s, trust=trust, api_key=api_key)

    def state(self) -> RouterState:
        """The state now.

        Raises:
            HopUnavailable, HopTimeout: no response.
            HopRejected: the server at the URL is no router, or one of an older version.
            Errors of the router, by `error_of`.
        """
        hint = "give the URL of a router of this version: --url http://127.0.0.1:8080/function/router"
        try:
            response = self._client.get("/routes")
        except HopRejected as e:
            raise HopRejected(e.message, **e.facts, hint=hint) from e
        try:
            return msgspec.json.decode(response.body, type=RouterState)
        except msgspec.DecodeError as e:
            raise HopRejected(f"{self.url} answered 200, but not as a router does", hop=self.url, hint=hint) from e
