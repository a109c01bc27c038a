"""Short frames: refinements without a header; whatever comes instead is refused, and nothing else happens."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from activations import LAYOUTS, SHAPES, activations
from isthmus import frame as frames
from isthmus import short_frame
from isthmus.calibration.learn import learn
from isthmus.codecs import Packed, Packing, pack
from isthmus.codecs.kept_tensors import KEY_BYTES
from isthmus.codecs.layers import LAYERS, Basis, follow, layered, trail_of
from isthmus.codecs.table import Table
from isthmus.errors import FrameError, FrameMalformed, FrameTooLarge, NotKept
from isthmus.frame import Frame
from isthmus.kept import Kept

Array = np.ndarray[Any, np.dtype[Any]]
BUNDLE, OTHER = "sha256:" + "0" * 64, "sha256:" + "1" * 64
REQUEST = "0" * 36


@pytest.fixture(scope="module")
def table() -> Table:
    return learn(activations(SHAPES["maps"])[1:], layout=LAYOUTS["maps"])


@pytest.fixture(scope="module")
def arrays() -> dict[str, Array]:
    return dict(zip(("x", "y"), activations(SHAPES["maps"], 2, seed=5), strict=True))


class Function:
    """What reads frames, and keeps what may be refined."""

    def __init__(self, table: Table) -> None:
        self.table, self.kept = table, Kept()

    def read(self, data: bytes, max_bytes: int = 2**24) -> Frame:
        return frames.decode(
            data,
            max_bytes=max_bytes,
            tables=lambda bundle, tensor, _: Basis(self.table, self.kept, bundle, tensor),
            keeper=self.kept,
        )


def sent(arrays: Mapping[str, Array], table: Table, bundle: str = BUNDLE) -> tuple[bytes, Frame]:
    """The first frame of these tensors, and what refines them."""
    coarse, fine = (Packing("transform/4", quality, table) for quality in (0.2, 0.4))
    first = {name: pack(array, layered(coarse)) for name, array in arrays.items()}
    packed = {name: p for name, p in first.items() if isinstance(p, Packed)}
    assert packed.keys() == arrays.keys()
    more = {name: follow(trail_of(p, bundle, name), fine)[0] for name, p in packed.items()}
    data = frames.encode(Frame({}, bundle, "6..", REQUEST, packed))
    return data, Frame({}, bundle, "6..", REQUEST, more)


def test_refinements_alone_travel_without_a_header_and_say_the_same(table: Table, arrays: dict[str, Array]) -> None:
    first, more = sent(arrays, table)
    function = Function(table)
    function.read(first)
    short, payloads = frames.encode(more), sum(p.nbytes for p in more.packed.values())
    assert short.startswith(short_frame.MAGIC)
    assert frames.is_frame(short)
    assert len(short) == payloads + 8 + 1 + len("6..") + 1 + len(REQUEST) + 1 + 4 * len(arrays)
    beside = {"beside": np.zeros(1, np.float32)}
    long = frames.encode(more._replace(tensors=beside))
    assert len(long) > payloads + 400
    found, expected = function.read(short), function.read(long)
    assert (found.bundle, found.segment, found.request) == (BUNDLE, "6..", REQUEST)
    assert found.codecs == expected.codecs == dict.fromkeys(arrays, "layers/2")
    assert found.tensors.keys() == arrays.keys()
    for name, array in found.tensors.items():
        assert array.tobytes() == expected.tensors[name].tobytes()


def test_what_a_short_frame_cannot_say_travels_in_a_long_one(table: Table, arrays: dict[str, Array]) -> None:
    first, more = sent(arrays, table)
    assert first.startswith(frames.MAGIC)
    for frame in (
        more._replace(tensors={"beside": np.zeros(1, np.float32)}),
        more._replace(request="r" * 256),
        more._replace(request="é"),
        more._replace(packed={**more.packed, "z": Packed("int8/1", "float32", (4,), b"abcdefgh")}),
    ):
        assert frames.encode(frame).startswith(frames.MAGIC)


def test_what_is_not_kept_is_asked_for(table: Table, arrays: dict[str, Array]) -> None:
    _, more = sent(arrays, table)
    with pytest.raises(NotKept, match="send it whole") as e:
        Function(table).read(frames.encode(more))
    assert "replicas" in e.value.hint


def test_a_reader_that_keeps_nothing_refuses_it(table: Table, arrays: dict[str, Array]) -> None:
    _, more = sent(arrays, table)
    with pytest.raises(FrameMalformed, match="nothing is kept") as e:
        frames.decode(frames.encode(more), max_bytes=2**24)
    assert e.value.facts["rule"] == "table"


def test_every_truncation_and_every_byte_more_is_refused(table: Table, arrays: dict[str, Array]) -> None:
    first, more = sent(arrays, table)
    function = Function(table)
    function.read(first)
    data = frames.encode(more)
    for length in range(8, len(data)):
        with pytest.raises(FrameMalformed):
            function.read(data[:length])
    for extra in (b"\0", b"\0" * 5, data):
        with pytest.raises(FrameMalformed):
            function.read(data + extra)
    with pytest.raises(FrameMalformed, match="not start"):
        function.read(data[:7])


def test_changed_bytes_are_refused_or_give_finite_numbers(table: Table, arrays: dict[str, Array]) -> None:
    first, more = sent(arrays, table)
    function = Function(table)
    function.read(first)
    data, rng = frames.encode(more), np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            # Half of them where lengths and keys are.
            at = int(rng.integers(8, 80 if rng.random() < 0.5 else len(data)))
            changed[at] = int(rng.integers(256))
        try:
            found = function.read(bytes(changed))
        except FrameError:
            refused += 1
            continue
        assert all(np.isfinite(array).all() for array in found.tensors.values())
    assert refused > 1500
    for _ in range(2000):
        with pytest.raises(FrameError):
            function.read(short_frame.MAGIC + rng.bytes(int(rng.integers(0, 200))))


def by_hand(*payloads: bytes, count: int | None = None) -> bytes:
    each = b"".join(struct.pack("<I", len(p)) + p for p in payloads)
    return short_frame.MAGIC + b"\x036..\x04call" + bytes((len(payloads) if count is None else count,)) + each


def test_payloads_that_do_not_belong_together_are_refused(table: Table, arrays: dict[str, Array]) -> None:
    function = Function(table)
    refinements = []
    for bundle in (BUNDLE, OTHER):
        first, more = sent(arrays, table, bundle)
        function.read(first)
        refinements.append({name: bytes(p.payload) for name, p in more.packed.items()})
    one, other = refinements
    assert function.read(by_hand(one["x"], one["y"])).tensors.keys() == {"x", "y"}
    for payloads, said in (
        ((one["x"], one["x"]), "'x' twice"),
        ((one["x"], other["y"]), "2 bundles"),
        ((), "0 bundles"),
        ((one["x"][:KEY_BYTES],), "no refinement"),
        ((b"\0" + one["x"][1:],), "no refinement"),
        ((b"",), "no refinement"),
    ):
        with pytest.raises(FrameMalformed, match=said) as e:
            function.read(by_hand(*payloads))
        assert e.value.facts["rule"] == "short"
    for count in (0, 1, 3, 255):
        with pytest.raises(FrameMalformed):
            function.read(by_hand(one["x"], one["y"], count=count))
    with pytest.raises(FrameMalformed, match="not ASCII"):
        function.read(short_frame.MAGIC + b"\x01\xff\0\0" + bytes(8))


def test_the_bound_holds_for_what_a_short_frame_unpacks_to(table: Table, arrays: dict[str, Array]) -> None:
    first, more = sent(arrays, table)
    function = Function(table)
    function.read(first)
    size = sum(array.nbytes for array in arrays.values())
    size += max(LAYERS.working_bytes(array.dtype, array.shape) for array in arrays.values())
    assert function.read(frames.encode(more), max_bytes=size).tensors
    with pytest.raises(FrameTooLarge) as e:
        function.read(frames.encode(more), max_bytes=size - 1)
    assert e.value.facts == {"rule": "unpacked", "limit": size - 1}
