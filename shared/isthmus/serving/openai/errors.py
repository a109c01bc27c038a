"""Errors in OpenAI's form, on every path below /v1.

Source: platform.openai.com/docs/guides/error-codes; docs/reference/openai.md, "Errors".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from isthmus.errors import error_code

PATH = "/v1/"
_RATE_LIMIT = "rate_limit_exceeded"
# OpenAI's own codes; other errors have the name of their class.
_CODES = {
    "ContextTooLong": "context_length_exceeded",
    "CallerUnauthenticated": "invalid_api_key",
    "CallerLimited": _RATE_LIMIT,
    "Overloaded": _RATE_LIMIT,
    "HopBusy": _RATE_LIMIT,
}
_MODEL_KINDS = ("model", "version", "alias")


class OpenAIErrorDetailBody(Struct):
    """An error: a sentence, a type for clients, the field at fault, the error's name, facts for programs."""

    message: str
    type: str
    param: str | None
    code: str
    facts: dict[str, Any]


class OpenAIErrorBody(Struct):
    """An error in OpenAI's form."""

    error: OpenAIErrorDetailBody


def openai_error(document: Mapping[str, Any], status: int) -> dict[str, Any]:
    """The error of a response, from the document that other paths respond with."""
    facts, hint = document.get("facts") or {}, document.get("hint")
    unknown_model = document["type"] == "Missing" and facts.get("kind") in _MODEL_KINDS
    return {
        # Clients show the message alone.
        "message": f"{document['error']}; {hint}" if hint else document["error"],
        "type": _type(status),
        "param": "model" if unknown_model else facts.get("parameter") or None,
        "code": "model_not_found" if unknown_model else _code(document["type"]),
        "facts": dict(facts),
    }


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def _code(name: str) -> str:
    return _CODES.get(name) or error_code(name)
