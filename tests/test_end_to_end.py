"""The whole thing: EfficientNet-Lite0 through the functions of stack.yml, on real photos."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.http
import urllib3
from typer.testing import CliRunner

from isthmus.artifacts.segment_id import WHOLE
from isthmus.client import Client
from isthmus.errors import HopTimeout, HopUnavailable, Missing
from isthmus.registry import open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.cli import app
from isthmus_tools.cli.options import registry_settings, stack_variables
from isthmus_tools.engine import Engine
from isthmus_tools.graph import build
from isthmus_tools.usecases.local_model import LocalModel
from isthmus_tools.zoo import models as zoo
from isthmus_tools.zoo.photos import sample_photos
from support.local_stack import system
from support.models import ROOT, efficientnet_lite0
from support.patience import LONG_S, eventually

MODEL = "efficientnet-lite0"
ONE_THREAD = {"*": {"threads": "1"}}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with EfficientNet-Lite0, cut at 65 and at 20 and 65."""
    folder, made = tmp_path_factory.mktemp("registry"), tmp_path_factory.mktemp("made")
    arguments = zoo.zoo_model(MODEL).arguments()
    bundle, files = build(efficientnet_lite0(), MODEL, made, partitions=[["65"], ["20", "65"]], **arguments)
    open_registry(RegistrySettings(registry=str(folder))).publish(bundle, files)
    return str(folder)


