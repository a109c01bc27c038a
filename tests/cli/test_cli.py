"""The command: what it prints for people and programs, and what it says about wrong input."""

from __future__ import annotations

import errno
import inspect
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper

from isthmus.arrays import restore_bfloat16
from isthmus_tools import cli
from isthmus_tools.cli.console import errors, print_json
from isthmus_tools.printable import printable
from support.cli import document, isthmus
from support.paths import ROOT

COMMANDS = [
    "import",
    "train",
    "train-tail",
    "federate",
    "cuts",
    "cut",
    "models",
    "show",
    "publish",
    "versions",
    "promote",
    "diff",
    "pull",
    "verify",
    "audit",
    "canary",
    "key",
    "sign",
    "redact",
    "caller",
    "rollback",
    "rm",
    "gc",
    "encrypt",
    "grant",
    "revoke",
    "chat",
    "infer",
    "why",
    "up",
    "trigger",
    "package",
    "demo",
    "doctor",
    "send",
    "top",
    "link",
    "calibrate",
    "codec",
    "leak",
    "draft",
    "exits",
    "compress",
    "fuse",
    "profile",
    "plan",
    "explain",
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """x (batch, 8) → layers of 8 × 64, 64 × 4, 4 × 64 and 64 × 3, a ReLU after each; the narrowest cut is 2."""
    rng = np.random.default_rng(0)
    nodes, values, last = [], [], "x"
    for i, (n, m) in enumerate([(8, 64), (64, 4), (4, 64), (64, 3)]):
        values.append(numpy_helper.from_array(rng.normal(size=(n, m)).astype("float32"), f"w{i}"))
        nodes += [
            helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]),
            helper.make_node("Relu", [f"m{i}"], [last := f"r{i}"]),
        ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", 3])],
        values,
    )
    path = tmp_path / "Small Net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def registry(tmp_path: Path, model: Path) -> Path:
    folder = tmp_path / "registry"
    made = document(isthmus("import", model, "--shape", "x=1x8", "--registry", folder, "--json"))
    assert (made["name"], made["version"]) == ("small-net", "1")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(command: str) -> None:
    result = isthmus(command, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.stdout
    assert f"isthmus {command}" in result.stdout


HEAVY = (
    *("aiohttp", "boto3", "flask", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "PIL", "scipy", "torch"),
    *("sklearn", "tensorflow", "werkzeug", "yaml"),
)


@pytest.mark.parametrize(
    ("calls", "unwanted"),
    [
        ([["--version"], ["--help"], ["nosuch"]], (*HEAVY, "numpy", "rich.progress", "isthmus.registry")),
        ([[command, "--help"] for command in COMMANDS], (*HEAVY, "numpy", "rich.progress", "isthmus.registry")),
        ([["demo", "--list"]], HEAVY),
        (
            [
                ["models"],
                ["models", "--json"],
                ["show", "small-net"],
                ["versions", "small-net"],
                ["rollback", "small-net"],
                ["rm", "small-net:1"],
            ],
            (*HEAVY, "numpy", "rich.progress"),
        ),
        ([["explain", "small-net"], ["codec", "small-net"], ["up", "--model", "nosuch"]], ("onnx", "onnx_ir", "torch")),
    ],
    ids=["no command", "help", "photos", "versions", "documents"],
)
def test_a_call_imports_only_what_it_needs(
    calls: list[list[str]], unwanted: tuple[str, ...], registry: Path, tmp_path: Path
) -> None:
    """What takes a command past a quarter of a second: numpy alone takes 40 ms."""
    script = f"""
import sys
from isthmus_tools import cli
from isthmus_tools.cli import app
for call in {calls!r}:
    try:
        app(call)
    except SystemExit:
        pass
print(",".join(sorted(set(sys.modules) & set({unwanted!r}))))
"""
    environment = {**os.environ, "ISTHMUS_REGISTRY": str(registry)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == ""


def test_the_list_of_commands_says_what_each_says_itself() -> None:
    assert set(cli.COMMANDS) == set(COMMANDS)
    for name, said in cli.COMMANDS.items():
        assert inspect.getdoc(cli.load(name)).split("\n\n")[0].replace("\n", " ") == said  # type: ignore[union-attr]


def test_the_version_is_the_packages() -> None:
    assert isthmus("--version").stdout.startswith("isthmus 0.")


def test_cuts_lists_what_crosses(model: Path) -> None:
    found = document(isthmus("cuts", model, "--shape", "x=1x8", "--json"))
    assert found["macs"] == 8 * 64 + 64 * 4 + 4 * 64 + 64 * 3
    narrow = next(c for c in found["cuts"] if c["name"] == "3")
    assert narrow["tensors"] == [{"name": "r1", "dtype": "float32", "shape": ["batch", 4]}]
    assert narrow["bytes"] == 16
    assert narrow["macs_before"] == pytest.approx((8 * 64 + 64 * 4) / found["macs"])
    text = isthmus("cuts", model, "--shape", "x=1x8").stdout
    assert "r1 float32[batch, 4]" in text


def test_cuts_shows_the_ten_best_and_marks_the_default(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", [f"r{i}" if i else "x"], [f"r{i + 1}"]) for i in range(30)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("x", "r30")]
    path = tmp_path / "deep.onnx"
    graph = helper.make_graph(nodes, "deep", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    rows = [line for line in isthmus("cuts", path).stdout.splitlines() if line.startswith("│")]
    assert len(rows) == 10
    best = document(isthmus("cuts", path, "--json"))
    assert len(best["best"]) == 10
    assert [row for row in rows if f"→ {best['default']} " in row] == [row for row in rows if "→" in row]
    every = [line for line in isthmus("cuts", path, "--all").stdout.splitlines() if line.startswith("│")]
    assert len(every) == len(best["cuts"]) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_by_h(command: str) -> None:
    assert isthmus(command, "-h").stdout == isthmus(command, "--help").stdout != ""


def test_cuts_draws_a_picture(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "cuts.png"
    assert isthmus("cuts", model, "--shape", "x=1x8", "--picture", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_cut_adds_a_version_and_no_weights(registry: Path) -> None:
    weights = sum(f.stat().st_size for f in registry.rglob("*") if f.is_file())
    made = document(isthmus("cut", "small-net", "--cut", "1/3", "--default", "--registry", registry, "--json"))
    assert made["version"] == "2"
    assert made["default_cuts"] == ["1", "3"]
    assert set(made["new_segments"]) <= {"..1", "1..3", "3.."}
    assert made["new_bytes"] < 10_000
    assert sum(f.stat().st_size for f in registry.rglob("*") if f.is_file()) - weights < 20_000
    again = document(isthmus("cut", "small-net", "--cut", "1/3", "--default", "--registry", registry, "--json"))
    assert again["version"] == "2"
    listed = document(isthmus("versions", "small-net", "--registry", registry, "--json"))
    assert [(v["version"], v["ran"]) for v in listed["versions"]] == [("1", True), ("2", True)]


def test_a_cut_by_tensors_can_be_named_and_made_the_default(registry: Path) -> None:
    made = document(isthmus("cut", "small-net", "--cut", "waist=r1", "--default", "--registry", registry, "--json"))
    assert made["default_cuts"] == ["waist"]
    assert "..waist" in made["new_segments"]
    unnamed = document(isthmus("cut", "small-net", "--cut", "r0", "--default", "--registry", registry, "--json"))
    assert len(unnamed["default_cuts"]) == 1
    assert f"..{unnamed['default_cuts'][0]}" in unnamed["new_segments"]


def test_tensors_go_through_a_bundle_in_this_process(registry: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 8), "float32"))
    whole, parted = tmp_path / "whole.npz", tmp_path / "parted.npz"
    common = ["--model", "small-net", "--tensor", f"x={tmp_path / 'x.npy'}", "--local", "--registry", registry]
    assert isthmus("infer", *common, "--cut", "..", "--output", whole).exit_code == 0
    facts = document(isthmus("infer", *common, "--output", parted, "--json"))
    assert facts["outputs"][0]["shape"] == [2, 3]
    assert facts["route"]["segments"] == "..2,2.."
    assert (facts["route"]["link_bytes"], facts["route"]["link_raw_bytes"]) == (0, 0), "nothing leaves this process"
    assert np.allclose(np.load(whole)["r3"], np.load(parted)["r3"], rtol=1e-5)


def test_a_model_without_inputs_runs_without_tensors(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])
    nodes = [helper.make_node("RandomNormal", [], ["a"], shape=[2, 3]), helper.make_node("Neg", ["a"], ["y"])]
    graph = helper.make_graph(nodes, "g", [], [value])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    common = ("--registry", tmp_path / "registry", "--json")
    document(isthmus("import", tmp_path / "m.onnx", *common))
    assert document(isthmus("infer", "--model", "m", "--local", *common))["outputs"][0]["shape"] == [2, 3]


PUBLISHING = (
    ["import", "{tmp}/none.onnx"],
    ["cut", "nobody", "--cut", "1"],
    ["calibrate", "nobody", "--data", "{tmp}/none"],
    ["plan", "nobody", "--prices", "{tmp}/none.toml"],
)
"""What is wrong with the alias is told before anything else is looked at: the rest may take minutes."""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import", "{tmp}/none.onnx"], "none.onnx"),
        (["import", "{tmp}/text.onnx"], "text.onnx"),
        (["import", "no.such.module:factory"], "no.such.module"),
        (["import", "{model}", "--name", "No Name"], "No Name"),
        (["import", "{model}", "--shape", "x=wide"], "does not fit"),
        (["import", "{model}", "--shape", "x=1x-8"], "NAME=1x3x320x640"),
        (["import", "{model}", "--cut", "r9"], "r9"),
        (["import", "{model}", "--preprocess", "{tmp}/text.onnx"], "JSON"),
        (["import", "{model}", "--preprocess", "{tmp}/deep.json"], "JSON"),
        (["import", "{model}", "--preprocess", "{tmp}/none.json"], "cannot be read: No such file"),
        (["import", "{model}", "--labels", "{tmp}/deep.json"], "JSON"),
        (["import", "{model}", "--example", "x={tmp}/text.onnx"], "another kind of file"),
        (["import", "{model}", "--registry", "{tmp}/text.onnx"], "is a file; a registry is a folder"),
        (["models", "--registry", "{tmp}/text.onnx/in"], "is a file; a registry is a folder"),
        (["cuts", "{model}", "--shape", "x=99999999999x8"], "a dimension is at most"),
        (["link", "--to", "127.0.0.1:1", "--script", "{tmp}/deep.json"], "nested too deep"),
        (["cut", "small-net", "--cut", "r9"], "r9"),
        (["cut", "small-net", "--cut", "3/1"], "after"),
        (["cut", "small-net:7", "--cut", "1"], "there is: 1"),
        (["cut", "nobody", "--cut", "1"], "there is: small-net"),
        (["cuts", "{tmp}/text.onnx"], "text.onnx"),
        (["infer"], "photos"),
        (["infer", "{tmp}/none.jpg", "--local"], "none.jpg"),
        (["infer", "--tensor", "x=1", "--model", "small-net", "--local"], "npy"),
        (["infer", "--tensor", "x", "--model", "small-net", "--local"], "NAME=FILE.npy"),
        (["infer", "--tensor", "x=", "--model", "small-net", "--local"], "NAME=FILE.npy"),
        (["infer", "--tensor", "x={tmp}/text.onnx", "--model", "small-net", "--local"], "another kind of file"),
        (["infer", "{tmp}/text.onnx", "--url", "http://[::1"], "no URL"),
        (["infer", "{tmp}/text.onnx", "--url", "http://127.0.0.1:99999/function/router"], "no URL"),
        (["infer", "{tmp}/text.onnx", "--url", "nowhere"], "no URL"),
        (["profile", "small-net", "--head", "http://127.0.0.1:99999/", "--token-file", "{tmp}/word"], "no URL"),
        (["infer", "--model", "small-net", "--local"], "missing x"),
        (["infer", "--local"], "name photos"),
        (["package", "small-net", "--stack", "{tmp}/text.onnx"], "stack"),
        (["package", "small-net", "--cut", "77"], "there is: 2"),
        (["package", "small-net", "--stack", "{model}"], "cannot read"),
        (["package", "small-net", "--stack", "{tmp}/deep.json"], "not YAML"),
        (["package", "small-net", "--stack", "{tmp}/list.yml"], "must be a mapping"),
        (["package", "small-net", "--stack", "{tmp}/far.yml"], "nowhere/edge-head/requirements.txt"),
        (["demo", "{tmp}/none.jpg"], "none.jpg cannot be read"),
        (["demo", "--stack", "{tmp}/none.yml"], "none.yml"),
        *(([command, "nobody", "--local"], "there is: small-net") for command in ("plan", "profile")),
        *(
            ([command, "small-net", "--local", "--input", "{tmp}/none.jpg"], "none.jpg")
            for command in ("plan", "profile")
        ),
        *(([command, "small-net", "--local", "--time-limit", "x"], "--time-limit") for command in ("plan", "profile")),
        (["plan", "small-net", "--max-disagreement", "2"], "a share is at most 1"),
        *(([*call, "--alias", "7"], "cannot be an alias") for call in PUBLISHING),
        (["models", "--registry", "ftp://somewhere"], "s3://"),
        (["up", "--stack", "{tmp}/none.yml"], "none.yml"),
        (["up", "--edge-slowdown", "100"], "at most 64"),
        (["up", "--replicas", "many"], "NAME=N"),
        (["up", "--replicas", "router=²"], "NAME=N"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_input_gets_a_sentence_and_no_trace(
    arguments: list[str], said: str, model: Path, registry: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.onnx").write_text("this is a text")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "word").write_text("token")
    (tmp_path / "list.yml").write_text("provider: {name: openfaas}\nfunctions: [router, edge-head, cloud-tail]\n")
    stack = (ROOT / "stack.yml").read_text()
    (tmp_path / "far.yml").write_text(stack.replace("./functions/edge-head", "./nowhere/edge-head"))
    filled = [a.format(tmp=tmp_path, model=model) for a in arguments]
    if "--registry" not in filled:
        filled += ["--registry", str(registry)] * (filled[0] not in ("cuts", "link"))
    result = isthmus(*filled)
    assert result.exit_code == 1, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_a_name_that_is_no_text_is_shown_escaped_and_imported(model: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9.onnx"
    Path(os.fsdecode(odd)).write_bytes(model.read_bytes())
    for call in ([b"cuts", odd], [b"import", odd, b"--registry", os.fsencode(tmp_path / "made")]):
        done = subprocess.run(
            [sys.executable, "-c", "from isthmus_tools.cli import main; main()", *call, b"--json"],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            check=True,
        )
        assert json.loads(done.stdout.decode("utf-8"))
    assert [m["name"] for m in document(isthmus("models", "--registry", tmp_path / "made", "--json"))] == ["caf"]


STRANGERS = {
    "no JSON": b"<html>",
    "a list": b"[]",
    "too deep": b"[" * 100_000,
    "another document": b'{"outputs": [{"name": 1}], "classes": 3}',
    "a size that is none": b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "parameters":'
    b' {"binary_data_size": 3}}]}',
}


@pytest.mark.parametrize("body", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_server_that_is_no_router_is_told_as_that(body: bytes, model: Path, tmp_path: Path) -> None:
    class Stranger(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    np.save(tmp_path / "x.npy", np.ones((1, 8), "float32"))
    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        photo = isthmus("infer", model, "--url", url)
        tensor = isthmus("infer", "--tensor", f"x={tmp_path / 'x.npy'}", "--model", "a →?", "--url", url, "--json")
        server.shutdown()
    for result in (photo, tensor):
        assert result.exit_code == 1, result.output
        assert "answered 200, but not as a router does" in result.stderr
    assert json.loads(tensor.stderr)["type"] == "HopRejected"


def test_errors_are_json_for_programs(registry: Path) -> None:
    result = isthmus("cut", "nobody", "--cut", "1", "--registry", registry, "--json")
    assert result.exit_code == 1
    said = json.loads(result.stderr)
    assert said["type"] == "Missing"
    assert said["facts"]["exists"] == ["small-net"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cut", "m"], "Missing option '--cut'"),
        (["cut"], "Missing argument"),
        (["cut", "m", "--nowhere"], "No such option: --nowhere"),
        (["infer", "--top-k", "none"], "for '--top-k'"),
    ],
)
def test_a_wrong_use_is_json_for_programs_and_a_text_for_people(arguments: list[str], said: str) -> None:
    result = isthmus(*arguments, "--json")
    error = json.loads(result.stderr)
    assert (result.exit_code, result.stdout, error["type"], said in error["error"]) == (2, "", "UsageError", True)
    assert isthmus(*arguments).stderr.startswith("Usage: ")


def test_a_factory_of_an_unknown_package_is_refused_without_torch(tmp_path: Path) -> None:
    script = """
import sys
from isthmus_tools.cli import app
try:
    app(["cuts", "nope.module:make"])
except SystemExit as e:
    print(e.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "1 False\n"
    assert "there is no model factory nope.module:make: No module named 'nope'" in done.stderr


def test_a_cut_that_leaks_names_the_values(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Sigmoid", ["x"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ],
        "fork",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    path = tmp_path / "fork.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    result = isthmus("import", path, "--cut", "a", "--registry", tmp_path / "r", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stderr)
    assert said["type"] == "UnboundedCut"
    assert said["facts"]["leaks"] in (["b"], ["x"])


def test_the_doctor_says_what_is_here(registry: Path) -> None:
    found = document(isthmus("doctor", "--registry", registry, "--json"))
    assert found["ok"]
    by_name = {f["what"]: f for f in found["findings"]}
    assert by_name["onnxruntime"]["state"] == "ok"
    assert "small-net" in by_name["registry"]["found"]


WRITING = {
    "cuts": ["cuts", "{model}", "--shape", "x=1x8", "--picture"],
    "codec": ["codec", "small-net", "--picture"],
    "plan": ["plan", "small-net", "--picture"],
    "explain": ["explain", "small-net", "--picture"],
    "why": ["why", "{tmp}/photo.png", "--local", "--output"],
    "infer": ["infer", "--model", "small-net", "--tensor", "x={tmp}/x.npy", "--local", "--output"],
}


@pytest.mark.parametrize(
    ("command", "name", "said"),
    [
        *((command, "nowhere/out", "there is no folder") for command in WRITING),
        *((command, "folder", "that is a folder") for command in WRITING),
        *((command, "out.gif", ".png or .svg") for command in WRITING if command != "infer"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    command: str, name: str, said: str, model: Path, registry: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 8), "float32"))
    ending = ".npz" if command == "infer" else ".svg"
    path = tmp_path / (name if "." in name else name + ending)
    if name == "folder":
        path.mkdir()
    filled = [a.format(tmp=tmp_path, model=model) for a in WRITING[command]]
    rest = [] if command == "cuts" else ["--registry", registry]
    result = isthmus(*filled, path, *rest)
    assert result.exit_code == 1, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_files_that_the_system_refuses_are_told_as_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit), errors(as_json=True):
        (tmp_path / "nowhere" / "file").write_bytes(b"")
    said = json.loads(capsys.readouterr().err)
    assert said["error"] == f"{tmp_path / 'nowhere' / 'file'}: No such file or directory"
    with pytest.raises(OSError, match="ours"), errors(as_json=True):
        raise OSError("ours")


def test_a_picture_of_cuts_is_what_its_name_ends_in(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "cuts.svg"
    assert isthmus("cuts", model, "--shape", "x=1x8", "--picture", picture).exit_code == 0
    assert b"<svg" in picture.read_bytes()[:1000]


def test_outputs_of_any_name_and_bfloat16_go_through_files(tmp_path: Path) -> None:
    names = ["file", "allow_pickle", "arr_0", "a/b", "out.npy"]
    nodes = [helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("Identity", ["wide"], [name]) for name in names]
    nodes += [helper.make_node("Identity", ["x"], ["brain"])]
    graph = helper.make_graph(
        nodes,
        "names",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [4])],
        [
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in names),
            helper.make_tensor_value_info("brain", TensorProto.BFLOAT16, [4]),
        ],
    )
    path, given, out = tmp_path / "names.onnx", tmp_path / "x.npy", tmp_path / "out"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    values = np.array([1.5, -2.0, 0.25, 3.0], ml_dtypes.bfloat16)
    np.save(given, values)
    common = ["--registry", tmp_path / "registry"]
    assert isthmus("import", path, *common).exit_code == 0
    result = isthmus("infer", "--model", "names", "--tensor", f"x={given}", "--local", "--output", out, *common)
    assert result.exit_code == 0, result.output
    with np.load(out) as found:
        assert set(found.files) == {*names, "brain"}
        assert all(np.array_equal(found[name], values.astype("float32")) for name in names)
        assert np.array_equal(restore_bfloat16(found["brain"]), values)
        assert restore_bfloat16(found["brain"]).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("array", "said"), [(np.zeros(2, "complex64"), "complex64"), (np.zeros(2, "V3"), "V3"), (np.array(["a"]), "<U1")]
)
def test_a_tensor_of_a_dtype_that_no_frame_carries_is_refused(
    array: np.ndarray[Any, Any], said: str, registry: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", array)
    tensor = f"x={tmp_path / 'x.npy'}"
    result = isthmus("infer", "--model", "small-net", "--tensor", tensor, "--local", "--registry", registry)
    assert result.exit_code == 1
    assert said in result.stderr
    assert "bfloat16" in result.stderr


def test_names_in_messages_are_no_markup_no_pictures_and_steer_no_terminal(tmp_path: Path) -> None:
    result = isthmus("import", "package.module:factory:", "--registry", tmp_path / "[bold]r")
    said = isthmus("import", "no.such.[red]place:smile", "--registry", tmp_path).stderr
    assert result.exit_code == 1
    assert "there is no model factory no.such.[red]place:smile: No module named" in said
    assert "package.module:factory:" in result.stderr
    odd = tmp_path / "a\x1b]0;title\x07 [b].onnx"
    odd.write_text("no model")
    said = isthmus("import", odd, "--name", "m", "--registry", tmp_path).stderr
    assert "a\\x1b]0;title\\x07 [b].onnx is not an ONNX model" in said
    assert "\x1b]0" not in said


def test_what_lists_and_tables_name_is_shown_as_it_is(model: Path, tmp_path: Path) -> None:
    renamed = model.rename(tmp_path / "[red]net:smile:.onnx")
    text = isthmus("cuts", renamed, "--shape", "x=1x8").stdout
    assert "cuts of [red]net:smile:.onnx" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_no_help_turns_a_name_between_colons_into_a_picture(command: str) -> None:
    result = isthmus(command, "--help")
    assert all(ord(c) < 0x1F000 for c in result.stdout)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (MemoryError("Unable to allocate 4 TiB"), "there is not enough memory: Unable to allocate 4 TiB"),
        (MemoryError(), "there is not enough memory"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_disk_and_a_full_memory_are_told_in_a_sentence(
    raised: Exception, said: str, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit), errors(as_json):
        raise raised
    told = capsys.readouterr().err
    assert (json.loads(told)["error"] if as_json else told) == (said if as_json else f"error: {said}\n")


def test_what_no_stream_can_encode_is_written_as_its_escape(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that are not UTF-8 in an argument, and halves of characters in JSON, are lone surrogates here."""
    print_json({"a\udcff": "\ud800"})
    assert json.loads(capsys.readouterr().out) == {"a\udcff": "\ud800"}
    assert printable("a\udcff") == r"a\udcff"
    odd = model.rename(tmp_path / "a\udcff.onnx")
    run = isthmus("import", odd, "--name", "small", "--registry", tmp_path / "r")
    assert run.exit_code == 0, run.output
    for text in ('["\\ud800"]', "[" * 100_000):
        (tmp_path / "labels.json").write_text(text)
        run = isthmus("import", odd, "--registry", tmp_path / "r", "--labels", tmp_path / "labels.json")
        assert isinstance(run.exception, SystemExit), run.exception


def test_the_doctor_does_not_advise_an_import_to_a_registry_that_can_be_none() -> None:
    result = isthmus("doctor", "--registry", "ftp://somewhere", "--json")
    found = {f["what"]: f for f in json.loads(result.stdout)["findings"]}["registry"]
    assert (result.exit_code, found["state"], found["advice"]) == (1, "missing", "name another with --registry")
