"""Names that climb out of folders, and bodies that unpack without end: refused, and no other file is touched."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from isthmus.errors import IsthmusError, SettingsError, http_status
from isthmus.events.message import storable
from isthmus.registry import FolderStore, Registry
from isthmus.security.caller_keys import parse_caller_keys
from isthmus.serving import create_router_app, create_segment_app
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from support.attacks import MIN_CASES, Attack, Target
from support.bundles import Published, framed, photo, ready, router_settings, segment_settings
from support.bundles import photos as photos

KEY_DIGEST = "sha256:" + "0" * 64
# Where a broken check would write to nothing: not to files of this machine.
CLIMBING = (
    "..",
    "../..",
    "../../../../proc/isthmus",
    "/proc/isthmus",
    "//proc/isthmus",
    "..\\..\\windows\\win.ini",
    "%2e%2e%2fproc%2fisthmus",
    "..%2f..%2f",
    "%252e%252e%252f",
    "..%c0%af..%c0%af",
    "..;/..;/",
    "....//....//",
    "./.",
    "photos/../../secret",
    "photos\0/../secret",
    "photos\n../secret",
    "file:///proc/isthmus",
    "~/secret",
    "$HOME/secret",
    "`id`",
    "CON",
    "\uff0e\uff0e\uff0fsecret",
    "\u2025/secret",
    ".staging",
    ".locks/00",
)


@pytest.fixture(scope="module")
def router(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    app = create_router_app(router_settings(photos, tmp_path_factory.mktemp("router"), ("local",)))
    yield Target(ready(app.test_client()), lambda client: client.post("/", data=photo()).status_code, "hop0")
    app.extensions["isthmus"].close()


@pytest.fixture(scope="module")
def segment(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    app = create_segment_app(segment_settings(photos, tmp_path_factory.mktemp("segment"), max_request_bytes=2**20))
    yield Target(ready(app.test_client()), lambda client: client.post("/", data=framed(photos)).status_code)
    app.extensions["isthmus"].close()


def routes(text: str) -> Iterator[Attack]:
    """Requests of a router that name a model, a version or a route so."""
    quoted = quote(text, safe="")
    yield Attack(f"model {text!r}", 404, photo(), {}, f"/?model={quoted}")
    yield Attack(f"version {text!r}", 404, photo(), {}, f"/?model=photos:{quoted}")
    yield Attack(f"path {text!r}", 404, b"{}", {}, f"/v2/models/{quoted}/infer")
    yield Attack(f"version in a path {text!r}", 404, b"{}", {}, f"/v2/models/photos/versions/{quoted}/infer")
    if text.isascii() and text.isprintable():
        yield Attack(f"route {text!r}", 400, photo(), {"Isthmus-Route": text})
    chat = json.dumps({"model": text, "messages": [{"role": "user", "content": "x"}]}).encode()
    yield Attack(f"chat {text!r}", 404, chat, {"Content-Type": "application/json"}, "/v1/chat/completions")


def test_names_that_climb_reach_no_model(router: Target) -> None:
    router.refuses("name", (attack for text in CLIMBING for attack in routes(text)))


def test_segments_and_bundles_that_climb_reach_no_file(segment: Target, photos: Published) -> None:
    def attacks() -> Iterator[Attack]:
        for text in CLIMBING:
            if text != "..":  # the id of the segment that is the whole model
                yield Attack(f"segment {text!r}", 404, framed(photos, text))
            yield Attack(f"bundle {text!r}", 400, framed(photos, bundle=text))
            yield Attack(f"digest {text!r}", 400, framed(photos, bundle=f"sha256:{text}".ljust(71, "0")[:71]))
            for body in ({"bundle": text, "segment": ".."}, {"bundle": photos.digest, "segment": text, "x": 1}):
                yield Attack(f"load {body}", 400, json.dumps(body).encode(), {}, "/load")

    segment.refuses("segment name", attacks())


def test_keys_names_and_ids_that_climb_are_refused_or_hashed(tmp_path: Path, photos: Published) -> None:
    (tmp_path / "secret").write_text("outside")
    store = FolderStore(tmp_path / "registry")
    store.put("blobs/x", b"x")
    registry = Registry(store)
    acts: list[Callable[[str], object]] = [
        lambda text: store.put(text, b"x"),
        lambda text: store.put_if_absent(text, b"x"),
        lambda text: store.put_if_match(text, b"x", ""),
        lambda text: store.get(text, max_bytes=99),
        lambda text: store.read(text, 0, 1),
        lambda text: store.size(text),
        lambda text: store.list(text),
        lambda text: store.delete(text),
        lambda text: registry.resolve(text),
        lambda text: registry.resolve(f"{text}:prod"),
        lambda text: registry.move_alias(text, "prod", "1"),
        lambda text: registry.move_alias("photos", text, "1"),
        lambda text: registry.bundle(text),
        lambda text: registry.signatures.put(photos.digest, text, b"x"),
    ]
    # Names of callers go to logs and headers, and never to a path.
    for text in ("ann\n", "ann\r\nX: y", "ann\0", "a b", "", "x" * 65, "\u00e4", "jwt:ann", "a/b", "\u2028"):
        with pytest.raises(SettingsError):
            parse_caller_keys([json.dumps({"name": text, "key": KEY_DIGEST, "roles": {}})], where="x")
    count = 0
    before = sorted(tmp_path.rglob("*"))
    # One part of letters alone is the name of a file in the store, and a model of that name may be absent.
    for text in (each for each in CLIMBING if each != "CON"):
        for act in acts:
            with pytest.raises(IsthmusError) as caught:
                act(text)
            assert http_status(caught.value) in (404, 500, 502)
            count += 1
        key = storable(text)
        assert "/" not in key
        assert ".." not in key
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "secret").read_text() == "outside"
    assert count >= MIN_CASES["stored name"]


# Bodies that unpack to more


def gzipped(data: bytes, times: int = 1) -> bytes:
    for _ in range(times):
        data = gzip.compress(data, 9, mtime=0)
    return data


def deflated(size: int, wbits: int = 15) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return compressor.compress(bytes(size)) + compressor.flush()


def png(width: int, height: int) -> bytes:
    """A PNG that declares so many pixels, and holds few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", deflated(10**6)) + chunk(b"IEND", b"")


