"""The plain codecs: what comes back and how near, and in frames."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.artifacts.choice import CODEC_IDS, TOKEN_CODECS
from isthmus.codecs import EncodedTensor, Encoding, NotEncodable, encode_tensor, find_codec
from isthmus.codecs.affine import MAX_OFFSET, OUTLIERS
from isthmus.errors import FrameMalformed
from isthmus.wire import frame as frames
from isthmus.wire.frame import DTYPES, Frame
from support.plain_codecs import PLAIN, Array, back, bits, feature_map, relu

BOUND = 2**20
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LOSSY = ("int8/1", "int4/1")
CODED_FLOATS = [np.dtype("<f4"), np.dtype("<f2"), BFLOAT16]
SHAPES = [(), (1,), (7,), (2, 3), (1, 5, 4, 3), (2, 3, 5), (0,), (2, 0, 3), (1, 3, 0, 2), (2, 2, 2, 2, 2)]


any_dtype = st.sampled_from(sorted(DTYPES)).map(DTYPES.__getitem__)
any_shape = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6)


@st.composite
def any_bits(draw: st.DrawFn) -> Array:
    """An array of any dtype and shape with any bits: NaN of every kind, denormals, negative zero."""
    dtype, shape = draw(any_dtype), draw(any_shape)
    count = int(np.prod(shape, dtype=int))
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    array = np.frombuffer(data, dtype).reshape(shape)
    return (array.view(np.uint8) & 1).view(np.bool_) if dtype == np.bool_ else array


finite_floats = any_shape.flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-(2.0**40), 2.0**40, width=32))
)


@given(any_bits())
@settings(max_examples=120, deadline=None)
def test_lossless_gives_every_bit_of_every_dtype_back(array: Array) -> None:
    got = back("lossless/3", array)
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert bits(got) == bits(array)
    assert not np.shares_memory(got, array)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "bool"])
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_mask_takes_a_bit_a_place_at_most_and_a_constant_next_to_nothing(dtype: str, data: st.DataObject) -> None:
    size = DTYPES[dtype].itemsize
    values = np.frombuffer(data.draw(st.binary(min_size=2 * size, max_size=2 * size)), f"<u{size}")
    places = data.draw(hnp.arrays(np.bool_, hnp.array_shapes(max_dims=4, max_side=9)))
    mask = (places if dtype == "bool" else values[places.astype(int)].view(DTYPES[dtype])).reshape(places.shape)
    assert bits(back("lossless/3", mask)) == bits(mask)
    encoded = encode_tensor(mask, Encoding("lossless/3"))
    most = 5 + 2 * size + -(-mask.size // 8) if places.any() and not places.all() else 1 + size
    assert encoded.nbytes <= min(most, mask.nbytes)


@given(any_bits())
@settings(max_examples=120, deadline=None)
def test_sparse_at_full_quality_gives_every_bit_of_every_float_back(array: Array) -> None:
    if array.dtype.kind not in "fV":
        with pytest.raises(NotEncodable):
            back("sparse/2", array)
        return
    got = back("sparse/2", array)
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert bits(got) == bits(array)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_large_tensor_that_compresses_in_part_comes_back_exactly(dtype: str) -> None:
    for array in (feature_map(1, 40, 16, 16), np.round(relu(1, 40, 16, 16)), np.full((3, 5000), -0.0, "float32")):
        given = array.astype(DTYPES[dtype])
        for codec in ("lossless/3", "sparse/2"):
            assert bits(back(codec, given)) == bits(given)


@given(finite_floats)
@settings(max_examples=120, deadline=None)
def test_int8_is_within_a_255th_of_the_range(array: Array) -> None:
    try:
        got = back("int8/1", array)
    except NotEncodable:
        return
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    if array.size:
        assert np.abs(got.astype(float) - array).max() <= 0.7 * step_of(array, 254)


@given(finite_floats)
@settings(max_examples=120, deadline=None)
def test_int4_is_within_a_15th_of_each_channels_range(array: Array) -> None:
    try:
        got = back("int4/1", array)
    except NotEncodable:
        return
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    if not array.size:
        return
    axis = 2 if array.ndim == 3 else 1
    pairs = [(array, got)] if array.ndim < 3 else zip(*(np.moveaxis(a, axis, 0) for a in (array, got)), strict=True)
    for before, after in pairs:
        # 1/128 more: the step is rounded up to two bytes.
        assert np.abs(after.astype(float) - before).max() <= 0.7 * 1.008 * step_of(before, 14)


def step_of(array: Array, levels: int) -> float:
    values = array.astype(float)
    return float(max(np.ptp(values) / levels, np.abs(values).max() / (MAX_OFFSET / 2), 2.0**-126))


def hidden_states(tokens: int, width: int = 80) -> Array:
    """Tokens with massive channels, a massive first token, and channels of zeros."""
    rng = np.random.default_rng(5)
    states = rng.laplace(size=(1, tokens, width)) * np.exp(2 * rng.standard_normal(width))
    states[:, 0] *= 100
    states[..., 32:64] = 0
    return states.astype("float32")


@pytest.mark.parametrize("codec", [c for c in TOKEN_CODECS if c != "transform/4"])
@pytest.mark.parametrize("sizes", [[1] * 21, [7, 7, 7], [20, 1], [1, 20]], ids=str)
def test_a_token_decodes_alike_in_every_step(codec: str, sizes: list[int]) -> None:
    states = hidden_states(sum(sizes))
    parts = np.split(states, np.cumsum(sizes)[:-1], axis=1)
    assert bits(np.concatenate([back(codec, part) for part in parts], axis=1)) == bits(back(codec, states))


def test_codecs_of_whole_tensors_are_none_of_tokens() -> None:
    states = hidden_states(9)
    for codec in set(PLAIN) - set(TOKEN_CODECS):
        assert bits(back(codec, states[:, 1:], 0.5)) != bits(back(codec, states, 0.5)[:, 1:])


@given(finite_floats)
@settings(max_examples=120, deadline=None)
def test_int8_of_tokens_keeps_outliers_and_is_within_a_254th_of_the_rest(array: Array) -> None:
    got = back("int8-token/1", array)
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    width = array.shape[-1] if array.shape else 1
    for before, after in zip(array.reshape(-1, width or 1), got.reshape(-1, width or 1), strict=True):
        sizes = np.sort(np.abs(before.astype(float)))[::-1]
        most = sizes[OUTLIERS] if width > OUTLIERS else 0.0
        errors = np.abs(after.astype(float) - before)
        assert errors.max(initial=0) <= 0.5001 * max(most / 127, 2.0**-126)
        assert np.count_nonzero(errors == 0) >= min(OUTLIERS, width)


def test_a_token_costs_a_quarter_of_its_bytes_and_its_outliers() -> None:
    assert encode_tensor(hidden_states(1, 576), Encoding("int8-token/1")).nbytes <= 576 + 4 + 6 * OUTLIERS


@pytest.mark.parametrize(("codec", "levels"), [("int8/1", 254), ("int4/1", 14)])
def test_ordinary_values_are_rounded_to_the_nearest_level(codec: str, levels: int) -> None:
    array = np.linspace(-3, 5, 9999, dtype="float32").reshape(1, 1, 99, 101)
    assert np.abs(back(codec, array) - array).max() <= 0.505 * 8 / levels


@pytest.mark.parametrize("codec", [*LOSSY, "int8-token/1"])
@pytest.mark.parametrize(
    "array", [relu(1, 6, 9, 9), -relu(1, 6, 9, 9), feature_map(1, 6, 9, 9) * (relu(1, 6, 9, 9) > 0)]
)
def test_zero_stays_zero(codec: str, array: Array) -> None:
    assert not back(codec, array)[array == 0].any()
    assert not back("sparse/2", array, 0.3)[array == 0].any()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1 / 3, 6e4, 1.2e-6, 123456.78])
@pytest.mark.parametrize("shape", [(), (5,), (1, 3, 4, 4), (2, 7, 3)])
def test_a_constant_comes_back_exactly(codec: str, value: float, shape: tuple[int, ...]) -> None:
    array = np.full(shape, value, "float32")
    assert np.array_equal(back(codec, array), array)


def test_constant_channels_come_back_exactly_beside_others() -> None:
    array = feature_map(1, 8, 5, 5)
    array[:, 3], array[:, 5], array[:, 6] = 0, -0.3, 1e-9
    assert np.array_equal(back("int4/1", array)[:, [3, 5, 6]], array[:, [3, 5, 6]])


@pytest.mark.parametrize("codec", PLAIN)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_comes_back_with_its_dtype(codec: str, shape: tuple[int, ...]) -> None:
    for dtype in CODED_FLOATS:
        array = np.random.default_rng(3).standard_normal(shape).astype(dtype)
        try:
            got = back(codec, array)
        except NotEncodable:
            assert codec in ("half/1", "bfloat16/1")
            assert dtype.itemsize == 2
            continue
        assert (got.dtype, got.shape) == (dtype, shape)
        assert np.allclose(got.astype(float), array.astype(float), atol=0.4)


@pytest.mark.parametrize("codec", PLAIN)
def test_strided_and_big_endian_arrays_encode_as_their_contiguous_copies(codec: str) -> None:
    base = feature_map(2, 6, 8, 10)
    for array in (base.transpose(0, 3, 1, 2), base[:, ::2, :, ::-1], np.asfortranarray(base), base.astype(">f4")):
        got, expected = back(codec, array), back(codec, np.ascontiguousarray(array, "<f4"))
        assert bits(got) == bits(expected)


@pytest.mark.parametrize("codec", PLAIN)
@pytest.mark.parametrize("dtype", [n for n in DTYPES if n not in ("float16", "bfloat16", "float32", "float64")])
def test_integers_and_booleans_are_for_lossless_alone(codec: str, dtype: str) -> None:
    array = np.ones((3, 4), DTYPES[dtype])
    if codec == "lossless/3":
        assert np.array_equal(back(codec, array), array)
        return
    with pytest.raises(NotEncodable):
        back(codec, array)
    payload = memoryview(find_codec(codec).encode(np.ones((3, 4), "float32"), Encoding(codec)))
    with pytest.raises(ValueError, match=dtype):
        find_codec(codec).decode(payload, DTYPES[dtype], (3, 4), None)


@pytest.mark.parametrize("codec", [*LOSSY, "int8-token/1"])
def test_float64_is_not_quantised(codec: str) -> None:
    with pytest.raises(NotEncodable):
        back(codec, np.arange(9.0))
    with pytest.raises(NotEncodable):
        back("sparse/2", np.arange(9.0), 0.5)


@pytest.mark.parametrize("codec", [*LOSSY, "int8-token/1", "sparse/2"])
@pytest.mark.parametrize("dtype", CODED_FLOATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_quantised(codec: str, dtype: np.dtype[Any], bad: float) -> None:
    array = feature_map(1, 4, 5, 5).astype(dtype)
    array[0, 2, 3, 3] = bad
    with pytest.raises(NotEncodable):
        back(codec, array, 0.5)
    assert encode_tensor(array, Encoding(codec, 0.5)) is array


@pytest.mark.parametrize("codec", [*LOSSY, "sparse/2"])
@pytest.mark.parametrize(
    "values",
    [[-3.4e38, 3.4e38], [3.3e38, 3.4e38], [0, 1e-44], [1e-40, 2e-40], [1e-45, 1e-45], [0.0, 3e38], [-3e38, 0.0]],
)
def test_values_at_floats_limits_are_near_or_refused(codec: str, values: list[float]) -> None:
    array = np.array(values, "float32")
    try:
        got = back(codec, array, 0.9)
    except NotEncodable:
        return
    assert np.isfinite(got).all()
    assert np.abs(got.astype(float) - array).max() <= np.ptp(array.astype(float)) / 14 + np.abs(array).max() / 100


def test_a_half_that_would_round_past_its_largest_value_is_refused() -> None:
    # 64 is the space between float16's values there: the top level would be 65,536, which is infinite.
    assert encode_tensor(np.linspace(-65504, 65504, 999).astype("float16"), Encoding("int8/1")).dtype == np.float16


@pytest.mark.parametrize(
    ("codec", "dtype", "largest"), [("half/1", np.float16, 65519.0), ("bfloat16/1", ml_dtypes.bfloat16, 3.39e38)]
)
def test_two_bytes_are_the_nearest_and_never_turn_infinite(codec: str, dtype: Any, largest: float) -> None:
    rng = np.random.default_rng(0)
    array = (rng.standard_normal(5000) * np.exp(rng.uniform(-20, 9, 5000))).astype("float32")
    assert bits(back(codec, array)) == bits(array.astype(dtype).astype("float32"))
    double = array.astype("float64")
    assert bits(back(codec, double)) == bits(double.astype(dtype).astype("float64"))
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, largest], "float32")
    got = back(codec, special)
    assert np.isnan(got[0])
    assert got[1:5].tolist() == special[1:5].tolist()
    assert np.signbit(got).tolist()[2:5] == [True, False, True]
    assert np.isfinite(got[5])
    for finite in (3.4e38, -3.4e38):
        with pytest.raises(NotEncodable):
            back(codec, np.array([1.0, np.inf, finite], "float32"))
    with pytest.raises(NotEncodable):
        back(codec, array.astype("float16"))


def test_half_rounds_every_float16_and_what_lies_between_two_as_numpy_does() -> None:
    there = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype("float32")
    ties = (there[1:] + there[:-1]) / 2
    values = np.concatenate([there, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))])
    array = np.concatenate([values, -values])
    assert bytes(find_codec("half/1").encode(array, Encoding("half/1"))) == array.astype("<f2").tobytes()


@pytest.mark.parametrize("quality", [0.0, 0.25, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("signed", [False, True])
def test_sparse_below_full_quality_is_within_half_its_step(quality: float, signed: bool) -> None:
    array = feature_map(1, 16, 12, 12) * (relu(1, 16, 12, 12) > 1) if signed else relu(1, 16, 12, 12)
    levels = min(max(1, round(2 ** (8 * quality))), 127 if signed else 255)
    got = back("sparse/2", array, quality)
    assert np.abs(got - array).max() <= 0.5001 * np.abs(array).max() / levels


def test_more_quality_takes_more_bytes_and_errs_less() -> None:
    array = relu(1, 64, 14, 14)
    made = [encode_tensor(array, Encoding("sparse/2", q)) for q in (0.25, 0.5, 0.75, 1.0)]
    sizes = [p.nbytes for p in made]
    errors = [float(np.abs(back("sparse/2", array, q) - array).max()) for q in (0.25, 0.5, 0.75, 1.0)]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_zeros_cost_a_bit_each_at_most() -> None:
    array = relu(1, 32, 28, 28)
    array[array < 3] = 0
    there = np.count_nonzero(array)
    encoded = encode_tensor(array, Encoding("sparse/2"))
    assert encoded.nbytes < array.size / 8 + 4 * there
    assert encoded.nbytes < encode_tensor(array, Encoding("lossless/3")).nbytes


def test_side_tensors_become_small() -> None:
    sizes = {
        "mask": (np.ones((1, 512), "int64"), 300),
        "places": (np.arange(512, dtype="int64")[None], 600),
        "causal": (np.tri(128, dtype=bool), 200),
        "words": (np.random.default_rng(0).integers(0, 30_522, (1, 128)), 500),
    }
    for name, (array, most) in sizes.items():
        encoded = encode_tensor(array, Encoding("lossless/3"))
        assert isinstance(encoded, EncodedTensor), name
        assert encoded.nbytes < most, name


@pytest.mark.parametrize("codec", PLAIN)
def test_encode_tensor_returns_the_array_where_encoding_would_not_make_it_smaller(codec: str) -> None:
    for array in (np.zeros((0, 3), "float32"), np.array(2, "int8"), np.arange(2, dtype="float16")):
        given = np.asarray(array)
        assert encode_tensor(given, Encoding(codec)) is given
    assert isinstance(encode_tensor(relu(1, 8, 20, 20), Encoding(codec)), EncodedTensor)


def test_raw_and_unknown_codecs() -> None:
    array = relu(1, 8, 4, 4)
    assert encode_tensor(array, Encoding("raw")) is array
    with pytest.raises(KeyError):
        encode_tensor(array, Encoding("int9/1"))
    assert {codec for codec in CODEC_IDS if find_codec(codec).calibrated} == {"transform/4", "photo/1"}


def frame_of(array: Array, encoding: Encoding) -> bytes:
    encoded = find_codec(encoding.codec).encode(array, encoding)
    name = next(n for n, d in DTYPES.items() if d == array.dtype)
    return frames.encode(Frame({}, encoded={"x": EncodedTensor(encoding.codec, name, array.shape, encoded)}))


def test_a_frame_names_the_codecs_of_encoded_tensors() -> None:
    array, side = relu(1, 8, 10, 10), np.arange(9)
    encoded = encode_tensor(array, Encoding("int8/1"))
    assert isinstance(encoded, EncodedTensor)
    data = frames.encode(Frame({"side": side}, encoded={"x": encoded}))
    got = frames.decode(data, max_bytes=BOUND)
    assert got.codecs == {"x": "int8/1"}
    assert bits(got.tensors["x"]) == bits(back("int8/1", array))
    assert np.array_equal(got.tensors["side"], side)


@pytest.mark.parametrize("codec", ["int8/2", "int8", "", "transform/9", "../raw"])
def test_a_codec_of_another_version_is_refused_by_name(codec: str) -> None:
    data = frame_of(relu(1, 2, 3, 3), Encoding("int8/1")).replace(b'"int8/1"', f'"{codec}"'.encode().ljust(8), 1)
    with pytest.raises(FrameMalformed, match="has codec") as e:
        frames.decode(data, max_bytes=BOUND)
    assert e.value.facts["rule"] == "codec"
    assert repr(codec) in str(e.value)
