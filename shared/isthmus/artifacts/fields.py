"""A plan's JSON, field by field: each taken once, as what it must be, and nothing left over."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from isthmus.errors import PlanMalformed

_MAX_TEXT = 4096
_MAX_ITEMS = 1024
_LARGEST = sys.float_info.max


class Fields:
    """An object whose keys are taken one by one, each as what it must be; else `PlanMalformed`."""

    def __init__(self, doc: Any, where: str) -> None:
        if not isinstance(doc, dict):
            refuse(where, "is not an object")
        self._doc, self._where, self._taken = doc, where, set[str]()

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return key in self._doc

    def take(self, key: str) -> Any:
        """Whatever is there."""
        self._taken.add(key)
        if key not in self._doc:
            refuse(f"{self._where}.{key}", "is missing")
        return self._doc[key]

    def text(self, key: str, good: Any = None) -> str:
        """A string of bounded length that is `good`."""
        value = self.take(key)
        if not isinstance(value, str) or len(value) > _MAX_TEXT or (good is not None and not good(value)):
            self._no(key, value)
        return str(value)

    def number(self, key: str, low: float = 0.0) -> float:
        """A finite number from `low` on."""
        value = self.take(key)
        if type(value) not in (int, float) or not low <= value <= _LARGEST:
            self._no(key, value)
        return float(value)

    def whole(self, key: str) -> int:
        """A whole number that is not negative, of at most 63 bits."""
        value = self.take(key)
        if type(value) is not int or not 0 <= value < 2**63:
            self._no(key, value)
        return int(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.take(key)
        if type(value) is not bool:
            self._no(key, value)
        return bool(value)

    def absent(self, key: str) -> bool:
        """Whether null is there."""
        return self.take(key) is None

    def number_or_none(self, key: str) -> float | None:
        """A number, or null."""
        return None if self.absent(key) else self.number(key)

    def whole_or_none(self, key: str) -> int | None:
        """A whole number, or null."""
        return None if self.absent(key) else self.whole(key)

    def sub(self, key: str) -> Fields:
        """An object in this one."""
        return Fields(self.take(key), f"{self._where}.{key}")

    def texts(self, key: str, good: Any = None) -> tuple[str, ...]:
        """A list of strings."""
        value = self._list(key, _MAX_ITEMS)
        if not all(isinstance(v, str) and len(v) <= _MAX_TEXT and (good is None or good(v)) for v in value):
            self._no(key, value)
        return tuple(value)

    def many(self, key: str, read: Any, most: int = _MAX_ITEMS) -> tuple[Any, ...]:
        """A list of objects, each as `read` reads it."""
        found = self._list(key, most)
        return tuple(read(Fields(item, f"{self._where}.{key}[{i}]")) for i, item in enumerate(found))

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object whose keys are anybody's."""
        value = self.take(key)
        if not isinstance(value, dict) or len(value) > _MAX_ITEMS or any(len(k) > _MAX_TEXT for k in value):
            self._no(key, value)
        return dict(value)

    def end(self, *known: str) -> None:
        """Refuse what nobody took: a plan of another version is not half understood."""
        if more := sorted(self._doc.keys() - self._taken - set(known)):
            refuse(self._where, f"has unknown keys: {', '.join(more)[:200]}")

    def _list(self, key: str, most: int) -> Sequence[Any]:
        value = self.take(key)
        if not isinstance(value, list) or len(value) > most:
            self._no(key, value)
        return list(value)

    def _no(self, key: str, value: Any) -> NoReturn:
        refuse(f"{self._where}.{key}", f"cannot be {str(value)[:80]!r}")


def refuse(where: str, what: str) -> NoReturn:
    """Say where a plan departs, and how.

    Raises:
        PlanMalformed: always.
    """
    raise PlanMalformed(f"{where} {what}", where=where)
