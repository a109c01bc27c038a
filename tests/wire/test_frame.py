"""The frame: golden bytes, round trips, and each rule of docs/reference/frame.md broken by the smallest bad input."""

from __future__ import annotations

import contextlib
import json
import random
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.codecs import EncodedTensor
from isthmus.errors import FrameError, FrameMalformed, FrameTooLarge
from isthmus.wire.frame import (
    DTYPES,
    MAGIC,
    MAX_HEADER_BYTES,
    Frame,
    decode,
    encode,
)
from support.paths import ROOT
from support.patience import peak_of

BOUND = 2**20
FUZZ_ROUNDS = 100_000


def pack(doc: Any, body: bytes = b"", *, pad: bool = True) -> bytes:
    """A frame around any header, as a hostile sender would write it."""
    header = doc if isinstance(doc, bytes) else json.dumps(doc).encode()
    if pad:
        header += b" " * (-(16 + len(header)) % 64)
    return MAGIC + len(header).to_bytes(8, "little") + header + body


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "dtype": "uint8", "shape": [1], "codec": "raw", "offset": 0, "length": 1} | changes


def header(*tensors: Any, **changes: Any) -> dict[str, Any]:
    return {"tensors": list(tensors), "bundle": "", "segment": "", "request": ""} | changes


def test_golden_bytes_stay_what_they_are() -> None:
    frame = Frame({"x": np.array([1, 2], "float32"), "m": np.array([True])})
    text = (
        b'{"tensors":[{"name":"x","dtype":"float32","shape":[2],"codec":"raw","offset":0,"length":8},'
        b'{"name":"m","dtype":"bool","shape":[1],"codec":"raw","offset":64,"length":1}],'
        b'"bundle":"","segment":"","request":""}'
    )
    golden = (
        b"ISTHMUS\x01" + b"\xf0" + bytes(7) + text.ljust(240) + bytes.fromhex("0000803f00000040") + bytes(56) + b"\1"
    )
    assert encode(frame) == golden
    assert decode(golden, max_bytes=BOUND).tensors["x"].tolist() == [1, 2]


def test_the_example_in_the_docs_is_the_golden_frame() -> None:
    docs = (ROOT / "docs" / "reference" / "frame.md").read_text()
    assert "49 53 54 48 4d 55 53 01  f0 00 00 00 00 00 00 00" in docs
    rules = set(re.findall(r"`([a-z]+)`", docs.split("## Rules")[1].split("## Known")[0]))
    source = (ROOT / "shared" / "isthmus" / "wire" / "frame.py").read_text()
    used = set(re.findall(r'(?:_malformed|_too_large)\("([a-z]+)"', source)) | {"payload"}
    assert used <= rules


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (1, 3, 4, 5)])
def test_every_dtype_and_rank_comes_back_as_it_was(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(DTYPES[dtype])
    back = decode(encode(Frame({"t": array}, "b", "..1", "r")), max_bytes=BOUND)
    assert (back.bundle, back.segment, back.request) == ("b", "..1", "r")
    assert back.tensors["t"].dtype == array.dtype
    assert back.tensors["t"].shape == shape
    assert back.tensors["t"].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype="int16").reshape(4, 6).T,
        np.arange(24, dtype="float64")[::-1],
        np.arange(24, dtype="int32").reshape(4, 6)[::2, 1::2],
        np.arange(24, dtype=">f4").reshape(4, 6),
        np.broadcast_to(np.float32(3), (4, 5)),
        np.asfortranarray(np.arange(24, dtype="uint8").reshape(4, 6)),
        np.arange(6, dtype="float32").astype(ml_dtypes.bfloat16).reshape(2, 3).T,
    ],
)
def test_arrays_in_any_memory_order_encode_right(array: np.ndarray[Any, Any]) -> None:
    back = decode(encode(Frame({"t": array})), max_bytes=BOUND).tensors["t"]
    assert np.array_equal(back.astype("float64"), array.astype("float64"))


def test_decoding_views_the_frame_and_cannot_write_to_it() -> None:
    data = encode(Frame({"t": np.arange(1000, dtype="float32")}))
    array = decode(data, max_bytes=BOUND).tensors["t"]
    assert np.shares_memory(array, np.frombuffer(data, "uint8"))
    assert not array.flags.writeable
    assert not decode(bytearray(data), max_bytes=BOUND).tensors["t"].flags.writeable


