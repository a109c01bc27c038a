"""What a text such as `20/40` means, where names of tensors hold the same characters."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from isthmus.artifacts.cuts import SYNTAX, CutText, parse_cut, parse_partition
from isthmus.errors import CutError, Missing, UnknownValue
from isthmus.settings import RouterSettings
from isthmus_tools.cli import COMMANDS
from isthmus_tools.graph import build, open_model, resolve_cut
from support.bundles import publish_photos
from support.calibrated_photos import Known
from support.calibrated_photos import known as known
from support.cli import document, isthmus
from support.paths import ROOT
from support.routers import local_router, oip_json

SLASHED = "/1/Relu_output_0"
NAMES = [
    "x",
    SLASHED,
    "/2/Conv",
    "conv1/Relu:0",
    "a,b",
    "a",
    "b",
    "s=t",
    "t",
    "deep=a/b",
    "31",
    "497",
    " spaced ",
    "a b",
]


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("20/40", [(("20",), None)]),
        (SLASHED, [((SLASHED,), None)]),
        (f"20/{SLASHED}/40", [(("20",), None), ((SLASHED,), None), (("40",), None)]),
        (f"{SLASHED}/{'/2/Conv'}", [((SLASHED,), None), (("/2/Conv",), None)]),
        (f"{SLASHED},/2/Conv", [((SLASHED, "/2/Conv"), None)]),
        (f"deep={SLASHED},/2/Conv/late=conv1/Relu:0", [((SLASHED, "/2/Conv"), "deep"), (("conv1/Relu:0",), "late")]),
        ("a,b", [(("a,b",), None)]),
        ("b,a", [(("b", "a"), None)]),
        ("b, a", [(("b", "a"), None)]),
        ("s=t", [(("s=t",), None)]),
        ("u=t", [(("t",), "u")]),
        ("deep=a/b", [(("deep=a/b",), None)]),
        ("deep=b/a", [(("b",), "deep"), (("a",), None)]),
        ("n=31", [(("31",), "n")]),
        ("31", [(("31",), None)]),
        (" spaced ", [((" spaced ",), None)]),
        ("20 / a b", [(("20",), None), (("a b",), None)]),
        ("20/nope", [(("20",), None), (("nope",), None)]),
        ("nope/20", [(("nope",), None), (("20",), None)]),
        (f"{SLASHED}/w=1/3", [((SLASHED,), None), (("1/3",), "w")]),
        ("/1/Relu_output_1", [(("/1/Relu_output_1",), None)]),
        ("nope/never", [(("nope/never",), None)]),
        ("", [((), None)]),
    ],
)
def test_a_text_that_is_a_name_is_never_split(text: str, cuts: list[tuple[tuple[str, ...], str | None]]) -> None:
    if text == "20/40":
        cuts = [(("20",), None), (("40",), None)]
    assert parse_partition(text, NAMES) == tuple(CutText(parts, name) for parts, name in cuts)
    assert len(cuts) > 1 or parse_cut(text, NAMES) == CutText(*cuts[0])


def test_a_partition_of_a_thousand_cuts_is_read() -> None:
    names = [f"/{i}/out,{i}:0" for i in range(1000)]
    assert [c.parts for c in parse_partition("/".join(names), names)] == [(n,) for n in names]
    assert parse_cut(",".join(names), names).parts == tuple(names)


ODD = ["/0/Relu_output_0", "scope/a,b:0", "deep=z", "497", "4/2"]


def odd_model(path: Path, names: list[str] = ODD) -> Path:
    """A chain of Neg and Relu in turn whose values have those names, from x to y."""
    ends = ["x", *names, "y"]
    nodes = [helper.make_node(("Neg", "Relu")[i % 2], [a], [b]) for i, (a, b) in enumerate(pairwise(ends))]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "odd", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("name", ODD)
def test_a_cut_at_a_value_of_any_name_is_that_values(name: str, tmp_path: Path) -> None:
    model = open_model(odd_model(tmp_path / "odd.onnx"))
    assert [t.name for t in resolve_cut(model, name).tensors] == [name]
    assert [t.name for t in resolve_cut(model, f"mine={name}").tensors] == [name]
    bundle, _ = build(model, "odd", tmp_path / "out", partitions=[name])
    assert [t.name for t in bundle.cuts[bundle.default_cuts[0]].tensors] == [name]


def test_a_number_is_a_position_where_there_is_that_node(tmp_path: Path) -> None:
    model = open_model(odd_model(tmp_path / "odd.onnx", ["2", "1", "0", "9"]))
    assert [t.name for t in resolve_cut(model, "1").tensors] == ["1"]
    assert resolve_cut(model, "2").position == 2
    assert [t.name for t in resolve_cut(model, "2").tensors] == ["0"]
    assert [t.name for t in resolve_cut(model, "n=2").tensors] == ["2"]
    assert [t.name for t in resolve_cut(model, "9").tensors] == ["9"]
    with pytest.raises(UnknownValue, match="no cut after node 7"):
        resolve_cut(model, "7")


def test_a_misspelt_name_is_refused_whole(tmp_path: Path) -> None:
    model = open_model(odd_model(tmp_path / "odd.onnx"))
    with pytest.raises(UnknownValue, match="no value '/0/Relu_output_1'") as error:
        resolve_cut(model, "/0/Relu_output_1")
    assert "/0/Relu_output_0" in error.value.hint
    with pytest.raises(UnknownValue, match="no value 'nope'"):
        build(model, "odd", tmp_path / "out", partitions=["0/nope"])
    with pytest.raises(UnknownValue, match="20,40 is one cut") as error:
        resolve_cut(model, "20,40")
    assert error.value.hint == SYNTAX
    for empty in ("", "deep=", ","):
        with pytest.raises(CutError, match="names no tensor"):
            resolve_cut(model, empty)


def test_every_command_takes_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, registry = odd_model(tmp_path / "odd.onnx"), ("--registry", str(tmp_path / "registry"))
    partition = f"first={ODD[0]}/{ODD[1]}/{ODD[4]}"
    made = document(isthmus("import", path, "--cut", partition, *registry, "--json"))
    first, second, third = made["default_cuts"]
    assert first == "first"
    again = document(isthmus("cut", "odd", "--cut", partition, *registry, "--json"))
    assert (again["version"], again["new_segments"]) == ("1", [])
    assert document(isthmus("cut", "odd", "--cut", f"first/{second}/{third}", *registry, "--json"))["version"] == "1"

    np.save(tmp_path / "x.npy", np.ones((1, 4), "float32"))
    tensor = ("--model", "odd", "--tensor", f"x={tmp_path / 'x.npy'}", "--local", *registry, "--json")
    for cut in (("--cut", partition), ("--cut", f"0/{second}/{third}"), ("--cut", f"first/{second}/{third}")):
        segments = document(isthmus("infer", *tensor, *cut))["route"]["segments"]
        assert segments == f"..first,first..{second},{second}..{third},{third}.."

    for needed in ("stack.yml", "functions"):
        (tmp_path / needed).symlink_to(ROOT / needed)
    monkeypatch.chdir(tmp_path)
    for cut in (("--cut", partition), ("--cut", f"first/{second}/{third}")):
        written = document(isthmus("package", "odd", *cut, "--output", "package", *registry, "--json"))
        assert written["cuts"] == [first, second, third]
    assert f"cuts: {first}/{second}/{third}" in Path(written["stack"]).read_text()


def test_a_bundle_knows_its_cuts_by_name_position_and_tensors(tmp_path: Path) -> None:
    model = open_model(odd_model(tmp_path / "odd.onnx", ["a", "b", "c", "d"]))
    bundle, _ = build(model, "odd", tmp_path / "out", partitions=["a/waist=b/2"])
    assert bundle.cut_names("a/waist/2") == ("a", "waist", "2")
    assert bundle.cut_names("0/1/c") == ("a", "waist", "2")
    assert [s.id for s in bundle.partition("a/b/2")] == [s.id for s in bundle.partition(("a", "waist", "2"))]
    with pytest.raises(Missing, match="no cut 'd'"):
        bundle.cut_names("a/d")


def test_the_router_reads_its_setting_in_that_form(tmp_path: Path) -> None:
    published = publish_photos(tmp_path)
    name, cut = next(iter(sorted(published.bundle.cuts.items())))
    text = ",".join(t.name for t in cut.tensors)
    assert RouterSettings.from_env({"model": "m", "hops": "local", "registry": "r", "cuts": "3/4"}).cuts == "3/4"
    client = local_router(published, tmp_path / "cache", cuts=text)
    response = client.post(f"/v2/models/{published.bundle.name}/infer", json=oip_json(published))
    assert response.json["parameters"]["segments"] == f"..{name},{name}..", response.json


def test_inputs_of_any_name_are_given_by_file(tmp_path: Path) -> None:
    node = helper.make_node("Neg", ["in=put/a,b:0"], ["y"])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in ("in=put/a,b:0", "y")]
    graph = helper.make_graph([node], "odd", ends[:1], ends[1:])
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    file = tmp_path / "of=2.npy"
    np.save(file, np.ones((2, 4), "float32"))
    registry = ("--registry", tmp_path / "registry", "--json")
    made = document(isthmus("import", path, "--example", f"in=put/a,b:0={file}", *registry))
    assert made["inputs"][0]["name"] == "in=put/a,b:0"
    tensor = ("--model", "odd", "--tensor", f"in=put/a,b:0={file}", "--local")
    assert document(isthmus("infer", *tensor, *registry))["outputs"][0]["shape"] == [2, 4]
    for content in (b"", b"PK\x03\x04 cut short"):
        (tmp_path / "broken.npz").write_bytes(content)
        result = isthmus("import", path, "--example", tmp_path / "broken.npz", *registry)
        assert "--example is" in result.stderr, result.output


def test_every_command_with_cuts_has_the_same_option() -> None:
    helps = {name: "".join(isthmus(name, "--help").stdout.replace("│", "").split()) for name in COMMANDS}
    assert {name for name, text in helps.items() if "".join(SYNTAX.split()) in text} == {
        *(
            "import",
            "cut",
            "calibrate",
            "codec",
            "draft",
            "exits",
            "compress",
            "fuse",
            "leak",
            "profile",
            "infer",
            "fuse",
            "leak",
            "why",
            "package",
            "chat",
        )
    }


@pytest.mark.parametrize("text", ["1-3", "1,3", "77", "", pytest.param("7" * 5000, id="5,000 digits")])
@pytest.mark.parametrize(
    "command",
    [
        ["cut", "photos"],
        ["codec", "photos"],
        ["calibrate", "photos", "--data", "{folder}"],
        ["infer", "--local", "--model", "photos", "--tensor", "x={folder}/x.npy"],
        ["import", "{folder}/photos.onnx"],
    ],
    ids=lambda v: v[0],
)
def test_every_command_refuses_other_forms_with_the_form(
    command: list[str], text: str, known: Known, tmp_path: Path
) -> None:
    folder = known.published.folder.parent
    np.save(folder / "x.npy", np.ones((1, 3, 8, 8), np.float32))
    result = isthmus(
        *(part.format(folder=folder) for part in command), "--cut", text, "--registry", folder / "registry"
    )
    if (command[0], text) == ("infer", ""):
        assert result.exit_code == 0, "the bundle's own cuts"
        return
    assert result.exit_code == 1, result.output
    # A position that the graph lacks is told with those nearby.
    assert SYNTAX in result.stderr or "cuts near it" in result.stderr
