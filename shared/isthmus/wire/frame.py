"""The frame: named tensors for a segment, as bytes between functions.

Decoding executes nothing, allocates within its bounds, copies no payload and leaves no byte unexplained.
Source: docs/reference/frame.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from json.encoder import encode_basestring as _quoted
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, NoReturn, TypeAlias

import msgspec

from isthmus.arrays import DTYPES as DTYPES
from isthmus.arrays import Array
from isthmus.artifacts.choice import CODEC_IDS, RAW_ID
from isthmus.artifacts.sampling import Sampling
from isthmus.artifacts.tensors import TensorType
from isthmus.codecs import EncodedTensor, Tables, find_codec
from isthmus.codecs.raw import RAW
from isthmus.errors import FrameMalformed, FrameTooLarge
from isthmus.wire.json_bounds import parsed_bytes

CONTENT_TYPE = "application/vnd.isthmus.frame"
MAGIC = b"ISTHMUS\x01"
"""First bytes of every frame; the last byte is the format's version."""
# In earlier releases, refinements of tensors that the reader had cached. The number is never used again.
_VERSION_OF_REFINEMENTS = 2

ALIGNMENT = 64
MAX_HEADER_BYTES = 2**20
MAX_TENSORS = 1024
MAX_RANK = 32
MAX_TEXT_BYTES = 512
# Bound on the magnitude of an exit's threshold, that of `artifacts.gate`: far beyond any confidence, and finite.
MAX_EXIT = 1e30

# By numpy's number of the dtype: the attribute `name` takes as long as the rest of a header.
_NAMES = {dtype.num: name for name, dtype in DTYPES.items()}
_EMPTY: Mapping[str, Any] = MappingProxyType({})
_PREAMBLE_BYTES = 16
# Shorter headers take little memory for any structure, so their size is not estimated before parsing.
_SMALL_HEADER_BYTES = 4096
# Upper bounds on the header's text: of a tensor beside its name, of a dimension, of the frame's own fields.
_ENTRY_BYTES, _DIM_BYTES, _TEXTS_BYTES = 160, 21, 8192


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The step of a session that a frame is: a segment with state extends what it keeps of `session`.

    `position` is the number of tokens before the step; the first step states in `reserve` how long the session may
    become. With `sampling` the segment, the model's last, answers with
    tokens instead of scores.
    """

    session: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    position: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    sampling: Sampling | None = None
    reserve: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0


class Frame(NamedTuple):
    """One message between functions.

    `bundle` is a manifest's digest, `segment` the id of the segment that takes (or gave) the tensors, `request` an id
    of the request for logs. Arrays of a decoded frame are read-only views of its bytes, in the sender's shapes.
    """

    tensors: Mapping[str, Array]
    bundle: str = ""
    segment: str = ""
    request: str = ""
    encoded: Mapping[str, EncodedTensor] = _EMPTY
    """Encoded tensors to send beside `tensors`; empty in a decoded frame."""
    codecs: Mapping[str, str] = _EMPTY
    """In a decoded frame, the codec of each tensor that did not travel raw."""
    step: Step | None = None
    """Of a session's frames to segments with state."""
    exit: float | None = None
    """The least confidence of an exit behind the segment: the function that gets the frame runs the exit's branch too,
    and answers without boundary tensors where the early prediction is sure."""

    @property
    def step_tokens(self) -> int:
        """How many positions a step runs; 0 in other frames. Tensors of steps are (1, tokens, …)."""
        if self.step is None:
            return 0
        shapes = (*(a.shape for a in self.tensors.values()), *(t.shape for t in self.encoded.values()))
        return next((int(shape[1]) for shape in shapes if len(shape) > 1), 0)


class Outline(NamedTuple):
    """The declarations of a frame, before any payload is decoded.

    Units: bytes. `decoded_bytes` is the size of the decoded tensors that did not travel raw, `working_bytes` the memory
    of decoding the most demanding of these besides.
    """

    bundle: str
    segment: str
    tensors: Mapping[str, TensorType]
    decoded_bytes: int
    working_bytes: int
    step: Step | None = None
    exit: float | None = None


Accept: TypeAlias = Callable[[Outline], None]
"""Raises to reject a frame before any payload is decoded and any table read."""
During: TypeAlias = Callable[[Outline], AbstractContextManager[None]]
"""A context for decoding payloads, such as a reservation of memory; raises without capacity."""


