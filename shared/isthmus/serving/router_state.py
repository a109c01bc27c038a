"""The router's present state as callers may see it: `GET /routes`."""

from __future__ import annotations

import msgspec
from flask import Response
from msgspec import structs

from isthmus.routing import Dispatcher
from isthmus.routing.state import RouterState
from isthmus.serving.app import FunctionApp
from isthmus.serving.metrics import hop_label
from isthmus.settings import RouterSettings


class StateRoute:
    """`GET /routes`, added to `app`. Takes no slot, so that an overloaded router shows that it is."""

    def __init__(self, app: FunctionApp, dispatcher: Dispatcher, settings: RouterSettings) -> None:
        self._slots, self._dispatcher, self._settings = app.slots, dispatcher, settings
        app.flask.add_url_rule("/routes", "routes", self.routes, methods=["GET"])

    def routes(self) -> Response:
        """The state as JSON."""
        return Response(msgspec.json.encode(self.state()), mimetype="application/json")

    def state(self) -> RouterState:
        """The state; URLs of hops, and models beside the default, are details, as in metrics and lists."""
        state, refusals = self._dispatcher.state(), self._slots.refused()
        return structs.replace(
            state,
            hops=tuple(structs.replace(hop, name=hop_label(self._settings, hop.name)) for hop in state.hops),
            models=tuple(m for m in state.models if self._settings.tells_of(m.name)),
            limit=self._slots.limit,
            working=self._slots.working,
            queued=self._slots.queued,
            refused=sum(refusals.values()),
            refusals=refusals,
        )
