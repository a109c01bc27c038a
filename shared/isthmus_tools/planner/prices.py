"""What the tiers and the link cost, in money and in joules, from a small TOML file. There are no default prices."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from isthmus.errors import ConstraintMalformed

MAX_BYTES = 2**16


@dataclass(frozen=True)
class TierPrices:
    """One tier: money per second of one CPU, watts while it works on a request, and while the request is elsewhere."""

    cpu_second: float | None = None
    active_watts: float | None = None
    idle_watts: float | None = None


@dataclass(frozen=True)
class LinkPrices:
    """The link: money per 10^9 bytes each way, and joules per byte of either."""

    gb_up: float | None = None
    gb_down: float | None = None
    joules_per_byte: float | None = None


@dataclass(frozen=True)
class Prices:
    """All prices; None where the file says nothing. `currency` is only shown."""

    edge: TierPrices = field(default_factory=TierPrices)
    cloud: TierPrices = field(default_factory=TierPrices)
    link: LinkPrices = field(default_factory=LinkPrices)
    currency: str = ""

    @property
    def missing_for_cost(self) -> tuple[str, ...]:
        """The keys that a cost needs and that are not given."""
        return _unset({"edge.cpu_second": self.edge.cpu_second, "cloud.cpu_second": self.cloud.cpu_second}) + _unset(
            {"link.gb_up": self.link.gb_up, "link.gb_down": self.link.gb_down}
        )

    @property
    def missing_for_energy(self) -> tuple[str, ...]:
        """The keys that an energy needs and that are not given."""
        tiers = (("edge", self.edge), ("cloud", self.cloud))
        watts = {f"{name}.{k}": getattr(tier, k) for name, tier in tiers for k in ("active_watts", "idle_watts")}
        return _unset({**watts, "link.joules_per_byte": self.link.joules_per_byte})


def read_prices(path: Path) -> Prices:
    """The prices of a TOML file with the tables edge, cloud and link; see docs/plan.md.

    Raises:
        ConstraintMalformed: it cannot be read, has an unknown key, or a price that is negative or no number.
    """
    try:
        data = path.read_bytes()
        if len(data) > MAX_BYTES:
            raise ValueError(f"{len(data)} bytes; at most {MAX_BYTES}")
        doc = tomllib.loads(data.decode())
    except (OSError, ValueError) as e:
        raise ConstraintMalformed(f"the prices {path} cannot be read: {e}", what="prices") from e
    _known(doc, ("edge", "cloud", "link", "currency"), path.name)
    currency = doc.get("currency", "")
    if not isinstance(currency, str) or len(currency) > 16:
        raise ConstraintMalformed("currency is a text of up to 16 characters", what="currency")
    return Prices(
        TierPrices(**_table(doc, "edge", TierPrices)),
        TierPrices(**_table(doc, "cloud", TierPrices)),
        LinkPrices(**_table(doc, "link", LinkPrices)),
        currency,
    )


def _table(doc: Mapping[str, Any], name: str, kind: type[TierPrices | LinkPrices]) -> dict[str, float]:
    table = doc.get(name, {})
    if not isinstance(table, dict):
        raise ConstraintMalformed(f"the prices' {name} is a table", what=name)
    _known(table, [f.name for f in fields(kind)], name)
    for key, value in table.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ConstraintMalformed(f"the price {name}.{key} is {value!r}; it is 0 or more", what=f"{name}.{key}")
    return {key: float(value) for key, value in table.items()}


def _known(doc: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    known = list(keys)
    if more := sorted(set(doc) - set(known)):
        said = f"{where} has unknown keys: {', '.join(more)}; known are {', '.join(known)}"
        raise ConstraintMalformed(said, what=more[0])


def _unset(values: Mapping[str, float | None]) -> tuple[str, ...]:
    return tuple(name for name, value in values.items() if value is None)
