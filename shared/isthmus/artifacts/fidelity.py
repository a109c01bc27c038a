"""What was measured of each codec at each cut: how often the answer stays the same, and what it costs.

What a plan may use, and what a target such as "at least 99%, at most 4 kB" means, is read from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from isthmus.artifacts.agreement import Measure
from isthmus.artifacts.bounds import CONFIDENCE
from isthmus.artifacts.choice import Choice, Look
from isthmus.errors import CalibrationError

LIMIT = 0.99


@dataclass(frozen=True)
class Inputs:
    """What it was measured with: the files of `source`, and how many inputs made of them calibrated and were scored."""

    source: str
    files: int
    calibrated: int
    held_out: int
    made: str = "one of each file"


@dataclass(frozen=True)
class Entry:
    """One codec at one quality at one cut, over the held-out inputs.

    `measured` is the share of inputs whose answer stays the same, `low` and `high` its interval (Wilson, 95%).
    `agreement` is that share made to rise with a codec's quality (`bounds.rising`): what targets and limits go by.
    `error` is the mean of the output's error where it is finite. `bytes` (median) and `p95` are the payloads of all
    tensors that cross, `bits` what a value costs on average. Units: milliseconds of one thread's CPU time, medians.
    `fell_back` is the share of inputs where a tensor went raw. `offered` says whether a plan may use it.

    With closer looks, sizes and times are of all sends together, and means, since medians know of the first one only;
    `shares` has for each look the share of inputs that took it.
    """

    cut: str
    codec: str
    quality: float
    agreement: float
    low: float
    high: float
    error: float
    bytes: int
    p95: int
    bits: float
    pack_ms: float
    unpack_ms: float
    fell_back: float
    offered: bool
    measured: float
    looks: tuple[Look, ...] = ()
    shares: tuple[float, ...] = ()

    @property
    def choice(self) -> Choice:
        """What was measured, as settings write it."""
        return Choice(self.codec, self.quality, self.looks)


@dataclass(frozen=True)
class Reference:
    """The input itself as JPEG or WebP of one quality, decoded again before the model; same inputs, same measure."""

    codec: str
    quality: int
    agreement: float
    low: float
    high: float
    error: float
    bytes: int
    p95: int


@dataclass(frozen=True)
class Fidelity:
    """All that was measured of one model; `subject` is its `model_digest`."""

    subject: str
    limit: float
    measure: Measure
    inputs: Inputs
    entries: tuple[Entry, ...]
    references: tuple[Reference, ...] = ()
    confidence: float = field(default=CONFIDENCE)

    def cuts(self) -> list[str]:
        """The cuts that were measured, in the document's order."""
        return list(dict.fromkeys(entry.cut for entry in self.entries))


def offered(fidelity: Fidelity, cut: str) -> list[Entry]:
    """What a plan may use at `cut`, fewest bytes first: its agreement, not the bound of that, meets the limit.

    The lower bound cannot: a hundred inputs without one different answer leave it at 96.3%. What the estimate lets pass
    by luck, the router's guard finds.
    """
    return sorted((e for e in fidelity.entries if e.cut == cut and e.offered), key=lambda e: (e.bytes, -e.agreement))


def choose(
    fidelity: Fidelity,
    cut: str,
    *,
    agreement: float | None = None,
    bytes: int | None = None,
    pack_ms: float | None = None,
) -> Entry:
    """The codec and quality that meets every target: with one for agreement the smallest, else the most faithful.

    Units: `bytes` bounds the median payload, `pack_ms` packing and unpacking together.

    Raises:
        CalibrationError: nothing was measured at `cut`, or nothing meets the targets; names what comes closest.
    """
    known = [e for e in fidelity.entries if e.cut == cut]
    if not known:
        raise CalibrationError(f"no codec was measured at cut {cut!r}", cut=cut, exists=fidelity.cuts())
    fits = [
        e
        for e in known
        if (bytes is None or e.bytes <= bytes) and (pack_ms is None or e.pack_ms + e.unpack_ms <= pack_ms)
    ]
    if met := [e for e in fits if agreement is None or e.agreement >= agreement]:
        if agreement is not None:
            return min(met, key=lambda e: (e.bytes, -e.agreement))
        return max(met, key=lambda e: (e.agreement, -e.bytes))
    closest = max(fits, key=lambda e: e.agreement, default=None) or min(known, key=lambda e: e.bytes)
    raise CalibrationError(
        f"nothing measured at cut {cut} meets the targets; closest is {closest.choice}: "
        f"{closest.agreement:.1%} the same, {closest.bytes} bytes, {closest.pack_ms + closest.unpack_ms:.2f} ms",
        cut=cut,
        agreement=agreement,
        bytes=bytes,
        pack_ms=pack_ms,
        closest=asdict(closest),
    )
