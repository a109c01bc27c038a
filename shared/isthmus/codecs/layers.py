"""`layers/2`: what `transform/4` packs, kept by the reader for a while, so that refinements need not say it again.

A payload is one of `transform/4`; or a byte 0x80, which is no step of any, the key of what the reader is to have, and
the refinement that follows it. Keys are hashes of all that was sent, and of which tensor it is: nothing can be refined
but what it belongs to. docs/codecs.md, "layers/2".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, NamedTuple, Self

import numpy as np

from isthmus.codecs import LAYERS_ID, TRANSFORM_ID, NotPackable, Packed, Packing
from isthmus.codecs.kept_tensors import KEY_BYTES, REFINEMENT, Held, Keeper, Of
from isthmus.codecs.payload import count_of
from isthmus.codecs.refining import Known, known_at, known_of, read, refine, tensor_of
from isthmus.codecs.steps import THIRD, step_of
from isthmus.codecs.table import Table
from isthmus.codecs.transform import DTYPES, TRANSFORM, coded
from isthmus.errors import NotKept

Array = np.ndarray[Any, np.dtype[Any]]


_KNOWN_BYTES = 2 * 4
"""For each value: int32 at most, of which there are two, the coarse ones and the refined."""


class First(bytes):
    """A tensor's first payload, with what its writer needs to refine it: its step, and its components in units."""

    step: int
    values: Array

    def __new__(cls, payload: bytes, step: int, values: Array) -> Self:
        made = super().__new__(cls, payload)
        made.step, made.values = step, values
        return made


class Trail(NamedTuple):
    """What a writer has sent of one tensor by now, the key that stands for it, and what refining it further takes."""

    key: bytes
    of: Of
    known: Known
    values: Array


@dataclass(frozen=True)
class Basis:
    """What unpacking needs: the tensor's table, where what may be refined is kept, and which bundle's tensor it is."""

    table: object
    keeper: Keeper
    bundle: str
    tensor: str


class Layers:
    """The codec; what it keeps is in the keeper that it is given."""

    calibrated = True

    def encode(self, array: Array, packing: Packing) -> First:
        """The first payload of a tensor.

        Raises:
            NotPackable: as `transform/4`; or the tensor's table is one that nothing can be refined with.
        """
        if not isinstance(packing.table, Table) or not array.size:
            raise NotPackable("only tensors in planes are refined, and none that is empty")
        return First(*coded(array, packing.table, packing.quality))

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: what `transform/4` takes, and the whole numbers that are known before and after."""
        return TRANSFORM.working_bytes(dtype, shape) + count_of(shape) * _KNOWN_BYTES

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object) -> Array:
        """The tensor, as far as it was sent.

        Raises:
            NotKept: it refines what is not kept here, or no longer.
            ValueError: no basis; or the payload is not one of that dtype and shape.
        """
        if not isinstance(table, Basis) or not isinstance(table.table, Table):
            raise ValueError("there is no table for this tensor, or none that it can be refined with")
        if dtype not in DTYPES:
            raise ValueError(f"a transform does not pack {dtype}")
        of = Of(table.bundle, table.tensor, dtype.name, shape)
        if payload[:1] != REFINEMENT:
            held = Held(_first_key(of, payload), of, known_of(payload, shape, table.table))
        else:
            before, part = self._before(payload[1:], of, table), payload[1 + KEY_BYTES :]
            held = Held(_hashed((before.key, part)), of, read(part, before.known, shape, table.table))
        found = tensor_of(held.known, dtype, shape, table.table)
        table.keeper.keep(held)
        return found

    @staticmethod
    def _before(payload: memoryview, of: Of, basis: Basis) -> Held:
        """What a refinement's key stands for.

        Raises:
            NotKept: it is not kept here, or it is another tensor's.
            ValueError: the payload ends within the key.
        """
        if len(payload) < KEY_BYTES:
            raise ValueError("a refinement ends within its key")
        found = basis.keeper.find(bytes(payload[:KEY_BYTES]))
        if found is None or found.of != of:
            raise NotKept(
                f"{basis.tensor!r} refines what this function does not keep, or no longer; send it whole",
                tensor=basis.tensor,
            )
        return found


LAYERS = Layers()


def trail_of(packed: Packed, bundle: str, tensor: str) -> Trail:
    """What has been sent of a tensor with its first payload, which was packed here.

    Raises:
        ValueError: it was not, or is no first payload.
    """
    first = packed.payload
    if not isinstance(first, First):
        raise ValueError(f"{tensor!r} was not packed here to be refined")
    of = Of(bundle, tensor, packed.dtype, packed.shape)
    return Trail(_first_key(of, first), of, known_at(first.values, first.step), first.values)


def trails_of(sent: Mapping[str, Packed], bundle: str) -> dict[str, Trail]:
    """What has been sent of those tensors by name that were packed here to be refined."""
    return {name: trail_of(p, bundle, name) for name, p in sent.items() if isinstance(p.payload, First)}


def follow(trail: Trail, packing: Packing) -> tuple[Packed, Trail]:
    """The refinement of a tensor to the quality of `packing`, and what has been sent with it.

    Raises:
        NotPackable: the step of that quality is not a third of the one before, or it cannot be refined.
    """
    table = packing.table
    if not isinstance(table, Table):
        raise NotPackable("only tensors in planes are refined")
    if trail.known.step - step_of(packing.quality, table.steps) != THIRD:
        raise NotPackable("the step of that quality is not a third of the one before")
    part, known = refine(trail.values, trail.of.shape, trail.known, table)
    packed = Packed(LAYERS_ID, trail.of.dtype, trail.of.shape, REFINEMENT + trail.key + part)
    return packed, trail._replace(key=_hashed((trail.key, part)), known=known)


def follow_all(
    trails: Mapping[str, Trail], packings: Mapping[str, Packing]
) -> tuple[dict[str, Packed], dict[str, Trail]]:
    """Those tensors by name that can be refined to their packing's quality, and what has been sent with that."""
    made: dict[str, Packed] = {}
    longer: dict[str, Trail] = {}
    for name, trail in trails.items():
        with suppress(NotPackable):
            made[name], longer[name] = follow(trail, packings[name])
    return made, longer


def layered(packing: Packing) -> Packing:
    """How a tensor is packed first that may be refined later; as it is where it cannot be."""
    refinable = packing.codec == TRANSFORM_ID and isinstance(packing.table, Table)
    return replace(packing, codec=LAYERS_ID) if refinable else packing


def _first_key(of: Of, payload: bytes | memoryview) -> bytes:
    about = "\n".join((of.bundle, of.tensor, of.dtype, *map(str, of.shape))).encode()
    return _hashed((len(about).to_bytes(8, "little"), about, payload))


def _hashed(parts: Iterable[bytes | memoryview]) -> bytes:
    made = blake2b(digest_size=KEY_BYTES)
    for part in parts:
        made.update(part)
    return made.digest()
