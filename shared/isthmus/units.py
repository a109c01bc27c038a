"""Text forms of sizes, durations and rates; the message of a ValueError gives an example."""

from __future__ import annotations

import math
import re

UNLIMITED = math.inf
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# Digits are bounded: int() and float() of endless digits take quadratic time or overflow.
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]i?)?b?", re.IGNORECASE)
# Unicode has two micro signs, U+00B5 and U+03BC; Go accepts both.
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(?:\d{1,12}(?:\.\d{0,9})?(?:ns|us|µs|μs|ms|s|m|h))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|μs|ms|s|m|h)")
_RATE = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)\s*([kmg]?)bit(?:/s)?", re.IGNORECASE)
# Decimal, as network rates are in standards and in tc.
_RATES = ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"), (1.0, "bit/s"))


def parse_size(text: str) -> int:
    """Bytes of `512`, `64KiB`, `200MB`, `1.5Gi`; units without `i` are decimal, in either case.

    Raises:
        ValueError: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size such as 500MB or 2GiB")
    # Exact up to 2^53 bytes, 9 PB.
    return int(float(match[1]) * _BYTES[(match[2] or "").lower()])


def parse_duration(text: str) -> float:
    """Seconds of a duration in Go's syntax: `20ms`, `0.5s`, `1m30s`.

    Raises:
        ValueError: not a duration.
    """
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is not a duration such as 20ms or 0.5s")
    return sum(float(n) * _SECONDS[unit] for n, unit in _DURATION_PART.findall(text))


def parse_rate(text: str) -> float:
    """Bits per second of `10mbit`, `1.5Mbit/s`, `100kbit`; `unlimited` is infinite. Prefixes are decimal in either
    case.

    Raises:
        ValueError: not a rate. `bps` is refused as ambiguous: bytes in tc, bits elsewhere.
    """
    if text.strip().lower() == "unlimited":
        return UNLIMITED
    match = _RATE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text[:40]!r} is not a rate such as 10mbit, 1.5Mbit/s or unlimited")
    return float(match[1]) * _BYTES[match[2].lower()]


def parse_share(text: str) -> float:
    """`1%` or `0.01` as a share.

    Raises:
        ValueError: no number, or not between 0 and 1.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"{text[:80]!r} is no share: more than 0% and less than 100%, such as 1%")
    return share


def format_rate(bits_per_s: float) -> str:
    """A rate for display: `1.5 Mbit/s`, `unlimited`."""
    if math.isinf(bits_per_s):
        return "unlimited"
    scale, unit = next(((s, u) for s, u in _RATES if bits_per_s >= s), _RATES[-1])
    return f"{bits_per_s / scale:.4g} {unit}"


def format_size(count: float) -> str:
    """Bytes for display: `12.0 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def format_duration(seconds: float) -> str:
    """A duration for display: `20 ms`, `1.5 s`."""
    return f"{seconds:.4g} s" if seconds >= 1 else f"{seconds * 1e3:.4g} ms"
