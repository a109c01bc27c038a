"""What a candidate does, found out by doing it here: bytes on the wire, the codecs' time, how far answers are off."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from isthmus import frame as frames
from isthmus.bundle import WHOLE, Bundle, Segment, TensorSpec
from isthmus.calibration.agreement import Measure, measure_for
from isthmus.calibration.choice import Choice, packings
from isthmus.codecs import RAW, Array, Packed, Packing, find
from isthmus.frame import DTYPES, Frame
from isthmus.pipeline import pack_all
from isthmus.planner.planning.costs import Exchange
from isthmus.planner.planning.examples import Example
from isthmus.planner.planning.plan import Coding, Error, SecondLook
from isthmus.planner.planning.workbench import Workbench

T = TypeVar("T")
_CALL_ID = "0" * 36
_DIGEST = "sha256:" + "0" * 64
_FEW_S, _MANY_S, _TRIES = 0.005, 0.1, 3


@dataclass(frozen=True)
class Option:
    """One way to serve the model, before anything is known of it. `choice` is how what goes to the cloud is packed."""

    name: str
    kind: str
    cuts: tuple[str, ...] = ()
    choice: Choice = Choice(RAW)  # noqa: RUF009 - it is frozen
    photo: bool = False
    variant: bool = False


@dataclass(frozen=True)
class Trial:
    """What an option does on the examples: medians of bytes and of seconds on this machine, and the error.

    `codecs` are the tensors that did not go raw; `run_here_s` is the whole variant's run, where it is one.
    """

    near: Exchange | None = None
    far: Exchange | None = None
    preprocess_s: float = 0.0
    pack_s: float = 0.0
    unpack_s: float = 0.0
    codecs: Mapping[str, Coding] = field(default_factory=dict)
    error: Error = Error(0.0, 0)  # noqa: RUF009 - it is frozen
    run_here_s: float = 0.0
    second_look: SecondLook | None = None

    def then(self, other: Trial, second_look: SecondLook) -> Trial:
        """This, and `other` for the share of inputs that take a second look; the answer's error is to be known."""
        share = second_look.share
        far = None
        if self.far is not None and other.far is not None:
            sent, received = self.far.sent + share * other.far.sent, self.far.received + share * other.far.received
            far = Exchange(round(sent), round(received))
        return replace(
            self,
            far=far,
            pack_s=self.pack_s + share * other.pack_s,
            unpack_s=self.unpack_s + share * other.unpack_s,
            second_look=second_look,
        )


