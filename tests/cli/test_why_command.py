"""`isthmus why`: a heat map of a photo, weights of tokens, in this process and by a router."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isthmus import Client
from isthmus.errors import HopRejected
from isthmus.settings import RegistrySettings
from isthmus_tools import LocalModel
from support.bundles import Published, router_settings, served
from support.cli import document, isthmus
from support.explained import CELL, CLASSES, PIXELS, TOKEN, picture, sentence
from support.routers import served_router

IDS = ["hot", "in", "the", "sun", "today", "."]


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("bright")
    labels = ["dark", "bright"]
    return picture(folder, preprocess=PIXELS, postprocess=CLASSES, labels=labels)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return sentence(tmp_path_factory.mktemp("words"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "white.png"
    Image.new("RGB", (16, 16), (255, 255, 255)).save(path)
    return path


@pytest.fixture
def ids(words: Published, tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", words.inputs["input_ids"])
    return tmp_path / "ids.npy"


def place(published: Published) -> list[str]:
    return ["--model", published.name, "--registry", str(published.folder)]


def test_the_map_of_a_photo_is_shown_and_told(bright: Published, photo: Path) -> None:
    result = isthmus("why", photo, "--grid", 4, "--local", *place(bright))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.match(r"picture:1: bright, \d+\.\d%: most by the centre \(56%\)", lines[0])
    # The decisive cell is the darkest; the first row of the map follows the sentence.
    row, column = CELL
    assert lines[1 + row][2 + 2 * column :].startswith("██")
    assert not lines[4].strip()
    assert "25 parts hidden at the cut 0 in" in lines[-1]


def test_a_map_is_drawn_over_the_photo(bright: Published, photo: Path, tmp_path: Path) -> None:
    for name, first in (("heat.png", b"\x89PNG"), ("heat.svg", b"<?xml")):
        path = tmp_path / name
        found = document(isthmus("why", photo, "--output", path, "--json", "--local", *place(bright)))
        assert found["file"] == str(path)
        assert path.read_bytes().startswith(first)
    with Image.open(tmp_path / "heat.png") as drawn:
        assert drawn.size[0] > 400


def test_a_router_and_this_process_explain_alike(bright: Published, photo: Path, tmp_path: Path) -> None:
    here = document(isthmus("why", photo, "--class", "dark", "--json", "--local", *place(bright)))
    with served_router(router_settings(bright, tmp_path / "cache", ("local",))) as url:
        there = document(isthmus("why", photo, "--class", "dark", "--json", "--url", url))
    assert there["explanation"] == here["explanation"]
    assert there["class"] == here["class"]
    assert here["class"]["label"] == "dark"
    assert max(max(row) for row in here["explanation"]["drops"]) <= 0


def test_without_a_cut_the_input_is_hidden(bright: Published, photo: Path) -> None:
    found = document(isthmus("why", photo, "--cut", "..", "--json", "--local", *place(bright)))
    assert found["explanation"]["at"] == "input"


@pytest.mark.parametrize("text", ["\n".join(IDS), json.dumps(IDS)], ids=["lines", "JSON"])
def test_tokens_are_listed_by_their_weight(words: Published, ids: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "tokens").write_text(text)
    arguments = ["--tensor", f"input_ids={ids}", "--tokens", tmp_path / "tokens"]
    result = isthmus("why", "--local", *arguments, *place(words))
    assert result.exit_code == 0, result.output
    first = next(line for line in result.stdout.splitlines() if line.startswith("│"))
    place_of_token = words.inputs["input_ids"][0].tolist().index(TOKEN)
    assert [cell.strip() for cell in first.strip("│").split("│")[:2]] == [str(place_of_token), IDS[place_of_token]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a photo, or tensors"),
        (["{photo}", "--tensor", "input_ids={ids}"], "name a photo, or tensors"),
        (["--tensor", "input_ids={ids}", "--output", "heat.png"], "there is none"),
        (["{photo}", "--output", "heat.gif"], ".png or .svg"),
        (["{folder}/none.png"], "none.png cannot be read"),
        (["{ids}"], "is no image"),
        (["{photo}", "--class", "brigt"], "no class's label or index"),
        (["{photo}", "--class", "2"], "none of the model's 2 classes"),
        (["{photo}", "--grid", "33"], "grid is 33"),
        (["{photo}", "--cut", "99"], "no cut"),
        (["{photo}", "--classes", "none"], "no output 'none'"),
    ],
)
def test_what_cannot_be_explained_is_one_sentence(
    bright: Published, photo: Path, ids: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [a.format(photo=photo, ids=ids, folder=tmp_path) for a in arguments]
    result = isthmus("why", *filled, "--local", *place(bright))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_grid_of_zero_is_refused(bright: Published, photo: Path) -> None:
    assert isthmus("why", photo, "--grid", 0, "--local", *place(bright)).exit_code == 2


def test_tokens_of_another_number_are_refused(words: Published, ids: Path, tmp_path: Path) -> None:
    for text, message in (("one\ntwo", "--tokens has 2 tokens, and 6 were hidden"), ("[1,", "is no JSON list")):
        (tmp_path / "tokens").write_text(text)
        result = isthmus(
            "why", "--tensor", f"input_ids={ids}", "--tokens", tmp_path / "tokens", "--local", *place(words)
        )
        assert (result.exit_code, message in result.stderr) == (1, True), result.output


def test_the_client_explains_tensors_and_photos(words: Published, bright: Published, tmp_path: Path) -> None:
    with served_router(router_settings(words, tmp_path / "words", ("local",))) as url:
        found = Client(url).explain(words.inputs, model="sentence", grid=6)
    local = LocalModel("sentence", RegistrySettings(registry=str(words.folder), cache_dir=str(tmp_path / "local")))
    assert found["explanation"] == local.explain(words.inputs)["explanation"]
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 255, 255)).save(file, "PNG")
    with served_router(router_settings(bright, tmp_path / "bright", ("local",))) as url:
        assert Client(url).explain(file.getvalue(), class_name="dark")["class"]["index"] == 0


def test_a_server_that_is_no_router_is_told(photo: Path) -> None:
    def other(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "application/json")])
        return [b'{"explanation": {}}']

    with served(other) as url, pytest.raises(HopRejected, match="not as a router does"):
        Client(url).explain(photo.read_bytes())
