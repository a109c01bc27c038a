"""What reading JSON takes in memory, told from its bytes before it is parsed."""

from __future__ import annotations

# As CPython 3.11 holds them, the collector's part included, measured with tracemalloc on lists and objects of every
# kind of value; later versions take less.
_LIST_BYTES, _OBJECT_BYTES = 56, 80
_VALUE_BYTES = 48
"""A value that a comma precedes: a number or a short text, and its place in a list, which grows by an eighth."""
_QUOTE_BYTES = 16
"""Half of what a text takes besides its characters and what its comma counts for."""
_PAIR_BYTES = 140
"""What a colon stands for: a place in an object's table, and the pair that is handed to a check for duplicates."""
_PARSER_BYTES = 2**16
"""The parser's own memory, at its deepest."""


def parsed_bytes(text: bytes | memoryview) -> int:
    """Upper bound on the memory that parsing these bytes takes: the text decoded, and all values.

    `[],` takes twenty times its length, so that a bound on the text alone bounds little. Structure inside of texts
    counts as if it were none.
    """
    data = bytes(text)
    # A character outside of the basic plane makes all of a Python text four bytes wide. All of it may be one value,
    # which is a copy.
    decoded = 2 * len(data) if data.isascii() else 8 * len(data)
    return (
        _PARSER_BYTES
        + decoded
        + data.count(b"[") * _LIST_BYTES
        + data.count(b"{") * _OBJECT_BYTES
        + data.count(b",") * _VALUE_BYTES
        + data.count(b'"') * _QUOTE_BYTES
        + data.count(b":") * _PAIR_BYTES
    )
