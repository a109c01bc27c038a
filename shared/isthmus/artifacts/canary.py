"""The canary of an alias: a second version that gets a share of the alias's requests, and the rule of its rollback.

A part of the alias document.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from isthmus import units
from isthmus.artifacts.constraints import Count, Digest, Share
from isthmus.errors import RegistryError

# Names of the rule's fields in the option --rule, and in a message about a field.
_FIELDS = {
    "requests": "min_requests",
    "errors": "max_errors",
    "disagreement": "max_disagreement",
    "latency": "max_latency_ratio",
    "confidence": "confidence",
}
_NOT_SHARES = ("requests", "latency")


class CanaryRule(Struct, frozen=True, forbid_unknown_fields=True):
    """When a canary is rolled back: a limit is exceeded beyond chance, at this confidence.

    `max_errors` is how much larger the canary's share of failed requests may be than the other version's,
    `max_disagreement` the share of compared requests whose predictions differ, `max_latency_ratio` its median seconds
    over the other version's. Each counts from `min_requests` requests of the canary, or comparisons, on.
    """

    min_requests: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    max_errors: Share = 0.02
    max_disagreement: Share = 0.1
    max_latency_ratio: Annotated[float, Meta(ge=1, le=1000)] = 2.0
    # As the guard's: every request tests again, so 0.95 would fire too often.
    confidence: Annotated[float, Meta(ge=0.5, lt=1)] = 0.999

    def option(self) -> str:
        """The rule as the option --rule takes it."""
        values = {name: getattr(self, field) for name, field in _FIELDS.items()}
        texts = {name: f"{value:g}" if name in _NOT_SHARES else f"{value * 100:g}%" for name, value in values.items()}
        return ",".join(f"{name}={text}" for name, text in texts.items())


class Canary(Struct, frozen=True, forbid_unknown_fields=True):
    """The canary version of an alias: `share` of the callers get it.

    `began` is the alias's counter at the move that began the canary. A later move that changes the share alone keeps
    it, so that no caller leaves the canary where the share grows.
    """

    version: Annotated[int, Meta(ge=1, le=10**18 - 1)]
    digest: Digest
    share: Annotated[float, Meta(gt=0, lt=1)]
    began: Count
    rule: CanaryRule = CanaryRule()

    def takes(self, caller: str) -> bool:
        """Whether the requests of the caller of this name go to the canary; every router decides alike."""
        drawn = blake2b(f"{self.digest} {self.began} {caller}".encode("utf-8", "replace"), digest_size=8).digest()
        return int.from_bytes(drawn, "big") < self.share * 2**64


def parse_share(text: str) -> float:
    """A share of requests, as `10%` or `0.1`.

    Raises:
        RegistryError: no number, or not between 0 and 1.
    """
    try:
        return units.parse_share(text)
    except ValueError as e:
        raise RegistryError(
            f"{text[:80]!r} is no share of requests: more than 0% and less than 100%, such as 10%"
        ) from e


def parse_rule(text: str) -> CanaryRule:
    """A rule as `errors=2%,disagreement=5%,latency=1.5,requests=200,confidence=99.9%`; fields left out are the default.

    Raises:
        RegistryError: an unknown field, or a value out of its range.
    """
    values: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name not in _FIELDS:
            raise RegistryError(f"{name[:80]!r} is no field of a canary's rule; these are: {', '.join(_FIELDS)}")
        try:
            number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
            values[_FIELDS[name]] = int(number) if name == "requests" else number
        except (ValueError, OverflowError):
            raise RegistryError(f"{part[:80]!r} has no number, as in {name}=5%") from None
    try:
        return msgspec.convert(values, CanaryRule)
    except msgspec.ValidationError as e:
        raise RegistryError(f"{text[:80]!r} is no rule of a canary: {e}") from None
