"""Agreement and cost of codecs on held-out inputs: encode the boundary tensors, decode them, run the tail, compare."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol, TypeAlias

import numpy as np
from msgspec.structs import replace

from isthmus.arrays import Array
from isthmus.artifacts.bounds import interval, isotonic
from isthmus.artifacts.choice import Choice
from isthmus.artifacts.fidelity import Entry, Measure
from isthmus.codecs import Encoding, encodings, find_codec, is_exact
from isthmus.pipeline import encode_tensors
from isthmus.pipeline.agreement import agrees, output_error
from isthmus.wire import frame as frames
from isthmus_tools.calibration.boundary import MAX_FRAME_BYTES, CutBoundary, SegmentExecutor
from isthmus_tools.calibration.inputs import CalibrationInput
from isthmus_tools.progress import Progress, silent

Outputs: TypeAlias = Mapping[str, Array]
Judge: TypeAlias = Callable[[CalibrationInput, Outputs, Outputs], tuple[bool, float]]
"""Whether the second prediction agrees with the first, and its error."""

# Placeholders of the real lengths, since frames are counted in bytes.
_CALL_ID = "0" * 36
_DIGEST = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Transmission:
    """Boundary tensors after encoding and decoding, and the cost.

    Units: bytes; seconds of this thread's CPU time, free of other processes' load. `payload_bytes` counts tensors
    alone: a first transmission has the rest of its frame under any codec. `frame_bytes` is the whole frame, the cost of
    a closer look.
    """

    tensors: Mapping[str, Array]
    payload_bytes: int
    encode_s: float = 0.0
    decode_s: float = 0.0
    frame_bytes: int = 0
    fell_back: bool = False


class Sender(Protocol):
    """A method of sending boundary tensors, under test."""

    @property
    def name(self) -> str:
        """The method's name in tallies."""
        ...

    def send(self, tensors: Mapping[str, Array]) -> Transmission:
        """Encode and decode the boundary tensors of an input."""
        ...


@dataclass(frozen=True)
class CodecSender:
    """A codec at a quality, in frames to `segment`."""

    choice: Choice
    encodings: Mapping[str, Encoding]
    segment: str = ""

    @property
    def name(self) -> str:
        """The choice as settings write it."""
        return str(self.choice)

    def send(self, tensors: Mapping[str, Array]) -> Transmission:
        """See `Sender.send`: through a real frame, as between two hops."""
        start = time.thread_time()
        encoded = encode_tensors(tensors, self.encodings)
        encode_s = time.thread_time() - start
        raw = {name: array for name, array in tensors.items() if name not in encoded}
        data = frames.encode(frames.Frame(raw, _DIGEST, self.segment, _CALL_ID, encoded))
        start = time.thread_time()
        decoded = frames.decode(data, max_bytes=MAX_FRAME_BYTES, tables=self._table).tensors
        decode_s = time.thread_time() - start
        return Transmission(
            tensors={**decoded, **raw},
            payload_bytes=sum(a.nbytes for a in raw.values()) + sum(t.nbytes for t in encoded.values()),
            encode_s=encode_s if self.encodings else 0.0,
            # Raw tensors are views of the frame.
            decode_s=decode_s if encoded else 0.0,
            frame_bytes=len(data),
            fell_back=any(name in raw and how.codec == self.choice.codec for name, how in self.encodings.items()),
        )

    def _table(self, digest: str, tensor: str, codec: str) -> object:
        return self.encodings[tensor].table


def codec_senders(boundary: CutBoundary, choices: Sequence[Choice], tables: Mapping[str, object]) -> list[CodecSender]:
    """A sender for each of `choices` that applies: a calibrated codec needs a table of some boundary tensor."""
    segment = boundary.tail[0].id if boundary.tail else ""
    senders = [CodecSender(choice, encodings(boundary.tensors, choice, tables.get), segment) for choice in choices]
    return [
        sender
        for sender in senders
        if not find_codec(sender.choice.codec).calibrated
        or sender.choice.codec in {how.codec for how in sender.encodings.values()}
    ]