@pytest.mark.parametrize("threshold", [None, 0.0, -0.0, 0.1, 1, -1e30, 1e30, 5e-324])
def test_an_exits_threshold_comes_back_as_it_was(threshold: float | None) -> None:
    data = encode(Frame({"x": np.ones(1)}, "b", "..1", "r", exit=threshold))
    assert (b"exit" in data) == (threshold is not None)
    outlines: list[Any] = []
    assert decode(data, max_bytes=BOUND, accept=outlines.append).exit == threshold == outlines[0].exit


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), -1e31])
def test_no_frame_with_a_threshold_beyond_the_bound_is_sent(threshold: float) -> None:
    with pytest.raises(FrameMalformed) as e:
        encode(Frame({}, exit=threshold))
    assert e.value.facts["rule"] == "exit"


HALF = tensor(length=2, dtype="float16")
BAD = {
    "empty": (b"", "magic"),
    "not a frame": (b"\x93NUMPY\x01\x00" + bytes(64), "magic"),
    "only a preamble short": (MAGIC + bytes(7), "magic"),
    "version 2": (MAGIC[:7] + b"\x02\x036..\x00\x01\x11\x00\x00\x00\x80" + bytes(16), "version"),
    "version 3": (MAGIC[:7] + b"\x03" + pack(header())[8:], "version"),
    "header cut off": (pack(header())[:100], "truncated"),
    "header unaligned": (pack(json.dumps(header()).encode(), pad=False), "alignment"),
    "header not JSON": (pack(b"{"), "header"),
    "header empty": (pack(b""), "header"),
    "header UTF-16": (pack(json.dumps(header()).encode("utf-16")), "header"),
    "header deep": (pack(b"[" * 10_000), "header"),
    "header a list": (pack([]), "header"),
    "key missing": (pack({"tensors": []}), "header"),
    "key unknown": (pack(header(extra=1)), "header"),
    "key twice": (pack(b'{"tensors":[],"tensors":[],"bundle":"","segment":"","request":""}'), "header"),
    "NaN": (pack(b'{"tensors":[NaN],"bundle":"","segment":"","request":""}'), "header"),
    "huge number": (pack(b'{"tensors":[' + b"9" * 5000 + b'],"bundle":"","segment":"","request":""}'), "tensor"),
    "tensors no list": (pack(header() | {"tensors": {}}), "header"),
    "bundle no text": (pack(header(bundle=1)), "bundle"),
    "segment too long": (pack(header(segment="s" * 513)), "segment"),
    "request a surrogate": (pack(header(request="\ud800")), "header"),
    "exit no number": (pack(header(exit="0.5")), "exit"),
    "exit true": (pack(header(exit=True)), "exit"),
    "exit too large": (pack(header(exit=1e31)), "exit"),
    "exit too small": (pack(header(exit=-1e31)), "exit"),
    "exit beyond a float": (pack(b'{"tensors":[],"bundle":"","segment":"","request":"","exit":1e999}'), "exit"),
    "exit NaN": (pack(b'{"tensors":[],"bundle":"","segment":"","request":"","exit":NaN}'), "header"),
    "exit twice": (pack(b'{"tensors":[],"bundle":"","segment":"","request":"","exit":1.0,"exit":2.0}'), "header"),
    "exit of a step": (pack(header(exit=0.5, step={"session": "s", "position": 0})), "exit"),
    "tensor no object": (pack(header(1)), "tensor"),
    "tensor key missing": (pack(header({"name": "x"})), "tensor"),
    "tensor key unknown": (pack(header(tensor(level=3)), b"\1"), "tensor"),
    "name empty": (pack(header(tensor(name="")), b"\1"), "name"),
    "name no text": (pack(header(tensor(name=None)), b"\1"), "name"),
    "name twice": (pack(header(tensor(), tensor(offset=64)), b"\1" + bytes(63) + b"\1"), "duplicate"),
    "dtype unknown": (pack(header(tensor(dtype="object")), b"\1"), "dtype"),
    "dtype a list": (pack(header(tensor(dtype=["uint8"])), b"\1"), "dtype"),
    "codec unknown": (pack(header(tensor(codec="pickle")), b"\1"), "codec"),
    "shape negative": (pack(header(tensor(shape=[-1])), b"\1"), "shape"),
    "shape fractional": (pack(header(tensor(shape=[1.0])), b"\1"), "shape"),
    "shape of true": (pack(header(tensor(shape=[True])), b"\1"), "shape"),
    "shape no list": (pack(header(tensor(shape=1)), b"\1"), "shape"),
    "offset text": (pack(header(tensor(offset="0")), b"\1"), "offset"),
    "offset negative": (pack(header(tensor(offset=-64)), b"\1"), "offset"),
    "gap": (pack(header(tensor(offset=64)), bytes(64) + b"\1"), "offset"),
    "overlap": (pack(header(tensor(), tensor(name="y")), b"\1"), "offset"),
    "padding": (pack(header(tensor(), tensor(name="y", offset=64)), b"\1" + b"\2" * 63 + b"\1"), "padding"),
    "length negative": (pack(header(tensor(length=-1)), b"\1"), "offset"),
    "body cut off": (pack(header(tensor(shape=[2], length=2)), b"\1"), "truncated"),
    "length wrong": (pack(header(tensor(shape=[2])), b"\1"), "payload"),
    "item cut": (pack(header(tensor(dtype="float32")), b"\1"), "payload"),
    "bool of 2": (pack(header(tensor(dtype="bool")), b"\2"), "payload"),
    "trailing": (pack(header(tensor()), b"\1\1"), "trailing"),
    "trailing without tensors": (pack(header(), b"\0"), "trailing"),
}


