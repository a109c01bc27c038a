"""The public names of both packages, and the examples of docs/reference/python.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import isthmus
import isthmus_tools
from isthmus.settings import RouterSettings
from support.bundles import LABELS, Published, photo, router_settings
from support.bundles import photos as photos
from support.explained import sentence
from support.paths import ROOT
from support.routers import served_router

PAGE = ROOT / "docs" / "reference" / "python.md"
BATCH_PAGE = ROOT / "docs" / "how-to" / "batch.md"
WHY_PAGE = ROOT / "docs" / "how-to" / "why.md"
ROUTER = "http://127.0.0.1:8080/function/router"


@pytest.mark.parametrize("package", [isthmus, isthmus_tools], ids=lambda p: p.__name__)
def test_the_page_names_all_public_names_and_each_can_be_had(package: object) -> None:
    name = package.__name__  # type: ignore[attr-defined]
    row = re.search(rf"^\| `{name}` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert row is not None
    public = package.__all__  # type: ignore[attr-defined]
    assert sorted(re.findall(r"`(\w+)`", row[1])) == sorted(public)
    assert all(getattr(package, each).__name__ == each for each in public)
    assert set(public) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_packages_loads_no_library() -> None:
    script = """
import sys
import isthmus, isthmus_tools
print(sorted({"numpy", "onnx", "onnxruntime", "isthmus.errors", "isthmus_tools.usecases"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


@contextmanager
def router_of(code: str, folder: Path) -> Iterator[str]:
    """The code of an example, where it names a router before a running one."""
    if ROUTER not in code:
        yield code
        return
    where = {"registry": str(folder / "registry"), "cache_dir": str(folder / "router")}
    with served_router(RouterSettings(**where, model="detector", hops=("local",))) as url:  # type: ignore[arg-type]
        yield code.replace(ROUTER, url)


def test_the_example_of_a_batch_runs(
    photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", BATCH_PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "cat.jpg").write_bytes(photo(format="JPEG"))
    (tmp_path / "dog.jpg").write_bytes(b"no photo")
    monkeypatch.chdir(tmp_path)
    with served_router(router_settings(photos, tmp_path / "cache", ("local",))) as url:
        exec(compile(block.replace(ROUTER, url), str(BATCH_PAGE), "exec"), {})  # noqa: S102
    first, second = capsys.readouterr().out.splitlines()
    assert first in LABELS
    assert "looks like text" in second


def test_the_example_of_an_explanation_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", WHY_PAGE.read_text(), re.MULTILINE | re.DOTALL)
    published = sentence(tmp_path / "model")
    with served_router(router_settings(published, tmp_path / "cache", ("local",))) as url:
        exec(compile(block.replace(ROUTER, url), str(WHY_PAGE), "exec"), {})  # noqa: S102
    assert capsys.readouterr().out == "2 1\n"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector(tmp_path / "detector.onnx")
    shutil.copy(ROOT / "stack.yml", tmp_path)
    shutil.copytree(ROOT / "functions", tmp_path / "functions", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "template", tmp_path / "template", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "shared", tmp_path / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        with router_of(block, tmp_path) as code:
            exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102
    assert names["prediction"].outputs["y"].shape == (1, 3)  # type: ignore[attr-defined]
    assert names["difference"] < 1e-5  # type: ignore[operator]
    registry = isthmus.open_registry(names["registry"])  # type: ignore[arg-type]
    assert [version.version for version in registry.versions("detector")] == ["1", "2", "3"]
    assert [run.segment for run in names["ran"].runs] == ["..1", "1..5", "5.."]  # type: ignore[attr-defined]
    assert registry.resolve("detector:prod").bundle.plan is not None


def detector(path: Path) -> None:
    """x (1, 8) → four layers of a product and a ReLU, of 64, 4, 64 and 3 → y."""
    rng = np.random.default_rng(0)
    nodes, values, tensor = [], [], "x"
    for i, (rows, columns, name) in enumerate([(8, 64, "a"), (64, 4, "b"), (4, 64, "c"), (64, 3, "y")]):
        values.append(numpy_helper.from_array(rng.normal(size=(rows, columns)).astype("float32"), f"w{i}"))
        nodes += [helper.make_node("MatMul", [tensor, f"w{i}"], [f"m{i}"]), helper.make_node("Relu", [f"m{i}"], [name])]
        tensor = name
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, d])] for n, d in (("x", 8), ("y", 3)))
    graph = helper.make_graph(nodes, "detector", inputs, outputs, values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
