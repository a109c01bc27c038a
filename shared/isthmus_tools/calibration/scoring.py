"""Codecs on held-out inputs: each packs what crosses a cut, and the tail's answer to what arrives is compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeAlias

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.agreement import Measure
from isthmus.artifacts.bounds import interval, rising
from isthmus.artifacts.choice import Choice
from isthmus.artifacts.fidelity import Entry
from isthmus.codecs.choice import is_exact
from isthmus.pipeline.agreement import agrees, output_error
from isthmus_tools.calibration.crossing import Crossing, Run
from isthmus_tools.calibration.inputs import Example
from isthmus_tools.calibration.sending import Way
from isthmus_tools.progress import Progress, silent

Judge: TypeAlias = Callable[[Example, Mapping[str, Array], Mapping[str, Array]], tuple[bool, float]]
"""Whether the second answer to an example is the same as the first, and its error."""


@dataclass
class Tally:
    """What one way of sending has shown so far, an item for each input one after the other.

    `sources` are the files that inputs were made of. `frame_bytes` is what it takes as a closer look: see `Sent`.
    `margins` are how clear the answers are, in nats, and `moved` by how much that differs from the answer to what was
    sent raw; empty where nobody asked.
    """

    sources: list[str] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    values: int = 0
    errors: list[float] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    frame_bytes: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    fell_back: int = 0

    def add(self, source: str, same: bool, size: int, values: int = 0, error: float = 0.0) -> None:
        """Note one input's outcome."""
        self.sources.append(source)
        self.same.append(same)
        self.bytes.append(size)
        self.values += values
        self.errors.append(error)

    def extend(self, other: Tally) -> None:
        """Add what the same way has shown on other inputs."""
        for name in (f.name for f in fields(Tally) if f.name not in ("values", "fell_back")):
            getattr(self, name).extend(getattr(other, name))
        self.values += other.values
        self.fell_back += other.fell_back

    @property
    def agreement(self) -> float:
        """The share of inputs whose answer stays the same."""
        return sum(self.same) / len(self.same)

    def interval(self) -> tuple[float, float]:
        """Its bounds; see `bounds.interval`."""
        groups: dict[str, list[int]] = {}
        for source, same in zip(self.sources, self.same, strict=True):
            hits = groups.setdefault(source, [0, 0])
            hits[0] += same
            hits[1] += 1
        return interval((hits, count) for hits, count in groups.values())

    def p95(self) -> int:
        """Bytes that 19 inputs in 20 do not exceed."""
        return round(float(np.quantile(self.bytes, 0.95)))

    def mean_error(self) -> float:
        """Of the inputs whose error is finite."""
        finite = [e for e in self.errors if math.isfinite(e)]
        return statistics.fmean(finite) if finite else 0.0

    def entry(self, cut: str, choice: Choice, limit: float) -> Entry:
        """The document's entry, for itself; see `risen`."""
        low, high = (1.0, 1.0) if is_exact(choice) else self.interval()
        typical = statistics.fmean if choice.looks else statistics.median
        return Entry(
            cut=cut,
            codec=choice.codec,
            quality=choice.quality,
            agreement=round(self.agreement, 6),
            low=round(low, 6),
            high=round(high, 6),
            error=float(f"{self.mean_error():.6g}"),
            bytes=round(typical(self.bytes)),
            p95=self.p95(),
            bits=round(8 * sum(self.bytes) / max(1, self.values), 5),
            pack_ms=_ms(self.encode_s, typical),
            unpack_ms=_ms(self.decode_s, typical),
            fell_back=round(self.fell_back / len(self.bytes), 6),
            offered=self.agreement >= limit,
            measured=round(self.agreement, 6),
            looks=choice.looks,
        )


def score(
    examples: Iterable[Example],
    total: int,
    crossings: Sequence[Crossing],
    ways: Mapping[str, Sequence[Way]],
    run: Run,
    judge: Judge,
    *,
    beside: Callable[[Example, Mapping[str, Array]], None] | None = None,
    margin: Callable[[Mapping[str, Array]], float] | None = None,
    progress: Progress = silent,
) -> dict[tuple[str, str], Tally]:
    """Try every way at every cut on every example, one example at a time; tallies by cut and the way's name.

    `beside` is told each example and the answer to what crossed unpacked, for what else is compared with it. `margin`
    says how clear an answer is.
    """
    tallies = {(c.cut, way.name): Tally() for c in crossings for way in ways[c.cut]}
    for done, example in enumerate(examples):
        progress("measuring", done, total)
        expected: Mapping[str, Array] | None = None
        clear_raw = math.inf
        for crossing in crossings:
            crossed, early = crossing.before(run, example.arrays)
            if expected is None:
                expected = crossing.after(run, crossed, early)
                if margin is not None:
                    clear_raw = margin(expected)
                if beside is not None:
                    beside(example, expected)
            values = sum(array.size for array in crossed.values())
            for way in ways[crossing.cut]:
                sent = way.send(crossed)
                got = expected if _identical(crossed, sent.tensors) else crossing.after(run, sent.tensors, early)
                same, error = judge(example, expected, got)
                tally = tallies[crossing.cut, way.name]
                tally.add(example.group, same, sent.cost.bytes, values, error)
                tally.encode_s.append(sent.cost.encode_s)
                tally.decode_s.append(sent.cost.decode_s)
                tally.frame_bytes.append(sent.frame_bytes)
                tally.fell_back += sent.fell_back
                if margin is not None:
                    clear = margin(got)
                    tally.margins.append(clear)
                    # An answer that is another lies beyond the point where both classes are equal.
                    tally.moved.append(abs((clear if same else -clear) - clear_raw))
    progress("measuring", total, total)
    return tallies


def risen(entries: Sequence[Entry], limit: float) -> list[Entry]:
    """The entries with agreements that rise with quality, codec by codec at each cut."""
    families: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        families.setdefault((entry.cut, entry.codec), []).append(entry)
    made = []
    for family in families.values():
        family.sort(key=lambda e: e.quality)
        shares = rising([e.measured for e in family])
        made += [
            replace(e, agreement=round(share, 6), offered=round(share, 6) >= limit)
            for e, share in zip(family, shares, strict=True)
        ]
    return made


def judge_by(measure: Measure) -> Judge:
    """The judge that fidelity documents are made by."""
    return lambda _, expected, got: (agrees(measure, expected, got), output_error(measure, expected, got))


def _identical(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return all(a is other[n] or a.tobytes() == other[n].tobytes() for n, a in one.items())


def _ms(seconds: Sequence[float], typical: Callable[[Sequence[float]], float]) -> float:
    return round(typical(seconds) * 1000, 4) if seconds else 0.0