@pytest.fixture(scope="module")
def engine(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    environment = {"*": {"threads": "1", "cache_dir": str(tmp_path_factory.mktemp("cache"))}}
    with Engine(
        ROOT / "stack.yml",
        environment=environment,
        variables=stack_variables(registry),
        callback_networks=["127.0.0.0/8"],
    ) as running:
        running.wait_ready(2 * LONG_S)
        yield running


@pytest.fixture(scope="module")
def router(engine: Engine) -> str:
    return f"{engine.url}/function/router"


@pytest.fixture(scope="module")
def whole(registry: str) -> LocalModel:
    """The uncut model in this process."""
    return LocalModel(MODEL, registry_settings(registry), WHOLE, threads=1)


@pytest.fixture(scope="module")
def inputs(whole: LocalModel) -> list[np.ndarray[Any, Any]]:
    return [whole.preprocess(photo.read_bytes())["image"] for photo in sample_photos()]


def largest_difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("photo", sample_photos(), ids=lambda p: p.stem)
def test_a_photo_gets_the_uncut_models_classes(router: str, whole: LocalModel, photo: Path) -> None:
    answer = Client(router).photo(photo.read_bytes(), top_k=5)
    expected = whole.photo(photo.read_bytes(), 5, 30)
    assert [c["index"] for c in answer["classes"]] == [c["index"] for c in expected["classes"]]
    assert [s["segment"] for s in answer["route"]["segments"]] == ["..65", "65.."]
    assert answer["route"]["link_raw_bytes"] == 37632
    assert answer["route"]["link_bytes"] == answer["route"]["segments"][1]["sent_bytes"] > 37632


def test_tritons_client_gets_the_uncut_models_logits(
    router: str, whole: LocalModel, inputs: list[np.ndarray[Any, Any]]
) -> None:
    client = tritonclient.http.InferenceServerClient(router.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    metadata = client.get_model_metadata(MODEL)
    given = tritonclient.http.InferInput(metadata["inputs"][0]["name"], [1, 3, 224, 224], "FP32")
    for binary in (True, False):
        given.set_data_from_numpy(inputs[0], binary_data=binary)
        wanted = tritonclient.http.InferRequestedOutput("logits", binary_data=binary)
        answer = client.infer(MODEL, [given], outputs=[wanted]).as_numpy("logits")
        assert largest_difference(answer, whole.run({"image": inputs[0]}).outputs["logits"]) < 1e-5
    client.close()


def test_three_segments_give_the_uncut_models_logits(
    registry: str, whole: LocalModel, inputs: list[np.ndarray[Any, Any]]
) -> None:
    parted = LocalModel(MODEL, registry_settings(registry), "20/65", threads=1)
    result = parted.run({"image": inputs[1]})
    assert [s.segment for s in result.runs] == ["..20", "20..65", "65.."]
    assert largest_difference(result.outputs["logits"], whole.run({"image": inputs[1]}).outputs["logits"]) < 1e-5


def test_200_requests_at_16_at_once_lose_none_and_mix_none_up(
    router: str, whole: LocalModel, inputs: list[np.ndarray[Any, Any]]
) -> None:
    expected = [whole.run({"image": array}).outputs["logits"] for array in inputs]
    client = Client(router)

    def ask(i: int) -> float:
        answer = client.infer({"image": inputs[i % len(inputs)]}, model=MODEL)
        return largest_difference(answer.outputs["logits"], expected[i % len(inputs)])

    with ThreadPoolExecutor(16) as pool:
        differences = list(pool.map(ask, range(200)))
    assert len(differences) == 200
    assert max(differences) < 1e-5


def test_an_asynchronous_call_brings_its_answer_to_the_callback(engine: Engine) -> None:
    got: list[tuple[dict[str, str], bytes]] = []
    there = threading.Event()

    class Callback(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            there.set()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Callback)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with urllib3.PoolManager(retries=False) as pool:
        response = pool.request(
            "POST",
            f"{engine.url}/async-function/router",
            body=sample_photos()[2].read_bytes(),  # a queue takes no more than 256,000 bytes
            headers={"X-Callback-Url": f"http://127.0.0.1:{server.server_port}/", "X-Call-Id": "call-7"},
        )
    assert response.status == 202
    assert there.wait(LONG_S)
    server.shutdown()
    server.server_close()
    headers, body = got[0]
    assert headers["X-Call-Id"] == "call-7"
    assert headers["X-Function-Status"] == "200"
    assert json.loads(body)["classes"][0]["label"] == "missile"


def test_a_tail_that_dies_is_named_within_the_deadline_and_comes_back(engine: Engine, router: str) -> None:
    photo = sample_photos()[2].read_bytes()
    Client(router).photo(photo)
    client = Client(router, timeout_s=5.0)  # the router waits for a tail that seems to be starting
    scale = "/system/scale-function/cloud-tail"
    system(engine, "POST", scale, body=json.dumps({"serviceName": "cloud-tail", "replicas": 0}))

    with pytest.raises(HopUnavailable) as e:
        client.photo(photo)
    assert "cloud-tail" in e.value.facts["hop"]
    system(engine, "POST", scale, body=json.dumps({"serviceName": "cloud-tail", "replicas": 1}))
    engine.wait_ready(LONG_S)
    assert Client(router).photo(photo)["classes"]


def serves(process: psutil.Process, function: str) -> bool:
    try:
        return process.cwd().endswith(function) and "index.py" in " ".join(process.cmdline())
    except psutil.Error:  # it ends, or is a zombie
        return False


def test_a_function_that_is_killed_is_started_again(engine: Engine, router: str) -> None:
    photo = sample_photos()[2].read_bytes()
    victims = [p for p in psutil.Process().children(recursive=True) if serves(p, "edge-head")]
    assert victims
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)

    def is_back() -> bool:
        with suppress(HopUnavailable, HopTimeout):
            return bool(Client(router).photo(photo)["classes"])
        return False

    eventually(is_back)


def test_an_unknown_model_is_refused_with_those_that_exist(router: str) -> None:
    with pytest.raises(Missing) as e:
        Client(router).photo(sample_photos()[0].read_bytes(), model="resnet")
    assert e.value.facts["exists"] == [MODEL]


def test_the_command_asks_the_router(router: str) -> None:
    photo = str(sample_photos()[1])
    result = CliRunner().invoke(app, ["infer", photo, "--url", router, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["classes"][0]["label"] == "espresso"


def test_packaged_functions_answer_without_a_registry(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    output = ROOT / "build" / f"test-{os.getpid()}"
    arguments = f"package {MODEL} --cut 20/65 --json --output build/{output.name}".split()
    result = CliRunner().invoke(app, [*arguments, "--registry", registry])
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert written["functions"] == [f"{MODEL}-{role}" for role in ("head", "middle-1", "tail", "router")]
    stack = ROOT / written["stack"]
    nowhere = {**os.environ, "ISTHMUS_REGISTRY": str(tmp_path / "none")}
    with Engine(stack, environment=ONE_THREAD, variables=nowhere) as running:
        running.wait_ready(2 * LONG_S)
        answer = Client(f"{running.url}/function/{MODEL}-router").photo(sample_photos()[1].read_bytes())
    assert answer["classes"][0]["label"] == "espresso"
    assert len(answer["route"]["segments"]) == 3
    shutil.rmtree(output)
