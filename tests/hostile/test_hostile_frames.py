"""Frames whose every field was altered: refused by a segment function before anything runs."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from isthmus.artifacts.choice import CODEC_IDS, PHOTO_ID, RAW_ID
from isthmus.serving import create_segment_app
from isthmus.wire import frame as frames
from support.attacks import Attack, Target, flips
from support.bundles import Published, framed, ready, segment_settings
from support.bundles import photos as photos

NO_TEXT: list[Any] = [None, True, 0, 1.5, [], {}, ["x"]]
NO_COUNT: list[Any] = [None, True, -1, 1.5, "1", [], 2**63, 10**400]
DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]


@pytest.fixture(scope="module")
def good(photos: Published) -> bytes:
    return framed(photos, request="r1")


@pytest.fixture(scope="module")
def target(photos: Published, good: bytes, tmp_path_factory: pytest.TempPathFactory) -> Target:
    app = create_segment_app(segment_settings(photos, tmp_path_factory.mktemp("frames"), max_request_bytes=2**20))
    return Target(ready(app.test_client()), lambda client: client.post("/", data=good).status_code)


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header as a document, and the body."""
    (size,) = struct.unpack_from("<Q", data, 8)
    return json.loads(data[16 : 16 + size]), data[16 + size :]


def joined(header: bytes, body: bytes) -> bytes:
    size = len(header) + -(16 + len(header)) % frames.ALIGNMENT
    return frames.MAGIC + struct.pack("<Q", size) + header.ljust(size) + body


def altered_fields(good: bytes) -> Iterator[Attack]:
    """Each field with values of other types, out of its range or of another's; each missing, and one too many."""
    header, body = parts(good)
    odd: dict[tuple[Any, ...], list[tuple[Any, int]]] = {
        ("tensors",): [(v, 400) for v in (None, 1, "x", {}, [1], DEEP, [])] + [(header["tensors"] * 2, 400)],
        ("bundle",): [(v, 400) for v in [*NO_TEXT, "", "../../etc", "x" * 600, header["bundle"].upper(), "\ud800"]]
        + [("sha256:" + "0" * 64, 404), ("sha256:" + "../" * 21 + "x", 400)],
        ("segment",): [(v, 400) for v in [*NO_TEXT, "x" * 600, "\ud800", "6.."]]
        + [(v, 404) for v in ("", "..99", "../..", "..6/", "6..1", "a" * 200, "..\0", "%2e%2e")],
        ("request",): [(v, 400) for v in [*NO_TEXT, "x" * 600, "\ud800"]],
        ("step",): [
            (v, 400)
            for v in (True, 1, "x", [], {}, {"session": ""}, {"session": "s"}, {"session": "s", "position": -1})
        ],
        # Of numbers those in range are refused too: the good frame's segment ends the model.
        ("exit",): [(v, 400) for v in (True, "x", [], {}, DEEP, 1e31, 10**400, -1e31, 0, 0.5)],
        ("more",): [(1, 400)],
        ("tensors", 0, "name"): [(v, 400) for v in [*NO_TEXT, "", "y", "../x", "x\0", "x" * 600, "\ud800"]],
        ("tensors", 0, "dtype"): [(v, 400) for v in [*NO_TEXT, "", "object", "O", "float64", "int8", "<f4", "V9"]],
        ("tensors", 0, "codec"): [
            (v, 400) for v in [*NO_TEXT, "", "zip", "../raw", *(c for c in CODEC_IDS if c not in (RAW_ID, PHOTO_ID))]
        ]
        # Pixels of a photo, of a media type that is none.
        + [(PHOTO_ID, 415)],
        ("tensors", 0, "shape"): [
            *((v, 400) for v in (None, 1, "x", {}, [], [-1], [1.5], ["1"], [None], [0], [1, 3, 8, 7], [3, 8, 8])),
            *((v, 400) for v in ([1, 3, 8, 8, 1], [2, 3, 8, 8])),
            *(
                (v, 413)
                for v in (
                    [1, 3, 8, 2**62],
                    [1, 3, 8, 2**63],
                    [1, 3, 8, 2**64],
                    [2**31] * 8,
                    [0, 2**40],
                    [1] * 33,
                    [2**20] * 32,
                )
            ),
        ],
        ("tensors", 0, "offset"): [(v, 400) for v in [*NO_COUNT, 1, 64, 2**62]],
        ("tensors", 0, "length"): [(v, 400) for v in [*NO_COUNT, 0, 767, 769, 2**62]],
        ("tensors", 0, "more"): [(1, 400)],
    }
    for path, values in odd.items():
        for value, status in [*values, *([(..., 400)] if path[-1] not in ("more", "step", "exit") else [])]:
            document = copy.deepcopy(header)
            place: Any = document
            for key in path[:-1]:
                place = place[key]
            if value is ...:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            yield Attack(
                f"{path}={str(value)[:40] if not isinstance(value, int) else ''}",
                status,
                joined(json.dumps(document).encode(), body),
            )


def altered_bytes(good: bytes) -> Iterator[Attack]:
    """Preamble, padding, lengths and ends."""
    start = len(good) - len(parts(good)[1])
    for place, data in flips(good, range(8)):
        yield Attack(f"byte {place}", 400, data)
    for size in (0, 1, 2, start - 15, start - 17, start + 48, 2**20):
        yield Attack(f"header of {size}", 400, good[:8] + struct.pack("<Q", size) + good[16:])
    for size in (2**20 + 1, 2**31, 2**63, 2**64 - 1):
        yield Attack(f"header of {size}", 413, good[:8] + struct.pack("<Q", size) + good[16:])
    for size in (0, 1, 7, 8, 15, 16, 17, start - 1, start, start + 1, len(good) - 1):
        yield Attack(f"cut after {size}", 400, good[:size])
    for tail in (b"\0", b"x", good, bytes(2**10)):
        yield Attack(f"{len(tail)} bytes too many", 400, good + tail)
    header, body = parts(good)
    text = json.dumps(header)
    for name, other in {
        "key twice": text[:-1] + ',"bundle":"sha256:' + "0" * 64 + '"}',
        "not JSON": text[:-1],
        "two documents": text + "{}",
        "a comment": text + "// x",
        "NaN": text.replace("768", "NaN"),
        "a list": f"[{text}]",
        "UTF-16": text.encode("utf-16").decode("latin-1"),
        "NUL": text + "\0",
    }.items():
        yield Attack(name, 400, joined(other.encode("latin-1"), body))


def test_an_altered_frame_is_refused_and_nothing_runs(target: Target, good: bytes) -> None:
    target.refuses("frame", [*altered_fields(good), *altered_bytes(good)])
