"""Request bodies that carry an image: the formats accepted, base64 text, and forms (multipart/form-data).

The first bytes of a body decide its kind; Content-Type is not read. Source: docs/reference/api.md, "Photos".
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from isthmus.errors import ImageMalformed, MediaUnsupported, RequestMalformed, RequestTooLarge

ACCEPTED = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff")
"""The media types of images that are decoded; see `looks_like_image`."""

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
"""Advice, by a word in the description of a body."""
# A request's photos run one after the other within its deadline, 20 s unless set.
MAX_PHOTOS = 32
# Bounds of a form: its parts (photos and some fields), and the bytes of all fields that are no file.
MAX_PARTS, MAX_FIELD_BYTES = MAX_PHOTOS + 16, 2**14
BATCH_FIELD = "images"
"""The name, in a form or in JSON, of photos that are answered as a batch, of any number from 1."""
_PIECE_BYTES = 2**16
# RFC 2046, 5.1.1; werkzeug accepts a lone line feed as well.
_FORM = re.compile(rb"(?:\r?\n)*--([0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-])[ \t]*\r?\n[!-9;-~]+:")
_DATA_URL = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)
_PLAIN, _URL_SAFE = b"+/", b"-_"
_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_LINE_BREAKS = b"\r\n\t"
_INDENTED = re.compile(rb"[\r\n][\r\n\t ]+")


def looks_like_image(data: bytes) -> str | None:
    """The media type by the first bytes, one of `ACCEPTED`; None otherwise."""
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
    """The error for a body of no accepted type; its facts describe the body."""
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


@dataclass(frozen=True)
class PhotoForm:
    """The files and the fields of a form; `is_batch` where it has several files, or its file's field is BATCH_FIELD."""

    photos: tuple[bytes, ...]
    fields: dict[str, str]
    is_batch: bool = False


def looks_like_form(body: bytes) -> bool:
    """Whether a body starts like multipart/form-data: with the line of a boundary, and a header of the first part."""
    return _FORM.match(body) is not None


def read_form(body: bytes) -> PhotoForm:
    """The files and the fields of a multipart/form-data body.

    Raises:
        RequestMalformed: a malformed form, no file, or an only file that is empty.
        RequestTooLarge: more than MAX_PHOTOS files or MAX_PARTS parts, or more than MAX_FIELD_BYTES beside the files.
    """
    # werkzeug is the functions' HTTP library; commands without werkzeug read no forms.
    from werkzeug.exceptions import RequestEntityTooLarge

    try:
        files, fields = _parts(body)
    except RequestEntityTooLarge as e:
        raise RequestTooLarge(
            f"a form of more than {MAX_PARTS} parts, or a part with a head of more than {MAX_FIELD_BYTES} bytes",
            limit=MAX_PARTS,
        ) from e
    except (ValueError, UnicodeError) as e:
        raise RequestMalformed(
            f"the form cannot be read: {e}", hint="is it whole? It ends with its boundary and two hyphens"
        ) from e
    if not files:
        names = ", ".join(sorted(fields)) or "none"
        raise RequestMalformed(
            f"the form has 0 files (its fields: {names}); it has one, the photo, or several",
            files=0,
            hint="send a file under any name: curl -F image=@cat.jpg URL",
        )
    check_count(len(files))
    is_batch = len(files) > 1 or files[0][0] == BATCH_FIELD
    if not is_batch and not files[0][1]:
        raise RequestMalformed("the form's file is empty", files=1, hint="was a file chosen?")
    return PhotoForm(tuple(photo for _, photo in files), fields, is_batch)


def check_count(photos: int) -> None:
    """Refuse a batch of too many photos.

    Raises:
        RequestTooLarge: more than MAX_PHOTOS.
    """
    if photos > MAX_PHOTOS:
        raise RequestTooLarge(
            f"the request has {photos} photos; at most {MAX_PHOTOS} are taken", limit=MAX_PHOTOS, photos=photos
        )


