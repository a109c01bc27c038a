"""isthmus.oip.messages: against tritonclient in both directions, and against everything that is not the protocol."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import np_to_triton_dtype

from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import IsthmusError, RequestMalformed, RequestTooLarge, ShapeMismatch
from isthmus.oip import messages as oip
from isthmus.oip.messages import InferRequest, OutputRequest, build_response, parse_request

DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32"]
DTYPES += ["float64", "bfloat16"]
X = TensorSpec("x", "float32", ("batch", 2))
Y = TensorSpec("y", "int64", ("batch",))
OUT = TensorSpec("out", "float32", ("batch", 3))


def body(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def x(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.5, 2]} | changes


def parse(data: bytes, header: str | int | None = None, specs: tuple[TensorSpec, ...] = (X,)) -> InferRequest:
    return parse_request(data, header, inputs=specs, outputs=[OUT])


def one(datatype: str, dtype: str, data: list[Any]) -> np.ndarray:
    doc = {"name": "t", "shape": [len(data)], "datatype": datatype, "data": data}
    return parse(body(doc), specs=(TensorSpec("t", dtype, ("n",)),)).inputs["t"]


def values(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(7)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if "int" in dtype:
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
    return rng.normal(size=shape).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize(("dtype", "binary"), [(d, True) for d in DTYPES] + [(d, False) for d in DTYPES[:-1]])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (0, 4), (2, 1, 3)])
def test_what_tritonclient_sends_is_read(dtype: str, binary: bool, shape: tuple[int, ...]) -> None:
    array = values(dtype, shape)
    tensor = InferInput("t", list(shape), np_to_triton_dtype(array.dtype)).set_data_from_numpy(array, binary)
    wanted = [InferRequestedOutput("out", binary_data=binary)]
    data, length = InferenceServerClient.generate_request_body([tensor], outputs=wanted, request_id="r1")
    request = parse(data, length, (TensorSpec("t", dtype, tuple(f"d{i}" for i in range(len(shape)))),))
    np.testing.assert_array_equal(request.inputs["t"], array)
    assert request.inputs["t"].dtype == array.dtype
    assert (request.id, request.outputs) == ("r1", (OutputRequest("out", binary),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (0, 4), ()])
def test_what_is_answered_is_read_by_tritonclient(dtype: str, binary: bool, shape: tuple[int, ...]) -> None:
    array = values(dtype, shape)
    request = InferRequest({}, (OutputRequest("a", binary), OutputRequest("b", True)), id="r1")
    response = build_response(
        {"b": array, "a": array}, request, model_name="m", model_version="3", parameters={"cut": "31"}
    )
    assert response.headers[oip.HEADER_LENGTH] == str(response.header_length)
    result = InferenceServerClient.parse_response_body(response.body, header_length=response.header_length)
    for name in ("a", "b"):
        np.testing.assert_array_equal(result.as_numpy(name), array)
    doc = result.get_response()
    assert (doc["model_name"], doc["model_version"], doc["id"], doc["parameters"]) == ("m", "3", "r1", {"cut": "31"})
    assert [o["name"] for o in doc["outputs"]] == ["a", "b"]


def test_a_response_of_json_alone_has_no_header_length() -> None:
    response = build_response(
        {"out": np.zeros((1, 3), np.float32)},
        InferRequest({}, (OutputRequest("out"),)),
        model_name="m",
        model_version="1",
    )
    assert response.headers == {"Content-Type": "application/json"}
    assert json.loads(response.body) == {
        "model_name": "m",
        "model_version": "1",
        "outputs": [{"name": "out", "shape": [1, 3], "datatype": "FP32", "data": [0, 0, 0]}],
    }


def test_binary_and_json_inputs_mix_in_any_order() -> None:
    first = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    second = {"name": "y", "shape": [1], "datatype": "INT64", "data": [-5]}
    payload = np.array([[1, 2]], np.float32).tobytes()
    for tensors in ([first, second], [second, first]):
        head = body(*tensors)
        request = parse(head + payload, str(len(head)), (X, Y))
        assert request.inputs["x"].tolist() == [[1, 2]]
        assert request.inputs["y"].tolist() == [-5]


def test_binary_data_is_a_view_of_the_body() -> None:
    head = body({"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}})
    data = bytearray(head + bytes(8))
    array = parse(data, len(head)).inputs["x"]
    data[-4:] = np.float32(2).tobytes()
    assert array.tolist() == [[0, 2]]


def test_nested_data_is_read_like_flat_data() -> None:
    spec = TensorSpec("x", "float32", (2, 1, 2))
    for data in ([1, 2, 3, 4], [[[1, 2]], [[3, 4]]]):
        request = parse(body(x(shape=[2, 1, 2], data=data)), specs=(spec,))
        assert request.inputs["x"].tolist() == [[[1, 2]], [[3, 4]]]


@pytest.mark.parametrize(
    "data", [[[1, 2], [3, 4]], [[[1], [2]], [[3], [4]]], [[[1, 2]], [3, 4]], [[[1, 2]]], [[[1, 2]], [[3]]], [[], []]]
)
def test_data_nested_otherwise_than_its_shape_is_malformed(data: list[Any]) -> None:
    with pytest.raises(RequestMalformed, match="nested otherwise"):
        parse(body(x(shape=[2, 1, 2], data=data)), specs=(TensorSpec("x", "float32", (2, 1, 2)),))


def test_data_nested_deeper_than_its_shape_is_malformed() -> None:
    with pytest.raises(RequestMalformed, match="element 0 of 'x' is a list"):
        parse(body(x(data=[[[1], [2]]])))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_elements_is_malformed(count: int) -> None:
    with pytest.raises(RequestMalformed) as e:
        parse(body(x(data=[0] * count)))
    assert (e.value.facts["expected"], e.value.facts["got"]) == (2, count)


@pytest.mark.parametrize(
    ("datatype", "dtype", "bad"),
    [
        ("INT8", "int8", 128),
        ("UINT8", "uint8", -1),
        ("INT64", "int64", 2**63),
        ("UINT64", "uint64", 2**64),
        ("UINT64", "uint64", -1),
        ("FP16", "float16", 65520),
        ("FP32", "float32", 3.5e38),
        ("FP64", "float64", 10**400),
        ("INT32", "int32", 10**400),
        ("INT32", "int32", 1.0),
        ("INT32", "int32", True),
        ("INT32", "int32", "1"),
        ("FP32", "float32", "1"),
        ("FP32", "float32", None),
        ("FP32", "float32", True),
        ("FP32", "float32", {}),
        ("BOOL", "bool", 1),
    ],
)
def test_an_element_that_is_not_of_the_datatype_is_named(datatype: str, dtype: str, bad: Any) -> None:
    good: Any = True if dtype == "bool" else 1
    with pytest.raises(RequestMalformed, match="element 1 of 't'") as e:
        one(datatype, dtype, [good, bad, good])
    assert e.value.facts == {"tensor": "t", "element": 1, "expected": datatype}


def test_the_ends_of_each_range_are_read() -> None:
    assert one("UINT64", "uint64", [2**64 - 1]).tolist() == [2**64 - 1]
    assert one("INT64", "int64", [-(2**63), 2**63 - 1]).tolist() == [-(2**63), 2**63 - 1]
    assert one("FP16", "float16", [65504]).tolist() == [65504]
    assert one("FP64", "float64", [1e308, 5e-324]).tolist() == [1e308, 5e-324]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_lacks_are_malformed(number: str) -> None:
    with pytest.raises(RequestMalformed, match=f"{number} is not JSON") as e:
        parse(body(x()).replace(b"1.5", number.encode()))
    assert "go in binary tensors" in e.value.hint


def test_a_number_beyond_float64_is_out_of_range() -> None:
    with pytest.raises(RequestMalformed, match="element 0 of 'x' is out of range"):
        parse(body(x()).replace(b"1.5", b"1e999"))


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"\xff", b"{", b"{}", b'{"inputs": {}}', b"[" * 10**6, b"1" * 9999]
)
def test_what_is_no_request_is_malformed(data: bytes) -> None:
    with pytest.raises(RequestMalformed):
        parse(data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": None}, "with a name"),
        ({"shape": None}, "no shape"),
        ({"shape": [1, -1]}, "no shape"),
        ({"shape": [1, 2.0]}, "no shape"),
        ({"shape": [True, 2]}, "no shape"),
        ({"datatype": "BYTES"}, "BYTES tensors are not offered"),
        ({"datatype": "float32"}, "no known datatype"),
        ({"datatype": ["FP32"]}, "no known datatype"),
        ({"data": None}, "no list of data"),
        ({"data": "1,2"}, "no list of data"),
        ({"parameters": []}, "not an object"),
        ({"parameters": {"shared_memory_region": "r"}}, "shared memory"),
        ({"parameters": {"binary_data_size": 8}}, "both data and binary"),
    ],
)
def test_an_input_that_is_not_the_protocols_is_malformed(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestMalformed, match=words):
        parse(body(x(**changes)))
    assert isinstance(parse(body(x())), InferRequest)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"datatype": "FP64"}, "x FP64 [1,2]"),
        ({"shape": [1, 3]}, "x FP32 [1,3]"),
        ({"shape": [2]}, "x FP32 [2]"),
        ({"shape": [1, 1, 2]}, "x FP32 [1,1,2]"),
        ({"shape": []}, "x FP32 []"),
    ],
)
def test_an_input_of_another_type_or_shape_names_both(changes: dict[str, Any], got: str) -> None:
    with pytest.raises(ShapeMismatch) as e:
        parse(body(x(**changes)))
    assert e.value.facts == {"tensor": "x", "expected": "x FP32 [batch,2]", "got": got}


def test_an_unknown_input_names_those_there_are() -> None:
    with pytest.raises(ShapeMismatch, match="it has 'x'") as e:
        parse(body(x(), x(name="z")))
    assert e.value.facts == {"tensor": "z", "expected": ["x FP32 [batch,2]"], "got": "z"}


def test_missing_inputs_are_named() -> None:
    with pytest.raises(ShapeMismatch, match="'y' is missing") as e:
        parse(body(x()), specs=(X, Y))
    assert e.value.facts["missing"] == ["y"]
    with pytest.raises(ShapeMismatch, match="'x' is missing"):
        parse(body())


def test_an_input_that_comes_twice_is_malformed() -> None:
    with pytest.raises(RequestMalformed, match="twice"):
        parse(body(x(), x()))


def test_a_free_dimension_is_the_same_in_all_inputs() -> None:
    y = {"name": "y", "shape": [3], "datatype": "INT64", "data": [1, 2, 3]}
    assert parse(body(x(shape=[3, 2], data=[0] * 6), y), specs=(X, Y)).inputs["y"].tolist() == [1, 2, 3]
    with pytest.raises(ShapeMismatch, match="batch is 3 in the input 'y' and 1 in 'x'"):
        parse(body(x(), y), specs=(X, Y))


@pytest.mark.parametrize("shape", [[0, 2**62], [0, 2**62, 2**62], [2**62, 2**62]])
def test_a_shape_beyond_all_bounds_is_malformed(shape: list[int]) -> None:
    spec = TensorSpec("x", "float32", tuple(f"d{i}" for i in range(len(shape))))
    with pytest.raises(RequestMalformed, match="bounds"):
        parse(body(x(shape=shape, data=[])), specs=(spec,))


def binary_request(size: Any, payload: bytes, **more: Any) -> tuple[bytes, int]:
    head = body({"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": size}} | more)
    return head + payload, len(head)


@pytest.mark.parametrize(
    ("size", "length", "words"),
    [
        (8, 7, "ends 1 bytes before"),
        (8, 9, "9 bytes follow the JSON"),
        (7, 7, "takes 8 bytes"),
        (8.0, 8, "takes 8 bytes"),
        (-8, 8, "takes 8 bytes"),
        (True, 8, "takes 8 bytes"),
        (None, 8, "no list of data"),
        (10**300, 8, "takes 8 bytes"),
    ],
)
def test_binary_lengths_that_disagree_are_malformed(size: Any, length: int, words: str) -> None:
    data, head = binary_request(size, bytes(length))
    with pytest.raises(RequestMalformed, match=words):
        parse(data, head)


@pytest.mark.parametrize("header", ["", "x", "-1", "0", "1e3", "٣", "9" * 30, 10**9, "12.0"])
def test_a_header_length_that_is_none_is_malformed(header: Any) -> None:
    data, _ = binary_request(8, bytes(8))
    with pytest.raises(RequestMalformed) as e:
        parse(data, header)
    assert e.value.facts["header"] == oip.HEADER_LENGTH


def test_binary_data_without_the_header_names_it() -> None:
    data, _ = binary_request(8, b"")
    with pytest.raises(RequestMalformed, match="no header Inference-Header-Content-Length"):
        parse(data)


def test_trailing_bytes_are_malformed() -> None:
    head = body(x())
    assert parse(head, len(head)).inputs["x"].tolist() == [[1.5, 2]]
    with pytest.raises(RequestMalformed, match="1 bytes follow"):
        parse(head + b"\0", len(head))


def test_a_binary_bool_is_zero_or_one() -> None:
    spec = TensorSpec("x", "bool", (1, 2))
    data, head = binary_request(2, b"\0\1", datatype="BOOL")
    assert parse(data, head, (spec,)).inputs["x"].tolist() == [[False, True]]
    with pytest.raises(RequestMalformed, match="neither 0 nor 1"):
        parse(data[:-1] + b"\2", head, (spec,))


def test_bf16_as_json_is_refused() -> None:
    with pytest.raises(RequestMalformed, match="binary data only"):
        one("BF16", "bfloat16", [1.0])


def test_a_json_part_over_the_limit_is_not_parsed() -> None:
    with pytest.raises(RequestTooLarge) as e:
        parse_request(b"x" * 101, None, inputs=[X], outputs=[OUT], max_json_bytes=100)
    assert e.value.facts == {"limit": 100, "bytes": 101}


def test_outputs_default_to_all_as_the_request_says() -> None:
    outputs = [OUT, TensorSpec("more", "float32", ())]

    def wanted(**request: Any) -> tuple[OutputRequest, ...]:
        return parse_request(body(x(), **request), None, inputs=[X], outputs=outputs).outputs

    assert wanted() == wanted(outputs=[]) == (OutputRequest("out"), OutputRequest("more"))
    assert wanted(parameters={"binary_data_output": True}) == (
        OutputRequest("out", True),
        OutputRequest("more", True),
    )
    asked = [{"name": "more", "parameters": {"binary_data": False}}, {"name": "out"}]
    assert wanted(outputs=asked, parameters={"binary_data_output": True}) == (
        OutputRequest("more", False),
        OutputRequest("out", True),
    )


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ({"outputs": {}}, RequestMalformed, "not a list"),
        ({"outputs": ["out"]}, RequestMalformed, "with a name"),
        ({"outputs": [{"name": "z"}]}, ShapeMismatch, "it has 'out'"),
        ({"outputs": [{"name": "out"}] * 2}, RequestMalformed, "twice"),
        ({"outputs": [{"name": "out", "parameters": {"binary_data": 1}}]}, RequestMalformed, "true or false"),
        ({"outputs": [{"name": "out", "parameters": {"classification": 3}}]}, RequestMalformed, "classification"),
        ({"outputs": [{"name": "out", "parameters": {"shared_memory_region": "r"}}]}, RequestMalformed, "shared"),
        ({"parameters": {"binary_data_output": "yes"}}, RequestMalformed, "true or false"),
        ({"parameters": {"sequence_id": 7}}, RequestMalformed, "no state"),
        ({"parameters": []}, RequestMalformed, "not an object"),
        ({"id": 7}, RequestMalformed, "id is not a string"),
        ({"id": "i" * 257}, RequestMalformed, "id is not a string"),
    ],
)
def test_a_request_that_asks_for_what_is_not_offered_is_refused(
    request_: dict[str, Any], error: type[IsthmusError], words: str
) -> None:
    with pytest.raises(error, match=words):
        parse(body(x(), **request_))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_output_that_json_cannot_say_points_to_binary(bad: float) -> None:
    array = np.array([bad], np.float32)
    with pytest.raises(RequestMalformed, match="'out' holds NaN or infinity") as e:
        build_response({"out": array}, InferRequest({}, (OutputRequest("out"),)), model_name="m", model_version="1")
    assert "binary_data_output" in e.value.hint
    response = build_response(
        {"out": array}, InferRequest({}, (OutputRequest("out", True),)), model_name="m", model_version="1"
    )
    result = InferenceServerClient.parse_response_body(response.body, header_length=response.header_length)
    np.testing.assert_array_equal(result.as_numpy("out"), array)


def test_an_output_that_the_model_did_not_give_is_named() -> None:
    with pytest.raises(ShapeMismatch, match="no output 'out'"):
        build_response({}, InferRequest({}, (OutputRequest("out"),)), model_name="m", model_version="1")


def test_metadata_is_the_protocols() -> None:
    assert oip.server_metadata("isthmus", "0.1") == {
        "name": "isthmus",
        "version": "0.1",
        "extensions": ["binary_tensor_data"],
    }
    assert oip.model_metadata("m", ["1", "2"], [X, Y], [OUT]) == {
        "name": "m",
        "versions": ["1", "2"],
        "platform": "onnx_onnxv1",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "y", "datatype": "INT64", "shape": [-1]},
        ],
        "outputs": [{"name": "out", "datatype": "FP32", "shape": [-1, 3]}],
    }
    with pytest.raises(ShapeMismatch, match="no datatype for complex64"):
        oip.model_metadata("m", [], [TensorSpec("c", "complex64", ())], [])


@settings(deadline=None)
@given(st.data(), st.sampled_from(DTYPES[:-1]))
def test_json_and_binary_forms_give_the_same_array(data: st.DataObject, dtype: str) -> None:
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.startswith("float") else {}
    array = data.draw(
        hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4), elements=elements)
    )
    spec = TensorSpec("t", dtype, tuple(f"d{i}" for i in range(array.ndim)))
    common = {"name": "t", "shape": list(array.shape), "datatype": np_to_triton_dtype(array.dtype)}
    forms = [body(common | {"data": array.ravel().tolist()})]
    if array.ndim:
        forms.append(body(common | {"data": array.tolist()}))
    head = body(common | {"parameters": {"binary_data_size": array.nbytes}})
    got = [parse(form, None, (spec,)).inputs["t"] for form in forms]
    got.append(parse(head + array.tobytes(), len(head), (spec,)).inputs["t"])
    for other in got:
        assert other.dtype == array.dtype
        np.testing.assert_array_equal(other, array, strict=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["name", "shape", "datatype", "data", "parameters", "inputs", "outputs", "id"]


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=2),
    st.dictionaries(st.sampled_from(KEYS[-4:]), JSON, max_size=1),
    st.none() | st.integers(-2, 300) | st.text(max_size=3),
    st.binary(max_size=16),
)
def test_a_request_of_mutated_json_is_read_or_refused(
    changes: dict[str, Any], more: dict[str, Any], header: Any, tail: bytes
) -> None:
    try:
        parse(body(x(**changes), **{k: v for k, v in more.items() if k != "inputs"}) + tail, header)
    except IsthmusError as e:
        json.dumps(e.facts, allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=6), st.integers(-9, 9))
def test_a_request_of_mutated_bytes_is_read_or_refused(flips: list[tuple[int, int]], shift: int) -> None:
    whole, length = binary_request(8, bytes(8))
    data = bytearray(whole)
    for at, value in flips:
        data[at % len(data)] = value
    try:
        request = parse(bytes(data), length + shift)
    except IsthmusError as e:
        json.dumps(e.facts, allow_nan=False)
    else:
        assert request.inputs["x"].shape[1] == 2


NOTHING = {
    "id": {"id": None},
    "parameters": {"parameters": None},
    "outputs": {"outputs": None},
    "a parameter": {"parameters": {"binary_data_output": None, "sequence_id": None, "classification": None}},
    "an output's parameters": {"outputs": [{"name": "out", "parameters": None}]},
    "an output's parameter": {
        "outputs": [
            {
                "name": "out",
                "parameters": {"binary_data": None, "classification": None, "shared_memory_region": None},
            }
        ]
    },
}


@pytest.mark.parametrize("case", NOTHING)
def test_null_for_an_optional_field_is_as_good_as_leaving_it_out(case: str) -> None:
    expected, found = parse(body(x())), parse(body(x(), **NOTHING[case]))
    np.testing.assert_array_equal(found.inputs["x"], expected.inputs["x"])
    assert (found.id, found.outputs) == (expected.id, expected.outputs)


@pytest.mark.parametrize(
    "parameters", [None, {"binary_data_size": None}, {"shared_memory_region": None, "shared_memory_offset": None}]
)
def test_null_for_an_inputs_parameter_is_as_good_as_leaving_it_out(parameters: Any) -> None:
    assert parse(body(x(parameters=parameters))).inputs["x"].tolist() == [[1.5, 2.0]]


def test_null_data_beside_binary_data_is_none() -> None:
    text = body(x(data=None, parameters={"binary_data_size": 8}))
    array = parse(text + np.float32([3, 4]).tobytes(), len(text)).inputs["x"]
    assert array.tolist() == [[3.0, 4.0]]


def test_a_parameter_of_null_takes_the_requests_default() -> None:
    asked = [{"name": "out", "parameters": {"binary_data": None}}]
    request = parse(body(x(), outputs=asked, parameters={"binary_data_output": True}))
    assert request.outputs == (OutputRequest("out", True),)


@pytest.mark.parametrize("field", ["name", "shape", "datatype", "data"])
def test_null_for_what_is_needed_is_refused_as_leaving_it_out_is(field: str) -> None:
    absent = x()
    del absent[field]
    messages = []
    for tensor in (absent, x(**{field: None})):
        with pytest.raises(RequestMalformed) as e:
            parse(body(tensor))
        messages.append(e.value.message)
    assert messages[0] == messages[1]


def test_a_byte_order_mark_before_the_json_is_no_part_of_it() -> None:
    assert parse(b"\xef\xbb\xbf" + body(x())).inputs["x"].tolist() == parse(body(x())).inputs["x"].tolist()


@pytest.mark.parametrize(
    ("number", "said"), [("9" * 5000, "a number of thousands of digits"), ("[" * 10**5, "too deep in each other")]
)
def test_what_python_cannot_parse_is_told_in_the_callers_words(number: str, said: str) -> None:
    with pytest.raises(RequestMalformed, match=said):
        parse(b'{"inputs": ' + number.encode())
