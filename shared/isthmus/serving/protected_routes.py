"""Routes of segment functions for calls that the secret `hop-keys` authenticates."""

from __future__ import annotations

import time
from collections.abc import Mapping

from flask import Response

from isthmus.security.protected_call import CallFacts, CallProtection, open_protection, refuse_sealed
from isthmus.serving.app import Handle
from isthmus.serving.request import FunctionRequest
from isthmus.serving.route_roles import SEGMENT, Need, without_hop_keys

__all__ = ["needs_with", "open_protection", "protected"]


def needs_with(protection: CallProtection | None) -> Mapping[str, Need]:
    """The roles of a segment function's routes."""
    return SEGMENT if protection is not None else without_hop_keys(SEGMENT)


def protected(protection: CallProtection | None, path: str, handle: Handle) -> Handle:
    """`handle` for the calls that `protection` takes, or without it for any.

    Its errors are answered without protection: they tell of the request, and hold no tensor.
    """

    def take(request: FunctionRequest) -> Response:
        content_type = request.headers.get("Content-Type", "")
        if protection is None:
            refuse_sealed(content_type)
            return handle(request)
        start = time.perf_counter()
        call = protection.take(dict(request.headers), request.body, CallFacts("POST", path, content_type))
        if call.body is not request.body:
            request.memory.hold(len(call.body))
        request.timings.add("open", time.perf_counter() - start)
        response = handle(request._replace(body=call.body))
        start = time.perf_counter()
        parts, headers = call.protect_reply(response.status_code, response.get_data())
        request.timings.add("protect", time.perf_counter() - start)
        headers = {"Content-Type": response.headers["Content-Type"], **headers}
        return Response(parts, response.status_code, {**headers, "Content-Length": str(sum(map(len, parts)))})

    return take