def _parts(body: bytes) -> tuple[list[tuple[str, bytes]], dict[str, str]]:
    """The files of a form with their fields' names, and its other fields by their names.

    werkzeug's FormDataParser has a single bound for fields and for its buffer, files included.

    Raises:
        RequestEntityTooLarge, ValueError, UnicodeError: as werkzeug's decoder.
        RequestTooLarge: more than MAX_FIELD_BYTES beside the files.
    """
    from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

    match = _FORM.match(body)
    # The decoder buffers a piece of the body, and the incomplete head of a part.
    limit = _PIECE_BYTES + MAX_FIELD_BYTES
    decoder = MultipartDecoder(match[1] if match else b"", limit, max_parts=MAX_PARTS)
    files: list[tuple[str, bytes]] = []
    fields: dict[str, str] = {}
    part: Field | File | None = None
    content, beside = BytesIO(), 0
    for piece in _pieces(body):
        decoder.receive_data(piece)
        while not isinstance(event := decoder.next_event(), NeedData | Epilogue):
            if isinstance(event, Field | File):
                part, content = event, BytesIO()
            elif isinstance(event, Data):
                content.write(event.data)
                if isinstance(part, Field) and (beside := beside + len(event.data)) > MAX_FIELD_BYTES:
                    name = (part.name or "")[:80]
                    raise RequestTooLarge(
                        f"the form has more than {MAX_FIELD_BYTES} bytes beside its file, at its field {name!r}",
                        limit=MAX_FIELD_BYTES,
                        hint="a photo is a file, which has a file name: curl -F image=@cat.jpg URL",
                    )
                # Browsers send an empty file without a name if the user chose no file.
                if not event.more_data and isinstance(part, File) and (part.filename or content.tell()):
                    files.append((part.name or "", content.getvalue()))
                elif not event.more_data and isinstance(part, Field):
                    fields[part.name or ""] = content.getvalue().decode("utf-8", "replace")
    return files, fields


def _pieces(body: bytes) -> Iterator[bytes | None]:
    for at in range(0, len(body), _PIECE_BYTES):
        yield body[at : at + _PIECE_BYTES]
    yield None  # the end


def from_base64(text: Any) -> bytes:
    """Decode base64 text, strictly.

    Accepted as well: the prefix and escapes of a `data:` URL, line breaks, indentation, surrounding spaces, the
    URL-safe alphabet, and missing padding.

    Raises:
        RequestMalformed: names the first deviation.
    """
    if not isinstance(text, str):
        raise _refused(f"it is {_kind(text)}, not text")
    text = text.strip()
    if (url := _DATA_URL.match(text)) is not None:
        if not re.search(r";\s*base64\s*$", url[1], re.IGNORECASE):
            raise _refused("it is a data: URL without ;base64, so its bytes are not in base64")
        text = text[url.end() :]
    try:
        data = text.encode("ascii")
    except UnicodeEncodeError as e:
        raise _refused(f"character {e.start + 1} is {text[e.start]!r}, which base64 has not") from e
    if url is not None and b"%" in data:
        # Escape by escape: urllib's unquoting takes a hundred times the memory of a fully escaped text.
        for letter in b"+/=\r\n ":
            for escape in {b"%%%02X" % letter, b"%%%02x" % letter}:
                data = data.replace(escape, bytes([letter]))
    data = _INDENTED.sub(b"", data).translate(None, _LINE_BREAKS).strip()
    body = data.rstrip(b"=")
    if not body:
        return b""
    other = body.translate(None, _LETTERS)
    if b" " in other:
        raise _refused("it holds spaces: a form may have turned each + into one; send %2B, or JSON, instead")
    if wrong := other.translate(None, _PLAIN + _URL_SAFE):
        where = body.index(wrong[:1]) + 1
        what = "an = before the end" if wrong[:1] == b"=" else f"{chr(wrong[0])!r}, which base64 has not"
        raise _refused(f"letter {where} is {what}")
    if other.translate(None, _PLAIN) and other.translate(None, _URL_SAFE):
        raise _refused("it mixes the plain alphabet (+ and /) with the URL-safe one (- and _)")
    if len(body) % 4 == 1:
        raise _refused(f"it has {len(body)} letters, as no bytes have: it was cut off")
    if len(data) - len(body) > 2:
        raise _refused("it ends in more than two =")
    body += b"=" * (-len(body) % 4)
    try:
        return base64.b64decode(body, b"-_" if other.translate(None, _PLAIN) else None, validate=True)
    except binascii.Error as e:  # unreachable by the checks above
        raise _refused(str(e)) from e


def _refused(why: str) -> RequestMalformed:
    return RequestMalformed(
        f"image is not base64 of a photo's bytes: {why}",
        parameter="image",
        hint="base64 -w0 cat.jpg makes it; or send the file itself",
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