class _TensorEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor in the header, in the order of its keys."""

    name: str
    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0)]]
    codec: str
    offset: int
    length: Annotated[int, msgspec.Meta(ge=0)]


class _Header(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    tensors: list[_TensorEntry]
    bundle: str
    segment: str
    request: str
    step: Step | None = None
    exit: Annotated[float, msgspec.Meta(ge=-MAX_EXIT, le=MAX_EXIT)] | None = None


_HEADER = msgspec.json.Decoder(_Header)
_FIELD = re.compile(r"`\$(\.tensors\[\d+\])?(?:\.(\w+))?")
"""The path in msgspec's messages: an entry of `tensors`, and a field of the entry or of the header."""


def why_not_carried(name: str, dtype: str, rank: int) -> str:
    """The reason why no frame carries a tensor of that name, dtype (numpy's name) and rank; empty if frames do."""
    if dtype not in DTYPES:
        return f"its dtype is {dtype}; frames carry {', '.join(DTYPES)}"
    if rank > MAX_RANK:
        return f"its rank is {rank}; frames carry at most {MAX_RANK}"
    if not 1 <= (size := len(name.encode("utf-8", "replace"))) <= MAX_TEXT_BYTES:
        return f"its name has {size} bytes; frames carry names of 1 to {MAX_TEXT_BYTES}"
    return ""


def entry_bytes(name: str, rank: int) -> int:
    """Upper bound on the bytes of a tensor's entry in a header."""
    return len(_quoted(name).encode("utf-8", "replace")) + _DIM_BYTES * rank + _ENTRY_BYTES


def why_not_together(count: int, entries: int) -> str:
    """The reason why no frame carries `count` tensors with `entries` bytes of entries; empty if frames do."""
    if count > MAX_TENSORS:
        return f"{count} tensors; a frame carries at most {MAX_TENSORS}"
    if entries + _TEXTS_BYTES > MAX_HEADER_BYTES:
        return f"the names and shapes of {count} tensors; a frame's header has at most {MAX_HEADER_BYTES} bytes"
    return ""


def encode(frame: Frame) -> bytes:
    """A frame's bytes, each payload copied once.

    Raises:
        FrameMalformed, FrameTooLarge: as `encode_parts`.
    """
    return b"".join(encode_parts(frame))


def encode_parts(frame: Frame) -> list[bytes | memoryview]:
    """A frame's bytes in parts, to send in order; payloads are the arrays' own memory, not copied.

    Raises:
        FrameMalformed: an unsupported dtype, an unknown codec, or a text too long.
        FrameTooLarge: more tensors, a higher rank or a longer header than readers accept.
    """
    _check_count(len(frame.tensors) + len(frame.encoded))
    parts: list[bytes | memoryview] = [b""]
    entries: list[_TensorEntry] = []
    end = 0
    for name, dtype, shape, codec, payload in _payloads_to_send(frame):
        if (offset := _aligned(end)) != end:
            parts.append(bytes(offset - end))
        entries.append(_TensorEntry(name, dtype, list(shape), codec, offset, len(payload)))
        parts.append(payload)
        end = offset + len(payload)
    header = _Header(
        entries, frame.bundle, str(frame.segment), frame.request, frame.step, frame.exit
    )  # a SegmentId becomes plain text
    _check_texts(header)
    if frame.exit is not None:
        _check_exit(header)
    text = msgspec.json.encode(header)
    size = len(text) + -(_PREAMBLE_BYTES + len(text)) % ALIGNMENT
    _check_header_size(size)
    parts[0] = MAGIC + size.to_bytes(8, "little") + text.ljust(size)
    return parts


def decode(
    data: bytes | bytearray | memoryview,
    *,
    max_bytes: int,
    tables: Tables | None = None,
    accept: Accept | None = None,
    during: During = lambda outline: nullcontext(),
) -> Frame:
    """Decode a frame; every byte must be accounted for.

    Shapes: arrays have the sender's, e.g. hidden (batch, tokens, width). Raw tensors are views of `data`.
    Units: `max_bytes` bounds the whole frame, and also the decoded tensors with the working memory of their codecs.
    `accept` is called before any payload is decoded, `tables` then for each tensor of a calibrated codec, and `during`
    is the context of decoding; their exceptions pass through.

    Raises:
        FrameTooLarge: a bound was exceeded; nothing was allocated.
        FrameMalformed: a rule of docs/reference/frame.md is broken; `rule` in its facts names the rule.
    """
    if len(data) > max_bytes:
        _too_large("frame", f"a frame of {len(data)} bytes; at most {max_bytes}", limit=max_bytes)
    view = memoryview(data).toreadonly()
    start = _body_start(view)
    header = _parse(bytes(view[_PREAMBLE_BYTES:start]), max_bytes)
    outline = _outline(header, max_bytes)
    payloads = list(zip(header.tensors, _payloads(header.tensors, view[start:]), strict=True))
    encoded = [entry for entry in header.tensors if entry.codec != RAW_ID]
    tensors = {entry.name: _array(entry, payload, None) for entry, payload in payloads if entry.codec == RAW_ID}
    if accept is not None:
        accept(outline)
    if encoded:
        learned = {entry.name: _table(entry, header.bundle, tables) for entry in encoded}
        with during(outline):
            tensors = {
                entry.name: tensors[entry.name]
                if entry.codec == RAW_ID
                else _array(entry, payload, learned[entry.name])
                for entry, payload in payloads
            }
    codecs = {entry.name: entry.codec for entry in encoded}
    return Frame(
        tensors, header.bundle, header.segment, header.request, codecs=codecs, step=header.step, exit=header.exit
    )


