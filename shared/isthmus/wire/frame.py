"""The frame: named tensors and what they are for, as bytes between functions. Specification: docs/frame.md.

Reading a frame executes nothing, allocates nothing that the bounds do not allow, copies no payload and leaves no byte
unexplained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from json.encoder import encode_basestring as _quoted
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, TypeAlias

from isthmus.arrays import DTYPES as DTYPES
from isthmus.arrays import Array
from isthmus.artifacts.choice import KNOWN, RAW_ID
from isthmus.artifacts.tensors import TensorType
from isthmus.codecs import EncodedTensor, Tables, find_codec
from isthmus.codecs.raw import RAW
from isthmus.errors import FrameMalformed, FrameTooLarge
from isthmus.wire.json_bounds import parsed_bytes

CONTENT_TYPE = "application/vnd.isthmus.frame"
MAGIC = b"ISTHMUS\x01"
"""First bytes of every frame; the last one is the format's version."""
_SHORT_VERSION = 2
"""Held refinements of tensors that the reader had kept. The number is taken: it will never mean anything else."""

ALIGNMENT = 64
MAX_HEADER_BYTES = 2**20
MAX_TENSORS = 1024
MAX_RANK = 32
MAX_TEXT_BYTES = 512

_NAMES = {dtype.num: name for name, dtype in DTYPES.items()}
"""Names by numpy's number of the dtype: `np.dtype.name` takes longer than a whole header, and so does its hash."""
_NONE: Mapping[str, Any] = MappingProxyType({})
_Entry: TypeAlias = tuple[str, str, tuple[int, ...], str, int, int]
_Described: TypeAlias = tuple[str, str, tuple[int, ...], str, int]
"""What a tensor's entry is made of; -1 stands for a payload of as many bytes as the dtype and the shape have."""
_PREAMBLE = 16
_SEEN_BYTES = 4096
"""Longer headers are not remembered: whoever sends them decides how many there are."""
_PLAIN_END = re.compile(rb'([ !#-\[\]-~]{0,%d})"} *' % MAX_TEXT_BYTES)
_TENSOR_KEYS = ("name", "dtype", "shape", "codec", "offset", "length")
_TEXT_KEYS = ("bundle", "segment", "request")


_ENTRY_BYTES, _DIM_BYTES = 160, 21
"""At most what a header writes of a tensor beside its name, and of one dimension."""
_TEXTS_BYTES = 8192
"""Of a header, for what it says of the frame itself."""


def why_not_carried(name: str, dtype: str, rank: int) -> str:
    """The reason why no frame carries a tensor of that name, dtype (numpy's name) and rank; empty where frames do."""
    if dtype not in DTYPES:
        return f"its dtype is {dtype}; frames carry {', '.join(DTYPES)}"
    if rank > MAX_RANK:
        return f"its rank is {rank}; frames carry at most {MAX_RANK}"
    if not 1 <= (size := len(name.encode("utf-8", "replace"))) <= MAX_TEXT_BYTES:
        return f"its name has {size} bytes; frames carry names of 1 to {MAX_TEXT_BYTES}"
    return ""


def entry_bytes(name: str, rank: int) -> int:
    """An upper bound of the bytes that a tensor's entry takes in a header."""
    return len(_quoted(name).encode("utf-8", "replace")) + _DIM_BYTES * rank + _ENTRY_BYTES


def why_not_together(count: int, entries: int) -> str:
    """The reason why no frame carries that many tensors, whose entries sum to `entries` bytes; empty where one does."""
    if count > MAX_TENSORS:
        return f"{count} tensors; a frame carries at most {MAX_TENSORS}"
    if entries + _TEXTS_BYTES > MAX_HEADER_BYTES:
        return f"the names and shapes of {count} tensors; a frame's header has at most {MAX_HEADER_BYTES} bytes"
    return ""


def _nothing(outline: Outline) -> AbstractContextManager[None]:
    return nullcontext()


