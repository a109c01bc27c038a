"""Lengths that are forged: of binary tensors, of files inside of requests, of claims; refused, and nothing runs."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from isthmus.errors import EventMalformed
from isthmus.events.claims import Claim, looks_like_claim, parse_claim
from isthmus.serving import create_router_app
from support.attacks import MIN_CASES, Attack, Target
from support.bundles import Published, photo, ready, router_settings
from support.bundles import photos as photos

INFER = "/v2/models/photos/infer"
HEADER = "Inference-Header-Content-Length"
SIZE = 4 * 3 * 8 * 8


@pytest.fixture(scope="module")
def router(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("router")
    app = create_router_app(router_settings(photos, folder, ("local",), max_request_bytes=2**22))
    yield Target(ready(app.test_client()), lambda client: client.post("/", data=photo()).status_code, "hop0")
    app.extensions["isthmus"].close()


def tensor(**changes: Any) -> dict[str, Any]:
    """A binary tensor as the model takes it; `...` removes a field."""
    good = {"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": SIZE}}
    return {name: value for name, value in (good | changes).items() if value is not ...}


def binary(what: str, document: Any, data: bytes, length: object = None, status: int = 400) -> Attack:
    text = json.dumps(document).encode()
    return Attack(what, status, text + data, {HEADER: str(len(text) if length is None else length)}, INFER)


def binary_attacks() -> Iterator[Attack]:
    zeros = bytes(SIZE)
    good = {"inputs": [tensor()]}
    for length in ("-1", "0", "1", "x", "", " ", "1e3", "0x10", "+5", "9" * 30, "99999", "5,5", "1_0", "\u0661"):
        yield binary(f"header of {length}", good, zeros, length)
    size = len(json.dumps(good))
    for length in (size - 1, size + 1, size + SIZE, size + SIZE + 1):
        yield binary(f"header of {length - size:+}", good, zeros, length)
    for value in (None, -1, 0, 1, SIZE - 1, SIZE + 1, SIZE * 2, 2**31, 2**63, 2**64, 10**300, 1.5, "768", True, [], {}):
        yield binary(f"size of {str(value)[:20]}", {"inputs": [tensor(parameters={"binary_data_size": value})]}, zeros)
    for count in (0, 1, SIZE - 1, SIZE + 1, 2 * SIZE):
        yield binary(f"{count} bytes", good, bytes(count))
    for shape in (
        None,
        1,
        "x",
        {},
        [],
        [1],
        [3, 8, 8],
        [2, 3, 8, 8],
        [1, 3, 8, -8],
        [1, 3, 8, 2**40],
        [0],
        [1.0],
        ["1"],
    ):
        yield binary(f"shape {shape}", {"inputs": [tensor(shape=shape)]}, zeros)
    for kind in (None, 1, "", "FP64", "INT8", "BYTES", "BOOL", "float32", "FP32 ", "fp32", "OBJECT"):
        yield binary(f"type {kind}", {"inputs": [tensor(datatype=kind)]}, zeros)
    for name in (None, 1, "", "y", "x" * 5000, "../x", "x\0"):
        yield binary(f"name {str(name)[:9]}", {"inputs": [tensor(name=name)]}, zeros)
    for field in ("name", "shape", "datatype", "parameters"):
        yield binary(f"without {field}", {"inputs": [tensor(**{field: ...})]}, zeros)
    for inputs in (None, 1, "x", {}, [], [1], [tensor(), tensor()], [[tensor()]]):
        yield binary(f"inputs {str(inputs)[:12]}", {"inputs": inputs}, zeros)
    yield binary("no document", [], zeros)
    yield binary("data and binary", {"inputs": [tensor(data=[0.0] * (SIZE // 4))]}, zeros)


def test_forged_lengths_of_tensors_run_nothing(router: Target) -> None:
    router.refuses("tensor length", binary_attacks())


def files() -> Iterator[Attack]:
    """Photos cut short, and with the lengths of their chunks forged."""
    good = photo()
    kind = {"Content-Type": "image/png"}
    for size in (8, 9, 20, 33, 40, len(good) // 2):
        yield Attack(f"PNG cut after {size}", 400, good[:size], kind)
    for length in (0, 1, 12, 14, 2**16, 2**31 - 1, 2**32 - 1):
        yield Attack(f"IHDR of {length}", 400, good[:8] + struct.pack(">I", length) + good[12:], kind)
    place = good.index(b"IDAT") - 4
    for length in (0, 1, 12):  # one beyond the file's end leaves the pixels whole, which are read
        yield Attack(f"IDAT of {length}", 400, good[:place] + struct.pack(">I", length) + good[place + 4 :], kind)
    yield Attack("no photo", 415, b"x" * 100, kind)
    yield Attack("nothing", 400, b"", kind)


def test_photos_of_forged_lengths_run_nothing(router: Target) -> None:
    router.refuses("photo length", files())


ODD_CLAIMS: dict[str, list[Any]] = {
    "format": [None, "", 1, "isthmus.claim/2", "isthmus.claim", "x", [], {}],
    "digest": [None, "", 5, "0" * 63, "0" * 65, "0" * 64 + "\n", "A" * 64, "../" * 21 + "x", "/etc/passwd", [], {}],
    "size": [None, True, -1, 1.5, "5", 10**400, [], {}],
    "expires": [None, True, -1, 1.5, "5", 2**41, 10**400, [], {}],
    "content_type": [None, 5, "x" * 257, [], {}],
    "more": [None, 1],
}


def test_altered_claims_name_no_object() -> None:
    good = json.loads(Claim("0" * 64, 5, 2_000_000_000, "image/png").encode())
    assert parse_claim(json.dumps(good).encode()).size == 5
    documents = [good | {field: value} for field, values in ODD_CLAIMS.items() for value in values]
    documents += [
        {name: each for name, each in good.items() if name != field} for field in ("digest", "size", "expires")
    ]
    # Without its format a document is a body like any other.
    assert not looks_like_claim(json.dumps({**good, "format": ""}).encode())
    bodies = [json.dumps(each).encode() for each in documents]
    bodies += [b"", b"{", b"[" * 2000, json.dumps(good).encode() + b"x", json.dumps(good).encode().ljust(10**5)]
    for data in bodies:
        with pytest.raises(EventMalformed):
            parse_claim(data)
    assert len(set(bodies)) >= MIN_CASES["claim"]
