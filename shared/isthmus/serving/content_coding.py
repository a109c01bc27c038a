"""Content codings of HTTP bodies (RFC 9110, 8.4): gzip and deflate, bounded in requests, where asked in responses."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator

from werkzeug.datastructures import Accept
from werkzeug.http import parse_accept_header
from werkzeug.wrappers import Response

from isthmus.admission import Reservation
from isthmus.errors import EncodingUnsupported, RequestMalformed, RequestTooLarge

ACCEPTED = ("gzip", "deflate")
# Shorter responses stay uncompressed, since they fit into a few packets; longer responses would take a second.
MIN_BYTES, MAX_BYTES = 4096, 16 * 2**20
# Of zlib: JSON numbers shrink to a half, at 40 to 120 MB/s; level 6 takes five times as long for another 4%.
_LEVEL = 1
# Pieces bound the memory of a decompressor, whatever the ratio.
_INPUT_BYTES, _OUTPUT_BYTES = 2**16, 2**18
# Members of a gzip body; block compressors write several in sequence (RFC 1952, 2.2).
MAX_MEMBERS = 4096
# zlib's wbits: the largest window, negative without a header, 16 more with the header of gzip.
_ZLIB, _RAW, _GZIP = 15, -15, 31
# Not frames: codecs have compressed those.
_COMPRESSIBLE = ("application/json", "text/", "application/openmetrics-text")


def decompress(body: bytes | memoryview, coding: str, memory: Reservation, max_bytes: int) -> bytes | memoryview:
    """`body` without its Content-Encoding.

    Raises:
        EncodingUnsupported: another coding than gzip and deflate, or several; nothing was decoded.
        RequestMalformed: the body is not of that coding.
        RequestTooLarge: more than `max_bytes` decompressed, or as `Reservation.hold`.
        Overloaded: as `Reservation.hold`.
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


def compress(response: Response, accepts: str) -> None:
    """Compress a response's body where that saves time and the request's Accept-Encoding accepts a coding."""
    size = response.content_length or 0
    kind = response.headers.get("Content-Type", "")
    if size < MIN_BYTES or not kind.startswith(_COMPRESSIBLE) or "Content-Encoding" in response.headers:
        return
    response.headers["Vary"] = "Accept-Encoding"
    if size <= MAX_BYTES and (coding := _preferred(accepts)):
        data = response.get_data()
        response.set_data(gzip.compress(data, _LEVEL, mtime=0) if coding == "gzip" else zlib.compress(data, _LEVEL))
        response.headers["Content-Encoding"] = coding


def _pieces(body: memoryview, name: str) -> Iterator[bytes]:
    """The decompressed body, in pieces of a bounded length.

    Raises:
        RequestMalformed: the body ends too early, or too late.
        zlib.error: the body is not of that coding.
    """
    window = _window(body, name)
    decompressor, members = zlib.decompressobj(window), 1
    for at in range(0, len(body), _INPUT_BYTES):
        remaining: bytes | memoryview = body[at : at + _INPUT_BYTES]
        while remaining:
            if decompressor.eof:
                if name != "gzip" or members == MAX_MEMBERS:
                    raise RequestMalformed(f"bytes follow the end of the {name} body", header="Content-Encoding")
                decompressor, members = zlib.decompressobj(window), members + 1
            yield decompressor.decompress(remaining, _OUTPUT_BYTES)
            remaining = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
    while not decompressor.eof and (piece := decompressor.decompress(b"", _OUTPUT_BYTES)):
        yield piece  # the last bytes of input may decompress to several pieces
    if not decompressor.eof:
        raise RequestMalformed(f"the {name} body ends too early", header="Content-Encoding")


def _window(body: memoryview, name: str) -> int:
    """zlib's `wbits`. Some clients send deflate without zlib's header."""
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
