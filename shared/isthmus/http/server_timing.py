"""Reading `Server-Timing` and `Retry-After` of another function, whose headers are input like any other."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
MAX_RETRY_AFTER_S = 86_400.0
"""A day; what asks for more is read as a day."""


def stage_seconds(header: str, stage: str) -> float:
    """Seconds that `stage` took; 0.0 where the header does not say so as `NAME;dur=MILLISECONDS`.

    Source: W3C Server Timing.
    """
    for metric in header.split(","):
        name, *parameters = (part.strip() for part in metric.split(";"))
        if name == stage:
            for parameter in parameters:
                key, _, value = parameter.partition("=")
                if key.strip().lower() == "dur" and _NUMBER.fullmatch(value := value.strip().strip('"')):
                    return float(value) / 1000
    return 0.0


def retry_after_seconds(header: str) -> float | None:
    """Seconds that `Retry-After` asks for; None where it is missing, a date, or no number of seconds.

    Source: RFC 9110, 10.2.3.
    """
    text = header.strip()
    if not (text.isascii() and text.isdigit()):
        return None
    return min(MAX_RETRY_AFTER_S, float(text[-9:] if not text[:-9].strip("0") else "9" * 9))
