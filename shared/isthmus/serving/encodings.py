"""Content codings of HTTP bodies (RFC 9110, 8.4): gzip and deflate, bounded in requests, where asked in responses."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence

from werkzeug.datastructures import Accept
from werkzeug.http import parse_accept_header

from isthmus.errors import EncodingUnsupported, RequestMalformed, RequestTooLarge
from isthmus.serving.memory import Reservation

ACCEPTED = ("gzip", "deflate")
MIN_BYTES, MAX_BYTES = 4096, 16 * 2**20
"""Shorter responses travel as they are, since they fit into a few packets; longer ones would take a second."""
_LEVEL = 1
"""Of zlib: JSON numbers shrink to a half, at 40 to 120 MB/s; level 6 takes five times as long for another 4%."""
_INPUT, _OUTPUT = 2**16, 2**18
MAX_MEMBERS = 4096
"""Of a gzip body, which may be several, one after the other (RFC 1952, 2.2), as block compressors write it."""
_ZLIB, _RAW, _GZIP = 15, -15, 31
_COMPRESSIBLE = ("application/json", "text/", "application/openmetrics-text")


def decoded(body: bytes | memoryview, coding: str, memory: Reservation, max_bytes: int) -> bytes | memoryview:
    """`body` without its Content-Encoding.

    Raises:
        EncodingUnsupported: another coding than gzip and deflate, or several; nothing was decoded.
        RequestMalformed: the body is not of that coding.
        RequestTooLarge: it unpacks to more than `max_bytes`; RequestTooLarge, Overloaded: as `Reservation.hold`.
    """
    name = coding.strip().lower().removeprefix("x-")
    if name in ("", "identity"):
        return body
    if name not in ACCEPTED:
        raise EncodingUnsupported(
            f"the Content-Encoding {coding[:40]!r} is not offered; {' and '.join(ACCEPTED)} are",
            accepted=list(ACCEPTED),
        )
    data = bytearray()
    try:
        for piece in _pieces(memoryview(body), name):
            if len(data) + len(piece) > max_bytes:
                raise RequestTooLarge(f"the body unpacks to more than {max_bytes} bytes", limit=max_bytes)
            memory.hold(len(piece) + len(piece) // 8)  # a bytearray grows by an eighth
            data += piece
    except zlib.error as e:
        raise RequestMalformed(f"the body is not {name}: {e}", header="Content-Encoding") from e
    return memoryview(data).toreadonly()


def encoded(
    headers: Mapping[str, str], parts: Sequence[bytes | memoryview], accepts: str
) -> tuple[dict[str, str], Sequence[bytes | memoryview]]:
    """A response's headers and body, compressed where that is worth it and Accept-Encoding asks for it."""
    kind = headers.get("Content-Type", "")
    size = sum(map(len, parts))
    if not kind.startswith(_COMPRESSIBLE) or size < MIN_BYTES or "Content-Encoding" in headers:
        return dict(headers), parts
    added = {"Vary": "Accept-Encoding"}
    if size <= MAX_BYTES and (coding := _preferred(accepts)):
        pack = _gzipped if coding == "gzip" else _deflated
        parts, added = [pack(b"".join(parts))], added | {"Content-Encoding": coding}
    return {**headers, **added}, parts


def _pieces(body: memoryview, name: str) -> Iterator[bytes]:
    """What a body stands for, in pieces of a bounded length.

    Raises:
        RequestMalformed: it ends too early, or too late.
        zlib.error: it is not of that coding.
    """
    window = _window(body, name)
    unpacker, members = zlib.decompressobj(window), 1
    for at in range(0, len(body), _INPUT):
        left: bytes | memoryview = body[at : at + _INPUT]
        while left:
            if unpacker.eof:
                if name != "gzip" or members == MAX_MEMBERS:
                    raise RequestMalformed(f"bytes follow the end of the {name} body", header="Content-Encoding")
                unpacker, members = zlib.decompressobj(window), members + 1
            yield unpacker.decompress(left, _OUTPUT)
            left = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
    while not unpacker.eof and (piece := unpacker.decompress(b"", _OUTPUT)):
        yield piece  # the last bytes of input may stand for more than one piece
    if not unpacker.eof:
        raise RequestMalformed(f"the {name} body ends too early", header="Content-Encoding")


def _window(body: memoryview, name: str) -> int:
    """zlib's `wbits`. Some clients mean deflate without zlib's header when they say deflate."""
    if name == "gzip":
        return _GZIP
    is_zlib = len(body) > 1 and body[0] & 15 == zlib.DEFLATED and (body[0] << 8 | body[1]) % 31 == 0
    return _ZLIB if is_zlib or not len(body) else _RAW


def _preferred(accepts: str) -> str:
    """The coding that Accept-Encoding asks for most, gzip where all are equal; empty for none."""
    if not accepts:
        return ""
    accept = parse_accept_header(accepts, Accept)
    best = max(ACCEPTED, key=accept.quality)
    quality = accept.quality(best)
    return best if quality > 0 and quality >= accept.quality("identity") else ""


def _gzipped(data: bytes) -> bytes:
    return gzip.compress(data, _LEVEL, mtime=0)


def _deflated(data: bytes) -> bytes:
    return zlib.compress(data, _LEVEL)