@dataclass
class Tally:
    """Outcomes of a sender at a cut, in columns with an item for each input.

    `groups` are the files of the inputs. `margins` are the predictions' own, in nats, and `shifts` their distances
    from the raw prediction's margin; empty without a margin to measure. `values` counts the tensors' values.
    """

    groups: list[str] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    values: int = 0
    errors: list[float] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    frame_bytes: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    shifts: list[float] = field(default_factory=list)
    fell_back: int = 0

    def add(self, group: str, same: bool, size: int, values: int = 0, error: float = 0.0) -> None:
        """Note an input's outcome."""
        self.groups.append(group)
        self.same.append(same)
        self.bytes.append(size)
        self.values += values
        self.errors.append(error)

    def add_transmission(self, transmission: Transmission) -> None:
        """Note the further costs of the same input."""
        self.encode_s.append(transmission.encode_s)
        self.decode_s.append(transmission.decode_s)
        self.frame_bytes.append(transmission.frame_bytes)
        self.fell_back += transmission.fell_back

    def extend(self, other: Tally) -> None:
        """Add outcomes on other inputs."""
        for name in (f.name for f in fields(Tally) if f.name not in ("values", "fell_back")):
            getattr(self, name).extend(getattr(other, name))
        self.values += other.values
        self.fell_back += other.fell_back

    @property
    def agreement(self) -> float:
        """Share of inputs with the same prediction."""
        return sum(self.same) / len(self.same)

    def interval(self) -> tuple[float, float]:
        """Confidence interval of the agreement, by groups; see `bounds.interval`."""
        groups: dict[str, list[int]] = {}
        for group, same in zip(self.groups, self.same, strict=True):
            hits = groups.setdefault(group, [0, 0])
            hits[0] += same
            hits[1] += 1
        return interval((hits, count) for hits, count in groups.values())

    def p95(self) -> int:
        """95th percentile of the bytes."""
        return round(float(np.quantile(self.bytes, 0.95)))

    def mean_error(self) -> float:
        """Mean of the finite errors."""
        finite = [e for e in self.errors if math.isfinite(e)]
        return statistics.fmean(finite) if finite else 0.0

    def entry(self, cut: str, choice: Choice, limit: float) -> Entry:
        """The fidelity document's entry, before `monotone`."""
        low, high = (1.0, 1.0) if is_exact(choice) else self.interval()
        # With closer looks a median would show the first transmission alone.
        average = statistics.fmean if choice.looks else statistics.median
        return Entry(
            cut=cut,
            codec=choice.codec,
            quality=choice.quality,
            agreement=round(self.agreement, 6),
            low=round(low, 6),
            high=round(high, 6),
            error=float(f"{self.mean_error():.6g}"),
            bytes=round(average(self.bytes)),
            p95=self.p95(),
            bits=round(8 * sum(self.bytes) / max(1, self.values), 5),
            pack_ms=_ms(self.encode_s, average),
            unpack_ms=_ms(self.decode_s, average),
            fell_back=round(self.fell_back / len(self.bytes), 6),
            offered=self.agreement >= limit,
            measured=round(self.agreement, 6),
            looks=choice.looks,
        )


@dataclass(frozen=True)
class Scorer:
    """Scores senders: `judge` compares predictions, `margin` gives a prediction's, in nats.

    `references` receives each input with its raw prediction, for comparison with other formats.
    """

    executor: SegmentExecutor
    judge: Judge
    margin: Callable[[Outputs], float] | None = None
    references: Callable[[CalibrationInput, Outputs], None] | None = None

    def score(
        self,
        inputs: Iterable[CalibrationInput],
        total: int,
        senders: Sequence[tuple[CutBoundary, Sequence[Sender]]],
        progress: Progress = silent,
    ) -> dict[tuple[str, str], Tally]:
        """Try every sender at its boundary on every input; tallies by cut and sender's name."""
        tallies = {(boundary.cut, sender.name): Tally() for boundary, tried in senders for sender in tried}
        for count, example in enumerate(inputs):
            progress("measuring", count, total)
            expected: Outputs | None = None
            for boundary, tried in senders:
                tensors = self.executor.execute(boundary.head, example.arrays).tensors
                if expected is None:
                    expected = self.executor.execute(boundary.tail, tensors).outputs
                    if self.references is not None:
                        self.references(example, expected)
                for sender in tried:
                    self._try(sender, boundary, tensors, example, expected, tallies[boundary.cut, sender.name])
        progress("measuring", total, total)
        return tallies

    def _try(
        self,
        sender: Sender,
        boundary: CutBoundary,
        tensors: Mapping[str, Array],
        example: CalibrationInput,
        expected: Outputs,
        tally: Tally,
    ) -> None:
        clean = boundary.select(tensors)
        sent = sender.send(clean)
        # Exact codecs and fallbacks to raw need no run of the tail.
        exact = _identical(clean, sent.tensors)
        outputs = expected if exact else self.executor.execute(boundary.tail, {**tensors, **sent.tensors}).outputs
        same, error = self.judge(example, expected, outputs)
        values = sum(array.size for array in clean.values())
        tally.add(example.group, same, sent.payload_bytes, values, error)
        tally.add_transmission(sent)
        if self.margin is not None:
            margin = self.margin(outputs)
            tally.margins.append(margin)
            # A changed prediction lies beyond the point where both classes are equal.
            tally.shifts.append(abs((margin if same else -margin) - self.margin(expected)))


def monotone(entries: Sequence[Entry], limit: float) -> list[Entry]:
    """The entries with agreement made non-decreasing in quality, codec by codec at each cut (isotonic regression)."""
    families: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        families.setdefault((entry.cut, entry.codec), []).append(entry)
    raised = []
    for family in families.values():
        family.sort(key=lambda e: e.quality)
        shares = isotonic([e.measured for e in family])
        raised += [
            replace(e, agreement=round(share, 6), offered=round(share, 6) >= limit)
            for e, share in zip(family, shares, strict=True)
        ]
    return raised


def judge_by(measure: Measure) -> Judge:
    """The judge of fidelity documents."""
    return lambda _, expected, outputs: (agrees(measure, expected, outputs), output_error(measure, expected, outputs))


def _identical(tensors: Mapping[str, Array], others: Mapping[str, Array]) -> bool:
    return all(a is others[n] or a.tobytes() == others[n].tobytes() for n, a in tensors.items())


def _ms(seconds: Sequence[float], average: Callable[[Sequence[float]], float]) -> float:
    return round(average(seconds) * 1000, 4) if seconds else 0.0
