"""Photos as callers wrap them: base64 text, and the forms that browsers and `curl -F` send (multipart/form-data).

What a body is, its first bytes say; Content-Type is not read. Source: docs/api.md, "Photos".
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from isthmus.errors import RequestMalformed, RequestTooLarge

MAX_PARTS, MAX_FIELD_BYTES = 16, 2**14
"""Of a form: parts, and bytes of all that are no file."""
_PIECE_BYTES = 2**16
_FORM = re.compile(rb"(?:\r?\n)*--([0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-])[ \t]*\r?\n[!-9;-~]+:")
"""Source: RFC 2046, 5.1.1; a line feed alone ends a line for werkzeug, too."""
_DATA_URL = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)
_PLAIN, _URL_SAFE = b"+/", b"-_"
_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_LINE_BREAKS = b"\r\n\t"
_INDENTED = re.compile(rb"[\r\n][\r\n\t ]+")


@dataclass(frozen=True)
class Form:
    """A form's one file, and its fields."""

    photo: bytes
    fields: dict[str, str]


def looks_like_form(body: bytes) -> bool:
    """Whether a body starts as multipart/form-data does: a boundary's line, and a header of the first part."""
    return _FORM.match(body) is not None


def read_form(body: bytes) -> Form:
    """The file and the fields of a multipart/form-data body.

    Raises:
        RequestMalformed: not such a form, or one without a file or with several; the sentence says which.
        RequestTooLarge: more than MAX_PARTS parts, or MAX_FIELD_BYTES beside the file.
    """
    # werkzeug is the functions' HTTP library; the command reads no forms.
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
    if len(files) != 1:
        named = ", ".join(sorted(fields)) or "none"
        raise RequestMalformed(
            f"the form has {len(files)} files (its fields: {named}); it has one, the photo",
            files=len(files),
            hint="send a file under any name: curl -F image=@cat.jpg URL",
        )
    if not files[0]:
        raise RequestMalformed("the form's file is empty", files=1, hint="was a file chosen?")
    return Form(files[0], fields)


def _parts(body: bytes) -> tuple[list[bytes], dict[str, str]]:
    """The files of a form, and its other fields by their names.

    werkzeug's own FormDataParser takes one bound for a field and for what it reads at a time, files included.

    Raises:
        RequestEntityTooLarge, ValueError, UnicodeError: as werkzeug's decoder finds it.
        RequestTooLarge: more than MAX_FIELD_BYTES beside the files.
    """
    from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

    match = _FORM.match(body)
    # What waits in the decoder is a piece, and the head of a part that is not whole yet.
    limit = _PIECE_BYTES + MAX_FIELD_BYTES
    decoder = MultipartDecoder(match[1] if match else b"", limit, max_parts=MAX_PARTS)
    files: list[bytes] = []
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
                # Browsers send a file that was not chosen as an empty one without a name.
                if not event.more_data and isinstance(part, File) and (part.filename or content.tell()):
                    files.append(content.getvalue())
                elif not event.more_data and isinstance(part, Field):
                    fields[part.name or ""] = content.getvalue().decode("utf-8", "replace")
    return files, fields


def _pieces(body: bytes) -> Iterator[bytes | None]:
    for at in range(0, len(body), _PIECE_BYTES):
        yield body[at : at + _PIECE_BYTES]
    yield None  # the end


def from_base64(text: Any) -> bytes:
    """The bytes that base64 text stands for, where it can mean only one thing.

    A `data:` URL's prefix and escapes, line breaks, indentation, spaces around it, the URL-safe alphabet and padding
    that was lost are taken.

    Raises:
        RequestMalformed: it is no such text; the sentence says where it departs.
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
        # One by one: unquoting takes a hundred times the text where all of it is escaped, and letters never are.
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
    except binascii.Error as e:  # nothing is left that it would refuse
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