class Frame(NamedTuple):
    """One message between functions.

    `bundle` is a manifest's digest, `segment` the id of the segment that takes (or gave) the tensors, `request` an id
    that names the request in logs. Arrays of a decoded frame are views of its bytes: read-only, and shapes as sent.
    """

    tensors: Mapping[str, Array]
    bundle: str = ""
    segment: str = ""
    request: str = ""
    encoded: Mapping[str, EncodedTensor] = _NONE
    """Tensors to be sent packed, beside those in `tensors`; a decoded frame has none."""
    codecs: Mapping[str, str] = _NONE
    """In a decoded frame, the codec of each tensor that did not come raw."""


class Outline(NamedTuple):
    """What a frame declares, before any payload is decoded.

    Units: `decoded_bytes` is what the tensors weigh that did not come raw, `working_bytes` what decoding the most
    demanding one takes beside them.
    """

    bundle: str
    segment: str
    tensors: Mapping[str, TensorType]
    decoded_bytes: int
    working_bytes: int


Accept: TypeAlias = Callable[[Outline], None]
"""Whether a frame is wanted: it raises where the frame is not, and then no payload is decoded and no table is read."""
During: TypeAlias = Callable[[Outline], AbstractContextManager[None]]
"""What is held while payloads are decoded; it raises where they cannot be now."""


def encode(frame: Frame) -> bytes:
    """A frame's bytes, each payload copied once.

    Raises:
        FrameMalformed, FrameTooLarge: as `encode_parts`.
    """
    return b"".join(encode_parts(frame))


def encode_parts(frame: Frame) -> list[bytes | memoryview]:
    """A frame's bytes in parts, to be sent one after the other; payloads are the arrays' own memory, not copied.

    Raises:
        FrameMalformed: a dtype that frames do not carry, an unknown codec, or a name too long.
        FrameTooLarge: more tensors, a higher rank or a longer header than any reader accepts.
    """
    tensors, bundle, segment, request, encoded, _ = frame
    if (count := len(tensors) + len(encoded)) > MAX_TENSORS:
        _too_large("tensors", f"{count} tensors; at most {MAX_TENSORS}", limit=MAX_TENSORS)
    parts: list[bytes | memoryview] = [b""]
    described: list[_Described] = []
    for name, array in tensors.items():
        dtype = array.dtype
        if dtype.num not in _NAMES:
            raise FrameMalformed(f"{name!r} is {dtype}; frames carry {', '.join(DTYPES)}", rule="dtype", tensor=name)
        described.append((name, _NAMES[dtype.num], array.shape, "raw", -1))
        parts.append(RAW.encode(array))
    for name, tensor in encoded.items() if encoded else ():
        described.append((name, tensor.dtype, tensor.shape, tensor.codec, len(tensor.payload)))
        parts.append(tensor.payload)
    if not request.isascii() or len(request) > MAX_TEXT_BYTES:
        _text("request", request)
    quoted = _quoted(request).encode()
    before, after, gaps = _around_request(tuple(described), bundle, segment, len(quoted))
    parts[0] = before + quoted + after
    for place, gap in gaps:
        parts.insert(place, gap)
    return parts