def _payloads_to_send(frame: Frame) -> Iterator[tuple[str, str, tuple[int, ...], str, bytes | memoryview]]:
    for name, array in frame.tensors.items():
        # Before the encoding: an array of references has no bytes.
        dtype = _NAMES.get(array.dtype.num) or array.dtype.name
        _check_entry(name, dtype, RAW_ID, array.ndim)
        yield name, dtype, array.shape, RAW_ID, RAW.encode(array)
    for name, tensor in frame.encoded.items():
        _check_entry(name, tensor.dtype, tensor.codec, len(tensor.shape))
        if name in frame.tensors:
            _malformed("duplicate", f"two tensors are named {name!r}")
        yield name, tensor.dtype, tensor.shape, tensor.codec, tensor.payload


def _body_start(view: memoryview) -> int:
    """The offset of the body, from the preamble."""
    if len(view) < _PREAMBLE_BYTES or view[:7] != MAGIC[:7]:
        _malformed("magic", "the bytes do not start as a frame does")
    if view[7] == _VERSION_OF_REFINEMENTS:
        _malformed("version", "frame version 2, a refinement, which is no longer read: update the router that sent it")
    if view[7] != MAGIC[7]:
        _malformed("version", f"frame version {view[7]}; this reader knows version {MAGIC[7]}")
    header_bytes = int.from_bytes(view[8:_PREAMBLE_BYTES], "little")
    _check_header_size(header_bytes)
    start = _PREAMBLE_BYTES + header_bytes
    if start > len(view):
        _malformed("truncated", f"the header ends at byte {start}; the frame has {len(view)}")
    if start % ALIGNMENT:
        _malformed("alignment", f"the body starts at byte {start}, not at a multiple of {ALIGNMENT}")
    return start


def _parse(text: bytes, max_bytes: int) -> _Header:
    if len(text) > _SMALL_HEADER_BYTES and parsed_bytes(text) > max_bytes:
        _too_large("header", f"a header that takes more than {max_bytes} bytes to parse", limit=max_bytes)
    try:
        header = _HEADER.decode(text)
        # Keys may stand twice only where the text differs from our own form of the same header.
        if msgspec.json.encode(header) != text.rstrip(b" "):
            json.loads(text, object_pairs_hook=_no_duplicates)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        entry, field = place.groups() if (place := _FIELD.search(str(e))) else (None, None)
        rule = "offset" if field == "length" else field or ("tensor" if entry else "header")
        if rule == "tensors":
            rule = "header"
        raise FrameMalformed(f"the header breaks the rule {rule!r}: {e}", rule=rule, hint=_HINT) from e
    _check_count(len(header.tensors))
    _check_texts(header)
    if header.exit is not None:
        _check_exit(header)
    return header


def _outline(header: _Header, max_bytes: int) -> Outline:
    """Check the declarations, and sum up the memory that decoding takes."""
    types: dict[str, TensorType] = {}
    end = total = decoded = working = 0
    for entry in header.tensors:
        name, shape = entry.name, tuple(entry.shape)
        _check_entry(name, entry.dtype, entry.codec, len(shape))
        dtype = DTYPES[entry.dtype]
        if name in types:
            _malformed("duplicate", f"two tensors are named {name!r}")
        # A dimension of zero counts as one, so that an empty tensor cannot smuggle dimensions past the bound. Dimension
        # by dimension, since the product may have thousands of digits.
        size = dtype.itemsize
        for n in shape:
            size *= max(n, 1)
            if size > max_bytes:
                _too_large("unpacked", f"{name!r} decodes to more than {max_bytes} bytes", limit=max_bytes)
        total += size
        if entry.codec != RAW_ID:
            decoded += size
            working = max(working, find_codec(entry.codec).working_bytes(dtype, shape))
        if total + working > max_bytes:
            _too_large("unpacked", f"the tensors take more than {max_bytes} bytes to decode", limit=max_bytes)
        if entry.offset != _aligned(end):
            _malformed("offset", f"{name!r} starts at byte {entry.offset} of the body; its place is {_aligned(end)}")
        end = entry.offset + entry.length
        types[name] = TensorType(entry.dtype, shape)
    return Outline(header.bundle, header.segment, types, decoded, working, header.step, header.exit)


