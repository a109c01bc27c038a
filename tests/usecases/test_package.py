"""`isthmus package`: the functions that it writes are the plan's or the cuts', and answer without a registry."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from isthmus.artifacts.plan import Candidate, Coding
from isthmus.registry.addresses import STORE_SECRETS
from isthmus.serving import create_router_app, create_segment_app
from isthmus.settings import RouterSettings, SegmentSettings
from isthmus_tools.cli import app
from isthmus_tools.engine.stack import Stack, read_stack
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import (
    TOLERANCE,
    Published,
    copied,
    photo,
    photo_array,
    photos_model,
    publish,
    publish_photos,
    ready,
    served,
)
from support.edge_extras import with_variants
from support.exits import ALWAYS, planned_exit, with_exit
from support.local_stack import ROOT
from support.plans import candidate, plan_for
from support.segments import run_whole

CLUSTER = "http://gateway.openfaas.svc.cluster.local:8080"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("packaged"))


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what `package` reads beside the registry."""
    for name in ("stack.yml", "stack.pro.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "functions", tmp_path / "functions", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    for name in ("EDGE_GATEWAY", "TAIL_GATEWAY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def planned(published: Published, chosen: Candidate) -> str:
    version = publish_plan(published.registry, published.bundle, {}, plan_for(published.bundle, chosen))
    return f"photos:{version.version}"


def invoke(published: Published, model: str, *arguments: object) -> Result:
    given = ["package", model, "--registry", str(published.folder), *map(str, arguments)]
    return CliRunner().invoke(app, given, env={"COLUMNS": "200"})


def packaged(published: Published, model: str, *arguments: object) -> dict[str, Any]:
    result = invoke(published, model, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def stack(written: dict[str, Any], **env: str) -> Stack:
    return read_stack(Path(written["stack"]), env)


@dataclass(frozen=True)
class Answer:
    """The router's answer to a photo, and by which function's name each hop went."""

    document: dict[str, Any]
    functions: list[str]


def answered(house: Path, written: dict[str, Any]) -> Answer:
    """A photo's answer by the packaged functions, each served from its folder, none with a registry."""
    found = stack(written)
    urls = {}
    with ExitStack() as running:
        for name, spec in found.functions.items():
            folder, environment = (
                house / spec.handler,
                {**spec.environment, "threads": "1", "log_level": "error", "expose_details": "true"},
            )
            environment["cache_dir"] = str(house / "cache" / name)
            for variable in ("segment_dir", "registry"):
                if variable in environment:
                    environment[variable] = str(folder / environment[variable].removeprefix("function/"))
            if name.endswith("-router"):
                hops = environment["hops"].split(",")
                environment["hops"] = ",".join(urls[hop.rpartition("/")[2]] for hop in hops)
                client = ready(create_router_app(RouterSettings.from_env(environment)).test_client())
                response = client.post("/", data=photo())
                assert response.status_code == 200, response.get_data(as_text=True)
            else:
                urls[name] = running.enter_context(served(create_segment_app(SegmentSettings.from_env(environment))))
    document = json.loads(response.data)
    names = {url: name for name, url in urls.items()}
    return Answer(document, [names[segment["hop"]] for segment in document["route"]["segments"]])


@pytest.mark.parametrize(
    ("chosen", "functions", "segments", "codecs"),
    [
        (candidate(), ["photos-head"], [".."], {}),
        (
            candidate("cloud-photo", "cloud", input="photo", codecs={"x": Coding("photo/1")}),
            ["photos-tail"],
            [".."],
            {"x": "photo/1"},
        ),
        (
            candidate("cloud-half", "cloud", codecs={"x": Coding("half/1")}),
            ["photos-tail"],
            [".."],
            {"x": "half/1"},
        ),
        (
            candidate("split-3-int8", "split", cuts=("3",), codecs={"r3": Coding("int8/1")}),
            ["photos-head", "photos-tail"],
            ["..3", "3.."],
            {"r3": "int8/1"},
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Candidate) else "",
)
def test_the_functions_are_those_of_the_plan(
    house: Path, published: Published, chosen: Candidate, functions: list[str], segments: list[str], codecs: Any
) -> None:
    written = packaged(published, planned(published, chosen))
    assert (written["plan"], written["functions"]) == (chosen.name, [*functions, "photos-router"])
    found = answered(house, written)
    route = found.document["route"]
    assert (route["name"], found.functions) == (chosen.name, functions)
    assert [segment["segment"] for segment in route["segments"]] == segments
    assert route["segments"][-1].get("codecs", {}) == codecs


@pytest.mark.parametrize("arguments", [(), ("--cut", "6")], ids=["plan", "cut"])
def test_an_exit_is_baked_with_the_head_before_it(
    house: Path, published: Published, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    known = with_exit(published, tmp_path, threshold=ALWAYS)
    model = planned(known, candidate("split-6-exit", "split", cuts=("6",), exit=planned_exit(0.9)))
    found = answered(house, packaged(known, model, *arguments))
    assert found.functions == ["photos-head"]
    assert found.document["route"]["exit"] == "6"


@pytest.mark.parametrize(("cuts", "segments"), [(("6",), ["..6~small", "6.."]), ((), ["..~small"])])
def test_a_compressed_segment_is_baked_instead_of_the_bundles_own(
    house: Path, published: Published, tmp_path: Path, cuts: tuple[str, ...], segments: list[str]
) -> None:
    known = with_variants(copied(published, tmp_path / "registry"), tmp_path)
    kind = "split" if cuts else "edge"
    found = answered(house, packaged(known, planned(known, candidate("small", kind, cuts=cuts, head="small"))))
    assert [segment["segment"] for segment in found.document["route"]["segments"]] == segments


def test_the_plans_int8_variant_is_baked_instead_of_the_model(house: Path, published: Published) -> None:
    model = photos_model(published.onnx.parent / "photos-int8.onnx", seed=7)
    arguments = {"preprocess": published.bundle.preprocess, "postprocess": published.bundle.postprocess}
    variant = publish(published.onnx.parent, model, {}, registry=published.folder, labels=list("abcde"), **arguments)
    written = packaged(published, planned(published, candidate("edge-int8", variant=variant.digest)))
    found = answered(house, written)
    assert (found.document["route"]["name"], found.functions) == ("edge-int8", ["photos-head"])
    logits = run_whole(model, [{"x": photo_array(photo())}])[0]["logits"][0]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert found.document["classes"][0]["probability"] == pytest.approx(float(shares.max()), abs=TOLERANCE)


def test_cuts_that_are_asked_for_go_before_the_plan(house: Path, published: Published) -> None:
    written = packaged(published, planned(published, candidate()), "--cut", "1/6")
    assert (written["plan"], written["cuts"]) == (None, ["1", "6"])
    found = answered(house, written)
    assert [segment["segment"] for segment in found.document["route"]["segments"]] == ["..1", "1..6", "6.."]
    assert found.functions == ["photos-head", "photos-middle-1", "photos-tail"]
    assert found.document["route"]["name"] == "default"


def test_without_a_plan_the_bundles_own_partition_is_packaged(house: Path, published: Published) -> None:
    written = packaged(published, f"photos:{published.version}")
    assert (written["plan"], written["cuts"]) == (None, ["6"])
    assert stack(written).functions["photos-router"].environment["cuts"] == "6"


@pytest.mark.parametrize(("variable", "value"), [("plan", "false"), ("cuts", '"3"'), ("cuts", "${CUTS:-3}")])
def test_the_routers_settings_in_the_stack_file_count(
    house: Path, published: Published, variable: str, value: str
) -> None:
    text = (house / "stack.yml").read_text()
    (house / "stack.yml").write_text(text.replace("      model:", f"      {variable}: {value}\n      model:", 1))
    written = packaged(published, planned(published, candidate()))
    assert (written["plan"], written["cuts"]) == (None, ["6"] if variable == "plan" else ["3"])


def test_gateways_are_the_variables_of_the_stack_file(house: Path, published: Published) -> None:
    written = packaged(published, f"photos:{published.version}", "--cut", "1/6")
    gateways = {"EDGE_GATEWAY": "http://gateway:8080", "TAIL_GATEWAY": "https://cloud.example.com"}
    assert stack(written, **gateways).functions["photos-router"].environment["hops"].split(",") == [
        "http://gateway:8080/function/photos-head",
        "https://cloud.example.com/function/photos-middle-1",
        "https://cloud.example.com/function/photos-tail",
    ]
    assert stack(written).functions["photos-router"].environment["hops"].split(",")[0].startswith(CLUSTER)


def test_a_function_that_runs_the_whole_model_is_behind_its_tiers_gateway(house: Path, published: Published) -> None:
    gateways = {"EDGE_GATEWAY": "http://edge:1", "TAIL_GATEWAY": "http://tail:2"}
    for chosen, hop in (
        (candidate(), "http://edge:1/function/photos-head"),
        (candidate("cloud-raw", "cloud"), "http://tail:2/function/photos-tail"),
    ):
        written = packaged(published, planned(published, chosen))
        assert stack(written, **gateways).functions["photos-router"].environment["hops"] == hop


def test_gateways_that_a_stack_file_names_itself_are_kept(house: Path, published: Published) -> None:
    text = (house / "stack.yml").read_text()
    hops = next(line for line in text.splitlines() if line.strip().startswith("hops:"))
    (house / "stack.yml").write_text(
        text.replace(hops, "      hops: http://a:1/function/edge-head,http://b:2/function/t")
    )
    written = packaged(published, f"photos:{published.version}")
    assert stack(written).functions["photos-router"].environment["hops"] == (
        "http://a:1/function/photos-head,http://b:2/function/photos-tail"
    )


@pytest.mark.parametrize("file", ["stack.yml", "stack.pro.yml"])
def test_a_packaged_stack_is_one_that_faas_cli_reads_whole(house: Path, published: Published, file: str) -> None:
    """`read_stack` refuses keys that faas-cli would ignore."""
    found = stack(packaged(published, f"photos:{published.version}", "--stack", file))
    base = read_stack(house / file, {})
    tail = found.functions["photos-tail"]
    assert (tail.lang, tail.constraints) == (
        base.functions["cloud-tail"].lang,
        base.functions["cloud-tail"].constraints,
    )
    assert tail.image.startswith("isthmus/photos-tail")
    assert not any(spec.secrets for spec in found.functions.values())


def test_packaged_functions_keep_the_secrets_that_close_them(house: Path, published: Published) -> None:
    """Without hop-keys a packaged function would run its segment for anybody."""
    text = (house / "stack.yml").read_text()
    written = packaged(published, f"photos:{published.version}")
    found = stack(written, ISTHMUS_SECRETS="[hop-keys, trusted-keys]")
    assert {spec.secrets for spec in found.functions.values()} == {("hop-keys", "trusted-keys")}
    listed = f"[hop-keys, {', '.join(name for names in STORE_SECRETS.values() for name in names)}]"
    (house / "stack.yml").write_text(text.replace("${ISTHMUS_SECRETS:-[]}", listed))
    found = stack(packaged(published, f"photos:{published.version}"))
    assert {spec.secrets for spec in found.functions.values()} == {("hop-keys",)}


def test_a_plan_of_more_segments_than_functions_is_refused(house: Path, published: Published) -> None:
    model = planned(published, candidate("split-1-6", "split", cuts=("1", "6")))
    result = invoke(published, model)
    assert result.exit_code == 1
    assert "split-1-6" in result.stderr
    assert "--cut 1/6" in result.stderr


def test_a_plan_whose_variant_is_not_in_the_registry_is_refused(house: Path, published: Published) -> None:
    result = invoke(published, planned(published, candidate("edge-int8", variant="sha256:" + "0" * 64)))
    assert result.exit_code == 1
    assert "variant sha256:0000" in result.stderr.replace("\n", "")
    assert not (house / "build").exists() or not any((house / "build/package").iterdir())


def test_a_segment_that_its_function_could_never_load_is_refused(house: Path, published: Published) -> None:
    text = (house / "stack.yml").read_text()
    (house / "stack.yml").write_text(text.replace("max_loaded_bytes: 768MiB", "max_loaded_bytes: 2kB"))
    result = invoke(published, planned(published, candidate()))
    assert result.exit_code == 1
    assert "edge-head loads at most 2.0 kB: max_loaded_bytes" in " ".join(result.stderr.split())


@pytest.mark.parametrize("output", ["..", "/somewhere"])
def test_an_output_where_faas_cli_finds_no_handler_is_refused(house: Path, published: Published, output: str) -> None:
    result = invoke(published, "photos", "--output", output)
    assert result.exit_code == 1
    assert "is not inside" in result.stderr


def test_only_what_package_wrote_is_replaced(house: Path, published: Published) -> None:
    (house / "own" / "photos").mkdir(parents=True)
    (house / "own" / "photos" / "notes.txt").write_text("mine")
    result = invoke(published, f"photos:{published.version}", "--output", "own")
    assert (result.exit_code, "did not write" in result.stderr) == (1, True)
    assert (house / "own" / "photos" / "notes.txt").read_text() == "mine"
    for _ in range(2):
        assert packaged(published, f"photos:{published.version}")["stack"] == os.path.join(
            "build", "package", "photos", "stack.yml"
        )
    assert os.listdir(house / "build" / "package") == ["photos"]