class Trials:
    """Tries options of one bundle with the same examples; what the uncut model answers is run once."""

    def __init__(
        self,
        bundle: Bundle,
        bench: Workbench,
        examples: Sequence[Example],
        table: Callable[[str], object],
        preprocess_s: float,
    ) -> None:
        self._bundle, self._bench, self._examples, self._table = bundle, bench, examples, table
        self._preprocess_s = preprocess_s
        self._measure: Measure = measure_for(bundle)
        self._whole = bundle.segment(WHOLE)
        self.whole_s, self._expected = _timed_all(lambda e: bench.run(self._whole, e.arrays), examples)
        self._sides: dict[str, list[tuple[dict[str, Array], int]]] = {}
        self._raw: dict[str, list[Mapping[str, Array]]] = {}

    def edge(self, run: Callable[[Mapping[str, Array]], dict[str, Array]] | None = None) -> Trial:
        """The whole model on the first hop, or the variant that `run` runs."""
        segment, found, run_s = self._whole, self._expected, self.whole_s
        if run is not None:
            run_s, found = _timed_all(lambda e: run(e.arrays), self._examples)
        near = [
            Exchange(_frame_bytes(e.arrays, segment.id), _frame_bytes(f, segment.id))
            for e, f in zip(self._examples, found, strict=True)
        ]
        return Trial(near=_typical(near), preprocess_s=self._preprocess_s, error=self._error(found), run_here_s=run_s)

    def photo(self, shape: tuple[int, ...], dtype: str, tensor: str) -> Trial:
        """The photo as it came to the whole model on the last hop, which makes its input of it."""
        far = []
        for example, outputs in zip(self._examples, self._expected, strict=True):
            packed = {tensor: Packed("photo/1", dtype, shape, example.photo or b"")}
            far.append(Exchange(_frame_bytes({}, WHOLE, packed), _frame_bytes(outputs, WHOLE)))
        codecs = {tensor: Coding("photo/1")}
        return Trial(far=_typical(far), codecs=codecs, error=Error(0.0, len(self._examples)))

    def cloud(self, choice: Choice) -> Trial | None:
        """The whole model on the last hop, its inputs packed; None where the choice packs none of them."""
        crossed = [(dict(e.arrays), 0) for e in self._examples]
        made = self._sent(choice, crossed, self._whole, self._bundle.inputs, "")
        return None if made is None else replace(made, preprocess_s=self._preprocess_s)

    def split(self, cut: str, choice: Choice) -> Trial | None:
        """The head on the first hop, the tail on the last; None where the choice packs nothing that crosses."""
        head, tail = self._bundle.segment(f"..{cut}"), self._bundle.segment(f"{cut}..")
        if cut not in self._sides:
            # One cut at a time: what crosses is kept for its codecs, and sessions take memory.
            self._bench.forget()
            self._sides, self._raw = {cut: []}, {}
            for example in self._examples:
                values = dict(example.arrays)
                given = self._bench.run(head, {s.name: values[s.name] for s in head.inputs})
                self._sides[cut].append((values | given, _frame_bytes(given, head.id)))
        crossed = self._sides[cut]
        made = self._sent(choice, crossed, tail, tail.inputs, cut)
        if made is None:
            return None
        sent = [_frame_bytes({s.name: values[s.name] for s in head.inputs}, head.id) for values, _ in crossed]
        near = [Exchange(n, received) for n, (_, received) in zip(sent, crossed, strict=True)]
        return replace(made, near=_typical(near), preprocess_s=self._preprocess_s)

    def _sent(
        self,
        choice: Choice,
        crossed: Sequence[tuple[dict[str, Array], int]],
        tail: Segment,
        specs: Sequence[TensorSpec],
        cut: str,
    ) -> Trial | None:
        how = packings(specs, choice, self._table)
        far, found, pack_s, unpack_s = [], [], [], []
        codecs: dict[str, Coding] = {}
        raw = self._raw.setdefault(cut, [])
        for i, (values, _) in enumerate(crossed):
            taken = {s.name: values[s.name] for s in specs}
            if i == 0 and any(packing.table is not None for packing in how.values()):
                _unpack(pack_all(taken, how), how)  # what is made of a table on its first use is kept
            seconds, coded = _timed(partial(pack_all, taken, how))
            pack_s.append(seconds if coded else 0.0)
            codecs |= {name: Coding(p.codec, how[name].quality) for name, p in coded.items()}
            rest = {name: array for name, array in taken.items() if name not in coded}
            seconds, unpacked = _timed(partial(_unpack, coded, how))
            unpack_s.append(seconds if coded else 0.0)
            arrived = {**rest, **unpacked}
            if len(raw) <= i:
                raw.append({**values, **self._bench.run(tail, taken)})
            same = all(_identical(taken[name], array) for name, array in unpacked.items())
            outputs = raw[i] if same else {**values, **self._bench.run(tail, arrived)}
            far.append(
                Exchange(
                    _frame_bytes(rest, tail.id, coded),
                    _frame_bytes({s.name: outputs[s.name] for s in tail.outputs}, tail.id),
                )
            )
            found.append({s.name: outputs[s.name] for s in self._bundle.outputs})
        if choice.codec != RAW and not codecs:
            return None
        return Trial(
            far=_typical(far),
            pack_s=statistics.median(pack_s),
            unpack_s=statistics.median(unpack_s),
            codecs=codecs,
            error=self._error(found),
        )

    def _error(self, found: Sequence[Mapping[str, Array]]) -> Error:
        pairs = list(zip(self._expected, found, strict=True))
        relative = max(self._measure.error(expected, got) for expected, got in pairs)
        differ = sum(not self._measure.same(expected, got) for expected, got in pairs)
        # A plan's numbers are finite; an answer that is all wrong is off by its whole size many times over.
        return Error(min(relative, 1e9), len(pairs), differ / len(pairs))


def _unpack(coded: Mapping[str, Packed], how: Mapping[str, Packing]) -> dict[str, Array]:
    return {
        name: find(p.codec).decode(memoryview(p.payload), DTYPES[p.dtype], p.shape, how[name].table)
        for name, p in coded.items()
    }


def _frame_bytes(arrays: Mapping[str, Array], segment: str, packed: Mapping[str, Packed] | None = None) -> int:
    return sum(map(len, frames.encode_parts(Frame(arrays, _DIGEST, segment, _CALL_ID, packed or {}))))


def _typical(exchanges: Sequence[Exchange]) -> Exchange:
    middle = statistics.median_low
    return Exchange(middle([e.sent for e in exchanges]), middle([e.received for e in exchanges]))


def _identical(one: Array, other: Array) -> bool:
    return one is other or one.tobytes() == other.tobytes()


def _timed(do: Callable[[], T]) -> tuple[float, T]:
    """What `do` gives, and the least seconds of a few tries, two if none is long: the machine may be busy."""
    best, found = _timed_once(do)
    spent = best
    while spent < _MANY_S:
        took, found = _timed_once(do)
        best, spent = min(best, took), spent + took
        if spent >= _FEW_S:
            break
    return best, found


def _timed_all(
    run: Callable[[Example], dict[str, Array]], examples: Sequence[Example]
) -> tuple[float, list[dict[str, Array]]]:
    """The answers to all examples, and the median over them of the least seconds of a few runs, warmed up."""
    run(examples[0])
    seconds, found = [], []
    for example in examples:
        tries = [_timed_once(partial(run, example)) for _ in range(_TRIES)]
        seconds.append(min(took for took, _ in tries))
        found.append(tries[0][1])
    return statistics.median(seconds), found


def _timed_once(do: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    found = do()
    return time.perf_counter() - start, found
