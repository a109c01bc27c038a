"""What a candidate does, found out by doing it here: bytes on the wire, the codecs' time, how far answers are off."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from isthmus.arrays import Array
from isthmus.artifacts.agreement import Measure, measure_for
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.choice import RAW_ID, Choice
from isthmus.artifacts.plan import CloserLooks, Coding, Error
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.artifacts.tensors import TensorSpec
from isthmus.codecs import EncodedTensor
from isthmus.codecs.choice import encodings
from isthmus.pipeline.agreement import agrees, output_error
from isthmus_tools.planner.costs import Exchange
from isthmus_tools.planner.examples import Example
from isthmus_tools.planner.sends import frame_bytes, send, sends
from isthmus_tools.planner.timing import timed_all
from isthmus_tools.planner.workbench import Workbench


@dataclass(frozen=True)
class Option:
    """One way to serve the model, before anything is known of it. `choice` is how what goes to the cloud is packed."""

    name: str
    kind: str
    cuts: tuple[str, ...] = ()
    choice: Choice = Choice(RAW_ID)  # noqa: RUF009 - it is frozen
    photo: bool = False
    variant: bool = False


@dataclass(frozen=True)
class Trial:
    """What an option does on the examples: medians of bytes and of seconds on this machine, and the error.

    `codecs` are the tensors that did not go raw; `run_here_s` is the whole variant's run, where it is one. With `looks`
    bytes and codecs' seconds are those of the first send and the shares of each further one.
    """

    near: Exchange | None = None
    far: Exchange | None = None
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    codecs: Mapping[str, Coding] = field(default_factory=dict)
    error: Error = Error(0.0, 0)  # noqa: RUF009 - it is frozen
    run_here_s: float = 0.0
    looks: CloserLooks | None = None


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
        self.whole_s, self._expected = timed_all(lambda e: bench.run(self._whole, e.arrays), examples)
        self._sides: dict[str, list[Mapping[str, Array]]] = {}
        self._near: dict[str, Exchange] = {}
        self._raw: dict[str, dict[int, Mapping[str, Array]]] = {}

    def edge(self, run: Callable[[Mapping[str, Array]], dict[str, Array]] | None = None) -> Trial:
        """The whole model on the first hop, or the variant that `run` runs."""
        segment, found, run_s = self._whole, self._expected, self.whole_s
        if run is not None:
            run_s, found = timed_all(lambda e: run(e.arrays), self._examples)
        near = [
            Exchange(frame_bytes(e.arrays, segment.id), frame_bytes(f, segment.id))
            for e, f in zip(self._examples, found, strict=True)
        ]
        return Trial(near=_typical(near), preprocess_s=self._preprocess_s, error=self._error(found), run_here_s=run_s)

    def photo(self, shape: tuple[int, ...], dtype: str, tensor: str) -> Trial:
        """The photo as it came to the whole model on the last hop, which makes its input of it."""
        far = []
        for example, outputs in zip(self._examples, self._expected, strict=True):
            encoded = {tensor: EncodedTensor("photo/1", dtype, shape, example.photo or b"")}
            far.append(Exchange(frame_bytes({}, WHOLE, encoded), frame_bytes(outputs, WHOLE)))
        codecs = {tensor: Coding("photo/1")}
        return Trial(far=_typical(far), codecs=codecs, error=Error(0.0, len(self._examples)))

    def cloud(self, choice: Choice) -> Trial | None:
        """The whole model on the last hop, its inputs packed; None where the choice packs none of them."""
        crossed = [e.arrays for e in self._examples]
        made = self._sent(choice, crossed, self._whole, self._bundle.inputs, "")
        return None if made is None else replace(made, preprocess_s=self._preprocess_s)

    def split(self, cut: str, choice: Choice) -> Trial | None:
        """The head on the first hop, the tail on the last; None where the choice packs nothing that crosses."""
        crossed, near = self._crossing(cut)
        tail = self._bundle.segment(SegmentId(cut))
        made = self._sent(choice, crossed, tail, tail.inputs, cut)
        return None if made is None else replace(made, near=near, preprocess_s=self._preprocess_s)

    def closer(self, cut: str, choice: Choice, looks: CloserLooks, error: Error) -> Trial | None:
        """The same with closer looks, which each example takes; None where nothing that crosses could be sent finer.

        The tail runs on nothing of it: how far the answers are off is known already, which is the `error`.
        """
        crossed, near = self._crossing(cut)
        tail = self._bundle.segment(SegmentId(cut))
        qualities = (choice.quality, *(look.quality for look in looks.looks))
        hows = [encodings(tail.inputs, Choice(choice.codec, quality), self._table) for quality in qualities]
        tries: list[list[tuple[int, float, float]]] = [[] for _ in hows]
        received, codecs = [], dict[str, Coding]()
        for i, values in enumerate(crossed):
            taken = {s.name: values[s.name] for s in tail.inputs}
            if i == 0:
                sends(taken, tail.id, hows)  # as in `_sent`
            made = sends(taken, tail.id, hows)
            codecs |= {name: Coding(hows[0][name].codec, hows[0][name].quality) for name in made[0].coded}
            for found, sent in zip(tries, made, strict=False):
                found.append((sent.nbytes, sent.encode_s, sent.decode_s))
            received.append(self._answer_bytes(self._untouched(cut, i, values, tail), tail))
        if not all(tries):
            return None
        up = encode_s = decode_s = 0.0
        for share, found in zip((1.0, *looks.shares), tries, strict=True):
            nbytes, packing, unpacking = zip(*found, strict=True)
            up += share * statistics.median_low(nbytes)
            encode_s += share * statistics.median(packing)
            decode_s += share * statistics.median(unpacking)
        down = (1 + looks.again) * statistics.median_low(received)
        return Trial(
            near=near,
            far=Exchange(round(up), round(down)),
            preprocess_s=self._preprocess_s,
            encode_s=encode_s,
            decode_s=decode_s,
            codecs=codecs,
            error=error,
            looks=looks,
        )

    def _crossing(self, cut: str) -> tuple[Sequence[Mapping[str, Array]], Exchange]:
        """All values that are known once the head has run, for each example, and the call to it."""
        head = self._bundle.segment(SegmentId(stop=cut))
        if cut not in self._sides:
            # One cut at a time: what crosses is kept for its codecs, and sessions take memory.
            self._bench.forget()
            self._sides, self._raw, near = {cut: []}, {}, []
            for example in self._examples:
                taken = {s.name: example.arrays[s.name] for s in head.inputs}
                given = self._bench.run(head, taken)
                self._sides[cut].append({**example.arrays, **given})
                near.append(Exchange(frame_bytes(taken, head.id), frame_bytes(given, head.id)))
            self._near[cut] = _typical(near)
        return self._sides[cut], self._near[cut]

    def _untouched(self, cut: str, example: int, values: Mapping[str, Array], tail: Segment) -> Mapping[str, Array]:
        """All values of an example when its tail has had what crosses as it is."""
        raw = self._raw.setdefault(cut, {})
        if example not in raw:
            raw[example] = {**values, **self._bench.run(tail, {s.name: values[s.name] for s in tail.inputs})}
        return raw[example]

    def _sent(
        self,
        choice: Choice,
        crossed: Sequence[Mapping[str, Array]],
        tail: Segment,
        specs: Sequence[TensorSpec],
        cut: str,
    ) -> Trial | None:
        how = encodings(specs, choice, self._table)
        far, found, encode_s, decode_s = [], [], [], []
        codecs: dict[str, Coding] = {}
        for i, values in enumerate(crossed):
            taken = {s.name: values[s.name] for s in specs}
            if i == 0 and any(packing.table is not None for packing in how.values()):
                send(taken, tail.id, how)  # what is made of a table on its first use is kept
            sent = send(taken, tail.id, how)
            encode_s.append(sent.encode_s)
            decode_s.append(sent.decode_s)
            codecs |= {name: Coding(p.codec, how[name].quality) for name, p in sent.coded.items()}
            outputs = self._untouched(cut, i, values, tail)
            if not all(_identical(taken[name], array) for name, array in sent.arrived.items()):
                outputs = {**values, **self._bench.run(tail, {**taken, **sent.arrived})}
            far.append(Exchange(sent.nbytes, self._answer_bytes(outputs, tail)))
            found.append({s.name: outputs[s.name] for s in self._bundle.outputs})
        if choice.codec != RAW_ID and not codecs:
            return None
        return Trial(
            far=_typical(far),
            encode_s=statistics.median(encode_s),
            decode_s=statistics.median(decode_s),
            codecs=codecs,
            error=self._error(found),
        )

    def _answer_bytes(self, values: Mapping[str, Array], tail: Segment) -> int:
        return frame_bytes({s.name: values[s.name] for s in tail.outputs}, tail.id)

    def _error(self, found: Sequence[Mapping[str, Array]]) -> Error:
        pairs = list(zip(self._expected, found, strict=True))
        relative = max(output_error(self._measure, expected, got) for expected, got in pairs)
        differ = sum(not agrees(self._measure, expected, got) for expected, got in pairs)
        # A plan's numbers are finite; an answer that is all wrong is off by its whole size many times over.
        return Error(min(relative, 1e9), len(pairs), differ / len(pairs))


def _typical(exchanges: Sequence[Exchange]) -> Exchange:
    middle = statistics.median_low
    return Exchange(middle([e.sent for e in exchanges]), middle([e.received for e in exchanges]))


def _identical(one: Array, other: Array) -> bool:
    return one is other or one.tobytes() == other.tobytes()
