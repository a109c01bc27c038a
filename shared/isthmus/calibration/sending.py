"""Ways to send what crosses a cut, tried in one process: what arrives, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from isthmus.calibration.choice import Choice, packings
from isthmus.calibration.crossing import Crossing
from isthmus.codecs import Packed, Packing, find, pack
from isthmus.frame import DTYPES, Frame, encode_parts
from isthmus.kept import keeps_all
from isthmus.runners import Array

FINER_BY = 0.2
"""How much higher the quality of a closer look is: a third of the step of tables as they are learned."""
_NEAR = 1e-3
_CALL_ID = "0" * 36
_DIGEST = "sha256:" + "0" * 64


class Cost(NamedTuple):
    """Units: bytes of payloads; seconds of this thread's CPU time."""

    bytes: int
    pack_s: float = 0.0
    unpack_s: float = 0.0

    def plus(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(self.bytes + other.bytes, self.pack_s + other.pack_s, self.unpack_s + other.unpack_s)


@dataclass(frozen=True)
class Sent:
    """Tensors after packing and unpacking, and what that cost; `closer` is the same of a closer look that ends here.

    A look's bytes are those of its whole frame: the first send's header is there whatever the codec, a look's is not.
    """

    tensors: Mapping[str, Array]
    cost: Cost
    closer: Cost = Cost(0)  # noqa: RUF009 - it is a tuple
    fell_back: bool = False


class Way(Protocol):
    """One way to send what crosses a cut."""

    @property
    def name(self) -> str:
        """What tallies call it."""
        ...

    def send(self, tensors: Mapping[str, Array]) -> Sent:
        """The tensors as they arrive, and what that cost."""
        ...


@dataclass(frozen=True)
class Trial:
    """One codec at one quality: how each tensor is packed that goes to `segment`.

    `coarser` is how those were packed before that a closer look of this quality refines.
    """

    choice: Choice
    packings: Mapping[str, Packing]
    segment: str = ""
    coarser: Mapping[str, Packing] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As settings write it."""
        return str(self.choice)

    def send(self, tensors: Mapping[str, Array]) -> Sent:
        """Pack and unpack, as a hop would."""
        arrived, again = dict(tensors), dict[str, Packed]()
        whole, closer, fell_back = Cost(0), Cost(0), False
        for name, array in tensors.items():
            how = self.packings.get(name)
            cost = Cost(array.nbytes)
            if how is not None:
                start = time.thread_time()
                packed = pack(array, how)
                pack_s, unpack_s = time.thread_time() - start, 0.0
                if isinstance(packed, Packed):
                    payload, dtype = memoryview(packed.payload), DTYPES[packed.dtype]
                    start = time.thread_time()
                    arrived[name] = find(packed.codec).decode(payload, dtype, packed.shape, how.table)
                    unpack_s = time.thread_time() - start
                    again[name] = packed
                else:
                    fell_back = fell_back or how.codec == self.choice.codec
                cost = Cost(packed.nbytes, pack_s, unpack_s)
            whole = whole.plus(cost)
            look = self._refinement(name, array)
            closer = closer.plus(cost if look is None else look[1])
            if look is not None:
                again[name] = look[0]
        rest = {name: array for name, array in tensors.items() if name not in again}
        look_bytes = sum(map(len, encode_parts(Frame(rest, _DIGEST, self.segment, _CALL_ID, again))))
        return Sent(arrived, whole, closer._replace(bytes=look_bytes), fell_back)

    def _refinement(self, name: str, array: Array) -> tuple[Packed, Cost] | None:
        """One tensor's refinement, and what it costs; None where the tensor is sent whole."""
        from isthmus.codecs.layers import LAYERS, Basis, follow, layered, trail_of

        coarse, fine = self.coarser.get(name), self.packings.get(name)
        first = pack(array, layered(coarse)) if coarse is not None else None
        if not isinstance(first, Packed) or fine is None:
            return None
        basis = Basis(fine.table, keeps_all(), "", name)
        try:
            trail = trail_of(first, "", name)
            start = time.thread_time()
            packed, _ = follow(trail, fine)
        except ValueError:
            return None
        pack_s = time.thread_time() - start
        dtype = DTYPES[packed.dtype]
        LAYERS.decode(memoryview(first.payload), dtype, first.shape, basis)
        start = time.thread_time()
        LAYERS.decode(memoryview(packed.payload), dtype, packed.shape, basis)
        return packed, Cost(packed.nbytes, pack_s, time.thread_time() - start)


def trials(crossing: Crossing, choices: Sequence[Choice], tables: Mapping[str, object]) -> list[Trial]:
    """Those of `choices` that can be tried at a cut: a calibrated codec needs a table for a tensor that crosses."""
    to = crossing.tail[0].id if crossing.tail else ""
    made = [Trial(choice, packings(crossing.tensors, choice, tables.get), to) for choice in choices]
    possible = [
        t
        for t in made
        if not find(t.choice.codec).calibrated or t.choice.codec in {p.codec for p in t.packings.values()}
    ]
    return [replace(t, coarser=_before(t, possible)) for t in possible]


def finer_than(choice: Choice, others: Sequence[Choice]) -> Choice | None:
    """The one of `others` that a closer look after `choice` would send."""
    wanted = choice.quality + FINER_BY
    return next((o for o in others if o.codec == choice.codec and abs(o.quality - wanted) < _NEAR), None)


def _before(trial: Trial, others: Sequence[Trial]) -> Mapping[str, Packing]:
    """How the trial that a closer look of this one follows packs those tensors that a table is there for."""
    choice = trial.choice
    for other in others:
        if finer_than(other.choice, [choice]) is not None:
            return {name: how for name, how in other.packings.items() if how.codec == choice.codec and how.table}
    return {}