def decode(
    data: bytes | bytearray | memoryview,
    *,
    max_bytes: int,
    tables: Tables | None = None,
    accept: Accept | None = None,
    during: During = _nothing,
) -> Frame:
    """Read one frame; every byte must be accounted for.

    Shapes: arrays keep the sender's, e.g. hidden (batch, tokens, width). Those that came raw are views of `data`.
    Units: max_bytes bounds the whole frame, and again what its tensors unpack to, with the working memory that decoding
    takes. `accept` is asked before any payload is decoded, `tables` then once for each tensor whose codec was
    calibrated, and `during` is entered for the time that decoding takes; what they raise passes as it is.

    Raises:
        FrameTooLarge: a bound was exceeded; nothing was allocated.
        FrameMalformed: a rule of docs/frame.md is broken; `rule` in its facts names it.
    """
    if len(data) > max_bytes:
        _too_large("frame", f"a frame of {len(data)} bytes; at most {max_bytes}", limit=max_bytes)
    view = memoryview(data).toreadonly()
    if len(view) < _PREAMBLE or view[:7] != MAGIC[:7]:
        _malformed("magic", "the bytes do not start as a frame does")
    if view[7] == _SHORT_VERSION:
        _malformed("version", "frame version 2, a refinement, which is no longer read: update the router that sent it")
    if view[7] != MAGIC[7]:
        _malformed("version", f"frame version {view[7]}; this reader knows version {MAGIC[7]}")
    header_bytes = int.from_bytes(view[8:_PREAMBLE], "little")
    if header_bytes > MAX_HEADER_BYTES:
        _too_large("header", f"a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES}", limit=MAX_HEADER_BYTES)
    start = _PREAMBLE + header_bytes
    if start > len(view):
        _malformed("truncated", f"the header ends at byte {start}; the frame has {len(view)}")
    if start % ALIGNMENT:
        _malformed("alignment", f"the body starts at byte {start}, not at a multiple of {ALIGNMENT}")
    header, request = _split_request(bytes(view[_PREAMBLE:start]))
    layout = _seen(header, max_bytes) if len(header) <= _SEEN_BYTES else _long_layout(header, max_bytes)
    payloads = _payloads(layout, view[start:])
    tensors = dict(_decoded(layout, payloads, None))
    if accept is not None:
        accept(layout.outline())
    if layout.packs:
        coded = [(name, codec) for name, _, _, codec, _, _ in layout.entries if codec != RAW_ID]
        found = {name: _table(name, codec, layout.bundle, tables) for name, codec in coded}
        with during(layout.outline()):
            tensors |= _decoded(layout, payloads, found)
        tensors = {name: tensors[name] for name in layout.types}
    return Frame(
        tensors,
        layout.bundle,
        layout.segment,
        layout.request if request is None else request,
        codecs={name: codec for name, _, _, codec, _, _ in layout.entries if codec != "raw"} if layout.packs else _NONE,
    )


def is_frame(data: bytes | memoryview) -> bool:
    """Whether `data` starts as a frame of any version does."""
    return bytes(data[:7]) == MAGIC[:7]


@lru_cache(maxsize=64)
def _around_request(
    described: tuple[_Described, ...], bundle: str, segment: str, request_bytes: int
) -> tuple[bytes, bytes, tuple[tuple[int, bytes], ...]]:
    """A frame's first bytes up to the request's id, the header's after it, and the gaps between payloads, each with its
    place among a frame's parts.

    A segment's frames differ in nothing else, and writing this takes longer than copying 300 kB.
    """
    entries: list[_Entry] = []
    gaps: list[tuple[int, bytes]] = []
    end = 0
    for name, dtype, shape, codec, length in described:
        _text("name", name, least=1)
        if any(name == entry[0] for entry in entries):
            _malformed("duplicate", f"two tensors are named {name!r}")
        if codec not in KNOWN:
            _malformed("codec", f"{name!r} asks for codec {codec!r}; known are {', '.join(KNOWN)}")
        if dtype not in DTYPES:
            raise FrameMalformed(f"{name!r} is {dtype}; frames carry {', '.join(DTYPES)}", rule="dtype", tensor=name)
        if length < 0:
            length = math.prod(shape) * DTYPES[dtype].itemsize
        if len(shape) > MAX_RANK:
            _too_large("rank", f"{name!r} has rank {len(shape)}; at most {MAX_RANK}", limit=MAX_RANK)
        offset = _aligned(end)
        if offset != end:
            gaps.append((1 + len(entries) + len(gaps), bytes(offset - end)))
        entries.append((name, dtype, shape, codec, offset, length))
        end = offset + length
    doc = {
        "tensors": [dict(zip(_TENSOR_KEYS, entry, strict=True)) for entry in entries],
        "bundle": _text("bundle", bundle),
        "segment": _text("segment", segment),
        "request": "",
    }
    start = json.dumps(doc, ensure_ascii=False, separators=(",", ":")).removesuffix('""}').encode()
    length = len(start) + request_bytes + len("}")
    size = length + -(_PREAMBLE + length) % ALIGNMENT
    if size > MAX_HEADER_BYTES:
        _too_large("header", f"a header of {size} bytes; at most {MAX_HEADER_BYTES}", limit=MAX_HEADER_BYTES)
    return MAGIC + size.to_bytes(8, "little") + start, b"}".ljust(1 + size - length), tuple(gaps)