def bombs(photos: Published) -> Iterator[Attack]:
    for size in (2**20 + 1, 2**22, 2**24, 2**26):
        yield Attack(f"gzip of {size}", 413, gzipped(bytes(size)), {"Content-Encoding": "gzip"})
        for wbits in (15, -15):
            yield Attack(f"deflate of {size}, {wbits}", 413, deflated(size, wbits), {"Content-Encoding": "deflate"})
    yield Attack("members of gzip", 413, gzipped(bytes(2**16)) * 64, {"Content-Encoding": "gzip"})
    yield Attack("empty members of gzip", 400, gzipped(b"") * 5000, {"Content-Encoding": "gzip"})
    good = framed(photos)
    for name, coding in {
        "twice": "gzip, gzip",
        "another": "br",
        "zstd": "zstd",
        "unknown": "x" * 40,
        "a list of none": "identity, identity",
    }.items():
        yield Attack(f"coding {name}", 415, gzipped(good, 2), {"Content-Encoding": coding})
    for what, data in {
        "cut": gzipped(good)[:-9],
        "with more behind": gzipped(good) + b"more",
        "of another check": gzipped(good)[:-8] + bytes(8),
        "of another length": gzipped(good)[:-4] + b"\xff" * 4,
        "none": good,
    }.items():
        yield Attack(f"gzip {what}", 400, data, {"Content-Encoding": "gzip"})
    yield Attack("gzip in gzip", 400, gzipped(good, 2), {"Content-Encoding": "gzip"})
    for codec in ("lossless/3", "sparse/2", "half/1", "int8/1", "int4/1"):
        for size, status in ((2**20, 413), (2**40, 413)):
            yield Attack(f"{codec} of {size}", status, declared(photos, codec, [1, size]))


def declared(photos: Published, codec: str, shape: list[int]) -> bytes:
    """A frame of few bytes whose tensor is said to have that shape."""
    base = frames.encode(Frame({"x": np.zeros(2, "float32")}, photos.digest, ".."))
    header = json.loads(base[16 : 16 + struct.unpack_from("<Q", base, 8)[0]])
    header["tensors"][0] |= {"codec": codec, "shape": shape}
    text = json.dumps(header).encode()
    size = len(text) + -(16 + len(text)) % frames.ALIGNMENT
    return frames.MAGIC + struct.pack("<Q", size) + text.ljust(size) + base[-8:]


def test_bodies_that_unpack_without_end_run_nothing(segment: Target, photos: Published) -> None:
    segment.refuses("bomb", bombs(photos))


def test_photos_that_declare_many_pixels_and_deep_documents_run_nothing(router: Target) -> None:
    def attacks() -> Iterator[Attack]:
        for width, height in ((2**16, 2**16), (2**31 - 1, 1), (1, 2**31 - 1), (30_000, 30_000), (10**9, 10**9)):
            yield Attack(f"{width}x{height}", 413, png(width, height), {"Content-Type": "image/png"})
        for shape in ((0, 1), (1, 0), (0, 0)):
            yield Attack(f"{shape}", 400, png(*shape), {"Content-Type": "image/png"})
        kind = {"Content-Type": "application/json"}
        for depth in (200, 2000, 10**5):
            yield Attack(f"lists {depth} deep", 415, b"[" * depth + b"]" * depth, kind)
            yield Attack(f"objects {depth} deep", 400, b'{"a":' * depth + b"1" + b"}" * depth, kind)
        yield Attack("a number of a million digits", 400, b'{"inputs":' + b"9" * 10**6 + b"}", kind)
        yield Attack("a key a hundred thousand times", 400, b'{"inputs":[' + b'{"x":1},' * 10**5 + b"1]}", kind)
        for shape in ([2**40], [2**20, 2**20], [-1, 192], [1, 3, 8, 8, 0], [2**62, 4], [1] * 1000):
            tensor = {"name": "x", "shape": shape, "datatype": "FP32", "data": [0.0]}
            yield Attack(f"shape {shape[:4]}", 400, json.dumps({"inputs": [tensor]}).encode(), kind)

    router.refuses("photo bomb", attacks())
