"""Errors as HTTP responses: status, JSON body and headers, the same for every endpoint.

The body is a JSON object with `error`, a sentence, as the Open Inference Protocol has it, and `type`, `facts` and
`hint` beside it; below /v1 it is OpenAI's. Anybody can call a function, so URLs of other functions, places of the
registry and names of other models are for its log unless the setting expose_details is on.
Source: docs/reference/api.md, "Errors".
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from flask import Response, current_app, request
from werkzeug.exceptions import HTTPException

from isthmus.admission import RETRY_AFTER_S
from isthmus.errors import EncodingUnsupported, IsthmusError, http_status
from isthmus.serving.openai import errors as openai

# Facts for every caller, who may act on these.
ALWAYS_TOLD = ("kind", "retry_after_s")
UNEXPECTED: dict[str, Any] = {
    "error": "an unexpected error; the function's log has it",
    "type": "InternalError",
    "facts": {},
}
# Facts about other functions and places, beside facts about the request.
_INTERNAL_FACTS = ("hop", "status", "error", "registry")


class ErrorRenderer:
    """Renders any exception of a request, and logs the details that the response leaves out."""

    def __init__(self, log: logging.Logger, *, expose_details: bool) -> None:
        self._log, self._expose_details = log, expose_details

    def render(self, error: Exception, call_id: str = "") -> Response:
        """The response to a request that failed with `error`."""
        if isinstance(error, IsthmusError):
            return self._known(error, call_id)
        if isinstance(error, HTTPException):
            return _routing_error(error)
        self._log.error("unexpected: %s", type(error).__name__, exc_info=error)
        return _response(UNEXPECTED | {"facts": {"call_id": call_id} if call_id else {}}, 500)

    def _known(self, error: IsthmusError, call_id: str) -> Response:
        status = http_status(error)
        # 503 is a state that passes, such as loading.
        is_own_fault = status >= 500 and status != 503
        if is_own_fault or (error.public_message and not self._expose_details):
            facts = {"type": type(error).__name__, **error.facts}
            facts |= {"hint": error.hint} if error.hint else {}
            facts |= {"call_id": call_id} if call_id else {}
            level = logging.ERROR if is_own_fault else logging.INFO
            self._log.log(level, error.message, extra={"facts": facts}, exc_info=error if status == 500 else None)
        response = _response(error_document(error, expose_details=self._expose_details), status)
        # RFC 9110, 15.5.16: such a 415 lists the codings that are taken.
        if isinstance(error, EncodingUnsupported):
            response.headers["Accept-Encoding"] = ", ".join(error.facts["accepted"])
        if status in (429, 503):
            response.headers["Retry-After"] = str(math.ceil(error.facts.get("retry_after_s") or RETRY_AFTER_S))
        return response


def error_document(error: IsthmusError, *, expose_details: bool) -> dict[str, Any]:
    """The JSON body of an error's response."""
    if expose_details:
        message, facts, hint = error.message, dict(error.facts), error.hint
    elif not error.public_message:
        message, hint = error.message, error.hint
        facts = {key: value for key, value in error.facts.items() if key not in _INTERNAL_FACTS}
    else:
        message, hint = error.public_message, ""
        facts = {key: error.facts[key] for key in ALWAYS_TOLD if key in error.facts}
    return {"error": message, "type": type(error).__name__, "facts": facts} | ({"hint": hint} if hint else {})


def _routing_error(error: HTTPException) -> Response:
    """Unknown path, or a method that the path does not serve."""
    doc: dict[str, Any] = {"error": error.description or error.name, "type": type(error).__name__, "facts": {}}
    if error.code == 404:
        exists = sorted(r.rule for r in current_app.url_map.iter_rules())
        doc |= {"error": f"there is no path {request.path}", "facts": {"path": request.path, "exists": exists}}
        # OpenAI's clients show the message alone, and have methods for more paths than there are.
        if near := [path for path in exists if request.path.startswith(openai.PATH) and path.startswith(openai.PATH)]:
            doc["error"] += f"; there are {', '.join(near)}"
    response = _response(doc, error.code or 500)
    for name, value in error.get_headers():
        # RFC 9110, 15.5.6: a 405 lists the methods of the path.
        if name == "Allow":
            response.headers[name] = value
    return response


def _response(doc: dict[str, Any], status: int) -> Response:
    # The path, not the route: an unknown path and a request that was refused before its route have the form too.
    if request.path.startswith(openai.PATH):
        doc = {"error": openai.openai_error(doc, status)}
    # Facts may hold values without a JSON form; an error must not fail on them.
    return Response(json.dumps(doc, default=str), status, mimetype="application/json")