@dataclass(frozen=True)
class _Layout:
    """What a header says, checked; only the payloads' own bytes are not looked at."""

    bundle: str
    segment: str
    request: str
    entries: tuple[_Entry, ...]
    packs: bool
    types: Mapping[str, TensorType]
    decoded_bytes: int
    working_bytes: int

    def outline(self) -> Outline:
        return Outline(self.bundle, self.segment, self.types, self.decoded_bytes, self.working_bytes)


def _split_request(header: bytes) -> tuple[bytes, str | None]:
    """A header with its request's id taken out, and that id, where it stands last and as plain text; else as it is.

    The frames of one segment differ in nothing else, so that their headers need not be read again. Nothing in a plain
    text ends a string of JSON: whatever `header` means with it, it means without.
    """
    before, key, rest = header.rpartition(b'"request":"')
    if key and (found := _PLAIN_END.fullmatch(rest)) is not None:
        return before + b'"request":""}', found[1].decode("ascii")
    return header, None


def _long_layout(header: bytes, max_bytes: int) -> _Layout:
    """`_layout` of a header that is worth looking at before it is parsed."""
    if parsed_bytes(header) > max_bytes:
        _too_large("header", f"a header that takes more than {max_bytes} bytes to parse", limit=max_bytes)
    return _layout(header, max_bytes)


