"""Bounds on the memory of parsing JSON, from the text before parsing."""

from __future__ import annotations

# Measured with tracemalloc in CPython 3.11, with the garbage collector, on lists and objects of every kind of
# value; later versions take less.
_LIST_BYTES, _OBJECT_BYTES = 56, 80
# For each comma: a number or a short text, and the slot in a list that grows by an eighth.
_VALUE_BYTES = 48
# For each quote: half of a text's object, besides its characters and the share of its comma.
_QUOTE_BYTES = 16
# For each colon: a slot in an object's table, and the pair for a check of duplicates.
_PAIR_BYTES = 140
# The parser's own memory, at its deepest.
_PARSER_BYTES = 2**16


def parsed_bytes(text: bytes | memoryview) -> int:
    """Upper bound on the memory of parsing: the decoded text, and all values.

    `[],` takes twenty times its length, so a bound on the text alone is not enough. Structure inside of texts counts as
    structure.
    """
    data = bytes(text)
    # A character outside of the basic plane makes a whole Python text four bytes wide, and the text may be a single
    # value, a copy.
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