def test_a_frame_of_version_2_is_refused_with_what_to_do() -> None:
    """Earlier routers sent refinements of what a function had kept in such frames."""
    with pytest.raises(FrameMalformed, match=r"frame version 2, .* update the router") as e:
        decode(BAD["version 2"][0], max_bytes=BOUND)
    assert e.value.facts["rule"] == "version"


@pytest.mark.parametrize("case", BAD)
def test_decode_refuses_what_breaks_a_rule_and_names_it(case: str) -> None:
    data, rule = BAD[case]
    with pytest.raises(FrameMalformed) as e:
        decode(data, max_bytes=BOUND)
    assert e.value.facts["rule"] == rule


LARGE = {
    "frame": (bytes(BOUND + 1), "frame"),
    "header of 1 GB": (MAGIC + (10**9).to_bytes(8, "little"), "header"),
    "header of all bits": (MAGIC + b"\xff" * 8, "header"),
    "header of lists": (pack(header() | {"tensors": [[]] * 100_000}), "header"),
    "header of objects": (pack(header() | {"tensors": [{"": 0}] * 50_000}), "header"),
    "shape of a million": (pack(header(tensor(shape=[0] * 300_000, length=0))), "header"),
    "rank": (pack(header(tensor(shape=[1] * 33)), b"\1"), "rank"),
    "shape that overflows": (pack(header(tensor(shape=[2**32, 2**32, 2**32]))), "unpacked"),
    "shape that overflows to one": (pack(header(tensor(shape=[2**63, 2])), b"\1"), "unpacked"),
    "shape of nothing, but vast": (pack(header(tensor(shape=[0, 2**62], length=0))), "unpacked"),
    "shape of 10^4000": (pack(header(tensor(shape=[10**4000]))), "unpacked"),
    "many together": (
        pack(header(*[tensor(name=f"t{i}", shape=[BOUND // 2], offset=i * 64) for i in range(3)]), bytes(200)),
        "payload unpacked",
    ),
}


@pytest.mark.parametrize("case", LARGE)
def test_decode_refuses_what_exceeds_a_bound_without_allocating(case: str) -> None:
    data, rule = LARGE[case]

    def refuse() -> None:
        with pytest.raises(FrameError) as e:
            decode(data, max_bytes=BOUND)
        assert e.value.facts["rule"] in rule.split()

    assert peak_of(refuse, 2**20) < 2**20


@pytest.mark.parametrize(
    ("frame", "error", "rule"),
    [
        (Frame({"x": np.array(["text"])}), FrameMalformed, "dtype"),
        (Frame({"x": np.array([1j])}), FrameMalformed, "dtype"),
        (Frame({"x": np.array([object()])}), FrameMalformed, "dtype"),
        (Frame({"": np.zeros(1)}), FrameMalformed, "name"),
        (Frame({"x" * 513: np.zeros(1)}), FrameMalformed, "name"),
        (Frame({}, encoded={"x": EncodedTensor("zip/1", "float32", (1,), b"")}), FrameMalformed, "codec"),
        (Frame({}, encoded={"x": EncodedTensor("half/1", "text", (1,), b"")}), FrameMalformed, "dtype"),
        (Frame({}, encoded={"x": EncodedTensor("half/1", "float32", (1,) * 33, b"")}), FrameTooLarge, "rank"),
        (
            Frame({"x": np.zeros(1)}, encoded={"x": EncodedTensor("half/1", "float32", (1,), b"")}),
            FrameMalformed,
            "duplicate",
        ),
        (Frame({}, request="\ud800"), FrameMalformed, "request"),
        (Frame({"x": np.zeros((1,) * 33)}), FrameTooLarge, "rank"),
        (Frame({str(i): np.zeros(1) for i in range(1025)}), FrameTooLarge, "tensors"),
        (Frame({f"{i:0500}": np.zeros((1,) * 32) for i in range(1024)}), None, ""),
    ],
)
def test_encode_refuses_what_no_reader_accepts(frame: Frame, error: type[FrameError] | None, rule: str) -> None:
    if error is None:
        assert len(decode(encode(frame), max_bytes=BOUND * 8).tensors) == 1024
        return
    with pytest.raises(error) as e:
        encode(frame)
    assert e.value.facts["rule"] == rule


def test_more_tensors_than_the_bound_are_refused() -> None:
    data = pack(header(*[tensor(name=str(i), offset=i * 64) for i in range(1025)]))
    with pytest.raises(FrameTooLarge, match="1025 tensors"):
        decode(data, max_bytes=BOUND * 8)


def test_a_header_longer_than_the_bound_is_refused_on_both_sides() -> None:
    with pytest.raises(FrameTooLarge):
        decode(pack(header(request="r").__repr__().encode() + b" " * MAX_HEADER_BYTES), max_bytes=BOUND * 8)
    # A quote takes two bytes in JSON, so these names fit and their header does not.
    with pytest.raises(FrameTooLarge):
        encode(Frame({f"{i:04}".ljust(512, '"'): np.zeros(1) for i in range(1024)}))


def test_frames_that_differ_in_the_request_alone_decode_each_to_its_own() -> None:
    data = encode(Frame({"x": np.arange(6, dtype="float32")}, "b", "..1", "first"))
    for request in ("second", "", "é", 'quo"ted', "back\\slash", "x" * 512):
        other = encode(Frame({"x": np.arange(6, dtype="float32")}, "b", "..1", request))
        assert decode(data, max_bytes=BOUND).request == "first"
        assert decode(other, max_bytes=BOUND).request == request
    assert decode(data, max_bytes=BOUND).tensors["x"].tolist() == list(range(6))
    with pytest.raises(FrameTooLarge):
        decode(data, max_bytes=len(data) - 1)
    with pytest.raises(FrameMalformed):
        decode(data + b"\0", max_bytes=BOUND)


any_array = st.sampled_from([d for n, d in DTYPES.items() if n != "bfloat16"]).flatmap(
    lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@given(st.dictionaries(st.text(min_size=1, max_size=20).filter(lambda t: t.isascii()), any_array, max_size=5))
@settings(max_examples=200, deadline=None)
def test_round_trip(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    data = encode(Frame(tensors))
    back = decode(data, max_bytes=BOUND).tensors
    assert list(back) == list(tensors)
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_any_splice_of_bytes_is_refused_or_is_a_frame(junk: bytes, start: int, stop: int) -> None:
    data = encode(Frame({"x": np.arange(5, dtype="int16"), "y": np.zeros((2, 0))}, "b", "..1", "r", exit=0.5))
    mutated = data[:start] + junk + data[stop:]
    with contextlib.suppress(FrameError):
        assert encode(decode(mutated, max_bytes=BOUND)) is not None


def test_100_000_mutated_frames_raise_nothing_but_frame_errors() -> None:
    rng = random.Random(7)
    seeds = [
        encode(
            Frame({"x": np.arange(6, dtype="float32").reshape(2, 3), "m": np.array([True, False])}, "b", "..1", "r")
        ),
        encode(Frame({"s": np.array(3, "int64"), "e": np.zeros((0, 4), "float16")})),
        encode(Frame({f"t{i}": np.full(i, i, "uint8") for i in range(6)})),
        encode(Frame({"x": np.ones(2, "float32")}, "b", "..1", exit=0.75)),
    ]
    refused = 0
    for _ in range(FUZZ_ROUNDS):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            match rng.randrange(5):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.choice(b'0123456789-+.eE"{}[],:\x00\xff')
                case 2:
                    del data[at : at + rng.randint(1, 64)]
                case 3:
                    data[at:at] = rng.randbytes(rng.randint(1, 64))
                case 4:
                    other = rng.choice(seeds)
                    data[at:] = other[rng.randrange(len(other)) :]
            if not data:
                break
        try:
            decode(bytes(data), max_bytes=BOUND)
        except FrameError:
            refused += 1
    assert refused > FUZZ_ROUNDS // 2
