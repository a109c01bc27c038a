"""JSON documents with each of their values replaced, one at a time, and with each missing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
ODD: list[Any] = [
    *(None, True, 0, 1, -1, 1.5, 1e308, float("nan"), float("inf"), 10**400, 2**62, 2**63, 10**30),
    *("", "x" * 5000, "\ud800", "a\nb", "../..", "string", "float16", [], {}, [None] * 3, DEEP, {"a": 1}),
]


def paths(doc: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything lies in a document; of a list's items only the first and the last."""
    if before:
        yield before
    items: list[Any] = sorted({0, len(doc) - 1}) if isinstance(doc, list) and doc else []
    for item in list(doc) if isinstance(doc, dict) else items:
        yield from paths(doc[item], (*before, item))


def altered(doc: Any, at_most: int | None = None) -> Iterator[tuple[str, bytes]]:
    """The document with each of its values replaced, one at a time, and with each missing; of these a sample."""
    changes = [(path, value) for path in paths(doc) for value in (*ODD, ...)]
    if at_most is not None and at_most < len(changes):
        changes = random.Random(3).sample(changes, at_most)
    for path, value in changes:
        yield (
            f"{path}: {str(value)[:30] if not isinstance(value, int) else hex(value)[:30]}",
            encoded(_replaced(doc, path, value)),
        )


def _replaced(doc: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the document as far as the path; `...` for a value removes the one there."""
    key, *rest = path
    changed = doc.copy()
    if rest:
        changed[key] = _replaced(doc[key], tuple(rest), value)
    elif value is ...:
        del changed[key]
    else:
        changed[key] = value
    return changed


def encoded(doc: Any) -> bytes:
    return json.dumps(doc).encode()
