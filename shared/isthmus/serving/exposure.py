"""What callers are told of errors: a sentence and what they can act on; details where the setting expose_details is on.

Anybody can call a function. URLs of other functions, places of the registry and names of other models are for its log.
"""

from __future__ import annotations

from typing import Any

from isthmus.errors import IsthmusError

ALWAYS_TOLD = ("kind", "retry_after_s")
"""Facts that callers act on, whatever the error."""
_OF_OTHERS = ("hop", "status", "error", "registry")
"""Facts about other functions and places, which errors may have beside those about the request."""


def problem(error: IsthmusError, *, expose_details: bool) -> dict[str, Any]:
    """An error as the JSON body that every endpoint answers with. Source: docs/api.md, "Errors"."""
    if expose_details:
        message, facts, hint = error.message, dict(error.facts), error.hint
    elif not error.told:
        message, hint = error.message, error.hint
        facts = {key: value for key, value in error.facts.items() if key not in _OF_OTHERS}
    else:
        message, hint = error.told, ""
        facts = {key: error.facts[key] for key in ALWAYS_TOLD if key in error.facts}
    return {"error": message, "type": type(error).__name__, "facts": facts} | ({"hint": hint} if hint else {})
