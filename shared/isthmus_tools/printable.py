"""Text from files and names, made safe to print and to store."""

from __future__ import annotations

import re

# Control characters and bidirectional marks steer a terminal; lone surrogates, which file names and JSON may hold, have
# no UTF-8.
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates as escapes."""
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)
