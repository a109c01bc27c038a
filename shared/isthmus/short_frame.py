"""Short frames: refinements alone, without a header, since the reader knows what they are of.

A header weighs half a kB, and a refinement often not much more. Specification: docs/frame.md, "Short frames".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from isthmus.codecs import LAYERS_ID, Array, Packed, Tables, find
from isthmus.codecs.kept_tensors import KEY_BYTES, REFINEMENT, Held, Keeper
from isthmus.dtypes import DTYPES
from isthmus.errors import FrameMalformed, FrameTooLarge, NotKept

MAGIC = b"ISTHMUS\x02"
_MOST = 255
"""Payloads, and characters of a text: both are counted by a byte."""
_LENGTH = struct.Struct("<I")


class Short(NamedTuple):
    """What a short frame says."""

    bundle: str
    segment: str
    request: str
    tensors: dict[str, Array]


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


def decode(view: memoryview, max_bytes: int, tables: Tables | None, keeper: Keeper | None) -> Short:
    """Read one; `view` starts with MAGIC.

    Raises:
        NotKept: a payload refines what is not kept.
        FrameTooLarge: the tensors unpack to more than `max_bytes`.
        FrameMalformed: a rule of docs/frame.md is broken.
    """
    segment, request, payloads = _parts(view)
    if keeper is None or tables is None:
        _malformed("a short frame refines what a function keeps, and nothing is kept here", rule="table")
    held: dict[str, Held] = {}
    for payload in payloads:
        if payload[:1] != REFINEMENT or len(payload) <= KEY_BYTES:
            _malformed("a payload of a short frame is no refinement")
        found = keeper.find(bytes(payload[1 : 1 + KEY_BYTES]))
        if found is None:
            raise NotKept("a short frame refines what this function does not keep, or no longer; send it whole")
        if found.of.tensor in held:
            _malformed(f"a short frame refines {found.of.tensor!r} twice")
        held[found.of.tensor] = found
    bundles = {each.of.bundle for each in held.values()}
    if len(bundles) != 1:
        _malformed(f"a short frame refines tensors of {len(bundles)} bundles")
    size = sum(math.prod(each.of.shape) * DTYPES[each.of.dtype].itemsize for each in held.values())
    if size > max_bytes:
        message = f"the tensors unpack to more than {max_bytes} bytes"
        raise FrameTooLarge(message, rule="unpacked", limit=max_bytes)
    (bundle,) = bundles
    tensors: dict[str, Array] = {}
    for payload, (name, each) in zip(payloads, held.items(), strict=True):
        table = tables(bundle, name, LAYERS_ID)
        try:
            tensors[name] = find(LAYERS_ID).decode(payload, DTYPES[each.of.dtype], each.of.shape, table)
        except ValueError as e:
            raise FrameMalformed(f"{name!r} cannot be unpacked: {e}", rule="payload", tensor=name) from e
    return Short(bundle, segment, request, tensors)


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
