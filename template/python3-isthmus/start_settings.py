"""The template's own settings, read from the environment before the function's code is loaded."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlsplit

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class SettingRefused(Exception):
    """A setting that cannot be used; `facts` name the variable."""

    def __init__(self, name: str, value: str, rule: str) -> None:
        super().__init__(f"the setting {name} is {value!r}; it must be {rule}")
        self.facts: dict[str, Any] = {"variable": name, "value": value}


def text(name: str, default: str = "") -> str:
    """The variable without spaces around it; `default` where empty or absent."""
    return os.environ.get(name, "").strip() or default


def count(name: str, default: int, maximum: int, minimum: int = 1) -> int:
    """A whole number from `minimum` to `maximum`."""
    value = text(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", value) or not minimum <= int(value) <= maximum:
        raise SettingRefused(name, value, f"a whole number from {minimum} to {maximum}")
    return int(value)


def seconds(name: str, default: float) -> float:
    """A positive number of seconds."""
    value = text(name, str(default))
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e9:
        raise SettingRefused(name, value, "a number of seconds")
    return number


def size(name: str, default: int) -> int:
    """Bytes of `64MiB`, `512` or `1.5Gi`, as the function's own settings read them."""
    value = text(name, str(default))
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", value, re.IGNORECASE)
    if not match:
        raise SettingRefused(name, value, "a size such as 64MiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def address(name: str, default: str) -> tuple[str, int]:
    """Host and port of a URL with or without a scheme."""
    value = text(name, default)
    try:
        parts = urlsplit(value if "//" in value else f"//{value}")
        return parts.hostname or "127.0.0.1", parts.port or 5000
    except ValueError as e:
        raise SettingRefused(name, value, "like http://127.0.0.1:5000") from e
