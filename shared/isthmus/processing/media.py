"""What a body's first bytes say it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from isthmus.errors import ImageMalformed, MediaUnsupported

ACCEPTED = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff")
"""The media types of images that are read."""

_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip"),
    (b"8BPS", "a Photoshop file"),
    (b"%!PS", "PostScript"),
    (b"<svg", "SVG"),
    (b"<", "XML or HTML"),
    (b"{", "JSON"),
    (b"[", "JSON"),
    (b"data:image/", "a data: URL"),
    (b"/9j/", "a JPEG in base64"),
    (b"iVBORw0KGgo", "a PNG in base64"),
    (b"R0lGOD", "a GIF in base64"),
    (b"UklGR", "a WebP in base64"),
    (b"\x89PNG", "a PNG whose line breaks were changed, as curl -d does"),
    (b"--", "a form (multipart/form-data) that is not one"),
)
_FIELD = re.compile(rb"[\w.%+-]{1,64}=")
_HINTS: Mapping[str, str] = {
    "base64": 'put the text into JSON, {"image": "…"}, or send the file itself: curl --data-binary @cat.jpg',
    "a data: URL": 'put the text into JSON, {"image": "…"}, or send the file itself: curl --data-binary @cat.jpg',
    "curl -d": "curl --data-binary @cat.jpg sends a file as it is",
    "form": "a form with the file in it: curl -F image=@cat.jpg; or the file itself: curl --data-binary @cat.jpg",
}
"""What to do, by a word of what a body looks like."""


def looks_like_image(data: bytes) -> str | None:
    """The media type that the first bytes announce, one of `ACCEPTED`; None if they announce none of them."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    if data.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):
        return "image/tiff"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "image/bmp"
    return None


def not_an_image(data: bytes) -> MediaUnsupported | ImageMalformed:
    """The error to raise for a body that announces no accepted kind; its facts say what it looks like."""
    if not data:
        return ImageMalformed("an empty body is no image", bytes=0, hint="send the file itself: curl --data-binary @…")
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    looks = next((name for magic, name in _OTHERS if start.startswith(magic)), "")
    if data[4:8] == b"ftyp":
        looks = "AVIF, HEIC or a film"
    if not looks and _FIELD.match(data):
        looks = "a form in the URL's encoding"
    if not looks:
        looks = "text" if all(32 <= c < 127 or c in b"\t\r\n" for c in data[:64]) else "unknown binary data"
    return MediaUnsupported(
        f"the body is no image of a kind that is read; it looks like {looks}",
        accepted=ACCEPTED,
        looks_like=looks,
        bytes=len(data),
        hint=next(
            (hint for word, hint in _HINTS.items() if word in looks),
            "send the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file as they are",
        ),
    )
