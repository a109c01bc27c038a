"""Short frames: refinements alone, without a header, since the reader knows what they are of.

A header weighs half a kB, and a refinement often not much more. Specification: docs/frame.md, "Short frames".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from isthmus.codecs import LAYERS_ID, Array, Packed, find
from isthmus.codecs.kept_tensors import KEY_BYTES, REFINEMENT, Held, Keeper
from isthmus.dtypes import DTYPES
from isthmus.errors import FrameMalformed, NotKept

MAGIC = b"ISTHMUS\x02"
_MOST = 255
"""Payloads, and characters of a text: both are counted by a byte."""
_LENGTH = struct.Struct("<I")


class Short(NamedTuple):
    """What a short frame says: by tensor, the payload and the kept tensor that it refines."""

    bundle: str
    segment: str
    request: str
    parts: dict[str, tuple[memoryview, Held]]

    @property
    def decoded_bytes(self) -> int:
        """What the tensors weigh."""
        return sum(math.prod(held.of.shape) * DTYPES[held.of.dtype].itemsize for _, held in self.parts.values())

    @property
    def working_bytes(self) -> int:
        """What decoding the most demanding one takes beside them."""
        each = [held.of for _, held in self.parts.values()]
        return max(find(LAYERS_ID).working_bytes(DTYPES[of.dtype], of.shape) for of in each)


def fits(segment: str, request: str, packed: Mapping[str, Packed]) -> bool:
    """Whether a short frame can say it: refinements, each of which names its tensor."""
    return (
        len(packed) <= _MOST
        and all(text.isascii() and len(text) <= _MOST for text in (segment, request))
        and all(p.codec == LAYERS_ID and p.payload[:1] == REFINEMENT for p in packed.values())
    )


def encode(segment: str, request: str, packed: Mapping[str, Packed]) -> list[bytes | memoryview]:
    """The frame's bytes, in parts; it must fit."""
    texts = [bytes((len(text),)) + text.encode("ascii") for text in (segment, request)]
    parts: list[bytes | memoryview] = [b"".join((MAGIC, *texts, bytes((len(packed),))))]
    for tensor in packed.values():
        parts += [_LENGTH.pack(len(tensor.payload)), tensor.payload]
    return parts


def read(view: memoryview, keeper: Keeper) -> Short:
    """Read one, but for its payloads; `view` starts with MAGIC.

    Raises:
        NotKept: a payload refines what is not kept.
        FrameMalformed: a rule of docs/frame.md is broken.
    """
    segment, request, payloads = _parts(view)
    parts: dict[str, tuple[memoryview, Held]] = {}
    for payload in payloads:
        if payload[:1] != REFINEMENT or len(payload) <= KEY_BYTES:
            _malformed("a payload of a short frame is no refinement")
        found = keeper.find(bytes(payload[1 : 1 + KEY_BYTES]))
        if found is None:
            raise NotKept("a short frame refines what this function does not keep, or no longer; send it whole")
        if found.of.tensor in parts:
            _malformed(f"a short frame refines {found.of.tensor!r} twice")
        parts[found.of.tensor] = payload, found
    bundles = {held.of.bundle for _, held in parts.values()}
    if len(bundles) != 1:
        _malformed(f"a short frame refines tensors of {len(bundles)} bundles")
    return Short(bundles.pop(), segment, request, parts)


def decode(short: Short, tables: Mapping[str, object]) -> dict[str, Array]:
    """The refined tensors, each by its table.

    Raises:
        NotKept: a payload refines what is no longer kept.
        FrameMalformed: a payload is none of its tensor's.
    """
    tensors: dict[str, Array] = {}
    for name, (payload, held) in short.parts.items():
        try:
            tensors[name] = find(LAYERS_ID).decode(payload, DTYPES[held.of.dtype], held.of.shape, tables[name])
        except ValueError as e:
            raise FrameMalformed(f"{name!r} cannot be unpacked: {e}", rule="payload", tensor=name) from e
    return tensors


def _parts(view: memoryview) -> tuple[str, str, list[memoryview]]:
    """The segment, the request and the payloads, which are views."""
    at = len(MAGIC)

    def take(count: int) -> memoryview:
        nonlocal at
        if at + count > len(view):
            _malformed(f"a short frame of {len(view)} bytes ends within a part")
        at += count
        return view[at - count : at]

    try:
        segment, request = (str(take(take(1)[0]), "ascii") for _ in range(2))
    except UnicodeDecodeError as e:
        raise FrameMalformed(f"a short frame's text is not ASCII: {e}", rule="short") from e
    payloads = [take(_LENGTH.unpack(take(_LENGTH.size))[0]) for _ in range(take(1)[0])]
    if at != len(view):
        _malformed(f"{len(view) - at} bytes follow a short frame's {len(payloads)} payloads")
    return segment, request, payloads


def _malformed(message: str, rule: str = "short") -> NoReturn:
    raise FrameMalformed(message, rule=rule, hint="docs/frame.md has the rules")