def _payloads(entries: list[_TensorEntry], body: memoryview) -> list[memoryview]:
    """The payloads as views; every other byte of the body must be padding."""
    payloads: list[memoryview] = []
    end = 0
    for entry in entries:
        stop = entry.offset + entry.length
        if stop > len(body):
            _malformed("truncated", f"{entry.name!r} ends at byte {stop} of the body; it has {len(body)}")
        if entry.offset != end and body[end : entry.offset] != bytes(entry.offset - end):
            _malformed("padding", f"the bytes before {entry.name!r} are not zero")
        payloads.append(body[entry.offset : stop])
        end = stop
    if end != len(body):
        _malformed("trailing", f"{len(body) - end} bytes follow the last tensor")
    return payloads


def _array(entry: _TensorEntry, payload: memoryview, table: object) -> Array:
    try:
        return find_codec(entry.codec).decode(payload, DTYPES[entry.dtype], tuple(entry.shape), table)
    except ValueError as e:
        raise FrameMalformed(f"{entry.name!r} cannot be decoded: {e}", rule="payload", tensor=entry.name) from e


def _table(entry: _TensorEntry, bundle: str, tables: Tables | None) -> object:
    name, codec = entry.name, entry.codec
    if not find_codec(codec).calibrated:
        return None
    if tables is None:
        _malformed("table", f"{name!r} has codec {codec!r}, which needs a bundle's calibration; there is none here")
    return tables(bundle, name, codec)


def _check_entry(name: str, dtype: str, codec: str, rank: int) -> None:
    _check_text("name", name, 1)
    if dtype not in DTYPES:
        carried = ", ".join(DTYPES)
        raise FrameMalformed(f"{name!r} is {dtype}; frames carry {carried}", rule="dtype", tensor=name)
    if codec not in CODEC_IDS:
        _malformed("codec", f"{name!r} has codec {codec!r}; known are {', '.join(CODEC_IDS)}")
    if rank > MAX_RANK:
        _too_large("rank", f"{name!r} has rank {rank}; at most {MAX_RANK}", limit=MAX_RANK)


def _check_texts(header: _Header) -> None:
    for key in ("bundle", "segment", "request"):
        _check_text(key, getattr(header, key))


def _check_exit(header: _Header) -> None:
    # NaN is within no bound, and a segment function would take it for a threshold that nothing reaches.
    if header.exit is None or not math.fabs(header.exit) <= MAX_EXIT:
        _malformed("exit", f"the exit's threshold is a number of at most {MAX_EXIT:g}")
    if header.step is not None:
        _malformed("exit", "a step of a session has no exit")


def _check_text(key: str, value: str, min_bytes: int = 0) -> None:
    try:
        size = len(value.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        size = -1
    if not min_bytes <= size <= MAX_TEXT_BYTES:
        _malformed(key, f"{key} is a text of {min_bytes} to {MAX_TEXT_BYTES} bytes")


def _check_count(count: int) -> None:
    if count > MAX_TENSORS:
        _too_large("tensors", f"{count} tensors; at most {MAX_TENSORS}", limit=MAX_TENSORS)


def _check_header_size(size: int) -> None:
    if size > MAX_HEADER_BYTES:
        _too_large("header", f"a header of {size} bytes; at most {MAX_HEADER_BYTES}", limit=MAX_HEADER_BYTES)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    doc = dict(pairs)
    if len(doc) != len(pairs):
        raise ValueError("a key stands twice")
    return doc


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


_HINT = "docs/reference/frame.md has the rules"


def _malformed(rule: str, message: str) -> NoReturn:
    raise FrameMalformed(message, rule=rule, hint=_HINT)


def _too_large(rule: str, message: str, limit: int) -> NoReturn:
    raise FrameTooLarge(message, rule=rule, limit=limit)
