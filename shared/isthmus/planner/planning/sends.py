"""What goes to the last hop, sent and received here: bytes of the frames, seconds of packing and unpacking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from isthmus import frame as frames
from isthmus.codecs import Array, Packed, Packing, find
from isthmus.frame import DTYPES, Frame
from isthmus.kept import keeps_all
from isthmus.passage import pack_all
from isthmus.planner.planning.timing import timed

if TYPE_CHECKING:
    from isthmus.codecs.layers import Trail

_CALL_ID = "0" * 36
_DIGEST = "sha256:" + "0" * 64


class Send(NamedTuple):
    """One send: bytes of its frame, seconds here, what went packed, and the same as it arrives."""

    nbytes: int
    pack_s: float
    unpack_s: float
    coded: Mapping[str, Packed]
    arrived: Mapping[str, Array]


def send(arrays: Mapping[str, Array], segment: str, how: Mapping[str, Packing]) -> Send:
    """`arrays` on their way to that segment, packed as `how` says."""
    pack_s, coded = timed(partial(pack_all, arrays, how))
    return _received(arrays, segment, coded, pack_s, {name: packing.table for name, packing in how.items()})


def sends(arrays: Mapping[str, Array], segment: str, hows: Sequence[Mapping[str, Packing]]) -> list[Send]:
    """`arrays` as closer looks send them one after the other: each time what refines them, else all of it, finer.

    Only the first, where nothing went that could be finer.
    """
    from isthmus.codecs.layers import Basis, layered

    keeper = keeps_all()
    trails: dict[str, Trail] = {}
    made: list[Send] = []
    for how in hows:
        first = {name: layered(p) for name, p in how.items()}
        tables = {
            name: p.table if p.codec == how[name].codec else Basis(p.table, keeper, _DIGEST, name)
            for name, p in first.items()
        }
        pack_s, (coded, longer) = timed(partial(_followed, arrays, trails, first))
        made.append(_received(arrays, segment, coded, pack_s, tables))
        trails |= longer
        if not any(how[name].quality < hows[-1][name].quality for name in made[0].coded):
            break
    return made


def frame_bytes(arrays: Mapping[str, Array], segment: str, packed: Mapping[str, Packed] | None = None) -> int:
    """Bytes of the frame that takes these to a segment, or back."""
    return sum(map(len, frames.encode_parts(Frame(arrays, _DIGEST, segment, _CALL_ID, packed or {}))))


def _followed(
    arrays: Mapping[str, Array], trails: Mapping[str, Trail], how: Mapping[str, Packing]
) -> tuple[Mapping[str, Packed], Mapping[str, Trail]]:
    """All that is packed of one send, and what has been sent then of the tensors that can be refined."""
    from isthmus.codecs.layers import follow_all, trails_of

    refined, longer = follow_all(trails, how)
    coded = pack_all(arrays, how, refined)
    return coded, longer | trails_of(coded, _DIGEST)


def _received(
    arrays: Mapping[str, Array],
    segment: str,
    coded: Mapping[str, Packed],
    pack_s: float,
    tables: Mapping[str, object],
) -> Send:
    rest = {name: array for name, array in arrays.items() if name not in coded}
    unpack_s, unpacked = timed(partial(_unpack, coded, tables))
    nbytes = frame_bytes(rest, segment, coded)
    return Send(nbytes, pack_s if coded else 0.0, unpack_s if coded else 0.0, coded, unpacked)


def _unpack(coded: Mapping[str, Packed], tables: Mapping[str, object]) -> dict[str, Array]:
    return {
        name: find(p.codec).decode(memoryview(p.payload), DTYPES[p.dtype], p.shape, tables[name])
        for name, p in coded.items()
    }