def _layout(header: bytes, max_bytes: int) -> _Layout:
    doc = _document(header)
    entries: list[_Entry] = []
    names: set[str] = set()
    end = unpacked = encoded = working = 0
    for entry in doc["tensors"]:
        if type(entry) is not dict or entry.keys() != set(_TENSOR_KEYS):
            _malformed("tensor", f"a tensor has exactly the keys {', '.join(sorted(_TENSOR_KEYS))}")
        name = _text("name", entry["name"], least=1)
        if name in names:
            _malformed("duplicate", f"two tensors are named {name!r}")
        names.add(name)
        dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
        if dtype is None:
            _malformed("dtype", f"{name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
        codec = entry["codec"]
        if codec not in KNOWN:
            _malformed("codec", f"{name!r} has codec {codec!r}; known are {', '.join(KNOWN)}")
        shape = entry["shape"]
        if type(shape) is not list or any(type(n) is not int or n < 0 for n in shape):
            _malformed("shape", f"the shape of {name!r} is not a list of whole numbers")
        if len(shape) > MAX_RANK:
            _too_large("rank", f"{name!r} has rank {len(shape)}; at most {MAX_RANK}", limit=MAX_RANK)
        # A zero counts as one here, so that an empty tensor cannot smuggle dimensions past the bound.
        size = dtype.itemsize
        for n in shape:
            size *= max(n, 1)
            if size > max_bytes:
                _too_large("unpacked", f"{name!r} unpacks to more than {max_bytes} bytes", limit=max_bytes)
        unpacked += size
        if codec != "raw":
            encoded += size
            working = max(working, find_codec(codec).working_bytes(dtype, tuple(shape)))
        if unpacked + working > max_bytes:
            _too_large("unpacked", f"the tensors take more than {max_bytes} bytes to decode", limit=max_bytes)
        offset, length = entry["offset"], entry["length"]
        if type(offset) is not int or type(length) is not int or length < 0:
            _malformed("offset", f"offset and length of {name!r} are not whole numbers")
        if offset != _aligned(end):
            _malformed("offset", f"{name!r} starts at byte {offset} of the body; its place is {_aligned(end)}")
        end = offset + length
        entries.append((name, entry["dtype"], tuple(shape), codec, offset, length))
    packs = any(codec != "raw" for _, _, _, codec, _, _ in entries)
    types = {name: TensorType(dtype, shape) for name, dtype, shape, _, _, _ in entries}
    return _Layout(
        doc["bundle"], doc["segment"], doc["request"], tuple(entries), packs, MappingProxyType(types), encoded, working
    )


_seen = lru_cache(maxsize=64)(_layout)


def _document(header: bytes) -> dict[str, Any]:
    try:
        doc = _JSON.decode(str(header, "utf-8"))
    except (ValueError, RecursionError) as e:
        raise FrameMalformed(f"the header is not JSON: {e}", rule="header") from e
    if type(doc) is not dict or doc.keys() != {"tensors", *_TEXT_KEYS}:
        _malformed("header", f"the header has exactly the keys tensors, {', '.join(_TEXT_KEYS)}")
    for key in _TEXT_KEYS:
        _text(key, doc[key])
    if type(doc["tensors"]) is not list:
        _malformed("header", "tensors is a list")
    if len(doc["tensors"]) > MAX_TENSORS:
        _too_large("tensors", f"{len(doc['tensors'])} tensors; at most {MAX_TENSORS}", limit=MAX_TENSORS)
    return doc


def _payloads(layout: _Layout, body: memoryview) -> list[memoryview]:
    """Each tensor's payload, a view; every byte of the body is one of theirs, or padding."""
    payloads: list[memoryview] = []
    end = 0
    for name, _, _, _, offset, length in layout.entries:
        if offset + length > len(body):
            _malformed("truncated", f"{name!r} ends at byte {offset + length} of the body; it has {len(body)}")
        if offset != end and body[end:offset] != bytes(offset - end):
            _malformed("padding", f"the bytes before {name!r} are not zero")
        end = offset + length
        payloads.append(body[offset:end])
    if end != len(body):
        _malformed("trailing", f"{len(body) - end} bytes follow the last tensor")
    return payloads


def _decoded(
    layout: _Layout, payloads: list[memoryview], tables: Mapping[str, object] | None
) -> Iterator[tuple[str, Array]]:
    """The tensors that did not come raw, each by its table; without tables those that did, which are views."""
    for (name, dtype, shape, codec, _, _), payload in zip(layout.entries, payloads, strict=True):
        if (codec == RAW_ID) is not (tables is None):
            continue
        try:
            table = None if tables is None else tables[name]
            yield name, find_codec(codec).decode(payload, DTYPES[dtype], shape, table)
        except ValueError as e:
            raise FrameMalformed(f"{name!r} cannot be unpacked: {e}", rule="payload", tensor=name) from e


def _table(name: str, codec: str, bundle: str, tables: Tables | None) -> object:
    if not find_codec(codec).calibrated:
        return None
    if tables is None:
        _malformed("table", f"{name!r} has codec {codec!r}, which needs a bundle's calibration; there is none here")
    return tables(bundle, name, codec)


def _text(key: str, value: Any, least: int = 0) -> str:
    if isinstance(value, str) and value.isascii() and least <= len(value) <= MAX_TEXT_BYTES:
        return value
    try:
        size = len(value.encode()) if isinstance(value, str) else -1
    except UnicodeEncodeError:
        size = -1
    if not least <= size <= MAX_TEXT_BYTES:
        _malformed(key, f"{key} is a text of {least} to {MAX_TEXT_BYTES} bytes")
    return str(value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    doc = dict(pairs)
    if len(doc) != len(pairs):
        raise ValueError("a key stands twice")
    return doc


def _no_constants(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constants)


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _malformed(rule: str, message: str) -> NoReturn:
    raise FrameMalformed(message, rule=rule, hint="docs/frame.md has the rules")


def _too_large(rule: str, message: str, limit: int) -> NoReturn:
    raise FrameTooLarge(message, rule=rule, limit=limit)
