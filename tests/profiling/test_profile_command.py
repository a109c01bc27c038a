"""`isthmus profile` on real functions: what it measures, keeps, publishes, and says when it cannot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from onnx import helper
from typer.testing import CliRunner

from isthmus.artifacts.profile import content_of, from_json
from isthmus.serving import create_router_app, create_segment_app
from isthmus.serving.profiling import SECRET
from isthmus.settings import RegistrySettings
from isthmus_tools.cli import app
from isthmus_tools.profiling import profiles, slow_edge
from isthmus_tools.profiling.slow_edge import SlowEdge
from isthmus_tools.usecases import profile as use_case
from isthmus_tools.usecases.function_urls import FunctionUrls
from isthmus_tools.usecases.profile import ProfileRequest
from isthmus_tools.zoo import models as zoo
from support.bundles import (
    pair_model,
    photo,
    publish,
    publish_photos,
    router_settings,
    save,
    segment_settings,
    served,
    value,
)
from support.models import ROOT, efficientnet_lite0

TOKEN = "a-token"
RELU = helper.make_node("Relu", ["x"], ["y"])


class Place:
    """A registry with `photos` and `pair`, two functions on sockets that serve it, and the token's file."""

    def __init__(self, folder: Path, running: ExitStack) -> None:
        self.photos = publish_photos(folder)
        self.pair = publish(
            folder,
            pair_model(folder / "pair.onnx"),
            {"x": np.ones((1, 32), np.float32), "mask": np.ones((1, 32), np.float32)},
            partitions=[["1"]],
            registry=self.photos.folder,
        )
        secrets = folder / "secrets"
        secrets.mkdir()
        self.token = secrets / SECRET
        self.token.write_text(TOKEN)
        self.head, self.tail = (
            running.enter_context(
                served(create_segment_app(segment_settings(self.photos, folder / tier, secrets_dir=str(secrets))))
            )
            for tier in ("edge", "cloud")
        )
        self.router = running.enter_context(
            served(create_router_app(router_settings(self.photos, folder / "router", [self.head])))
        )

    def profile(self, *arguments: object, model: str = "photos", token: Path | None = None) -> Result:
        given = [model, *arguments, "--registry", self.photos.folder, "--token-file", token or self.token]
        return CliRunner().invoke(app, ["profile", *map(str, given)])

    def measured(self, *arguments: object, model: str = "photos") -> Any:
        result = self.profile("--head", self.head, "--tail", self.tail, "--json", *arguments, model=model)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ExitStack() as running:
        yield Place(tmp_path_factory.mktemp("place"), running)


@pytest.fixture(scope="module")
def first(place: Place) -> Any:
    """What the first profile of `photos` says."""
    return place.measured("--runs", 5)


def test_both_tiers_are_measured_whole_and_at_every_cut(place: Place, first: Any) -> None:
    assert first["up_to_date"] == []
    edge, cloud = (from_json(json.dumps(first["profiles"][tier]).encode()) for tier in ("edge", "cloud"))
    assert set(edge.segments) == {"..", *(f"..{cut}" for cut in first["cuts"])}
    assert set(cloud.segments) == {"..", *(f"{cut}.." for cut in first["cuts"])}
    assert set(place.photos.bundle.cuts) <= set(first["cuts"])
    for profile in (edge, cloud):
        assert sum(profile.nodes) == pytest.approx(profile.whole.run.median)
        assert profile.content == content_of(place.photos.bundle)
        assert profile.inputs == "random"
        assert profile.shapes == {"x": (1, 3, 8, 8)}
        assert profile.whole.memory_bytes > profile.whole.weights_bytes > 0
        assert profile.hop is not None
        assert 0 < profile.hop.served_fixed_s < profile.hop.fixed_s


def test_cuts_that_lacked_are_the_next_version_and_no_alias_moves(place: Place, first: Any) -> None:
    registry = place.photos.registry
    assert first["model"] == "photos:2"
    assert registry.resolve("photos").version == "1"
    newer = registry.resolve("photos:2")
    assert newer.digest == first["profiles"]["edge"]["bundle"]
    assert newer.bundle.weights == place.photos.bundle.weights
    for cut in first["cuts"]:
        assert {f"..{cut}", f"{cut}.."} <= set(newer.bundle.segments)


def test_a_profile_is_kept_until_it_is_asked_for_again(place: Place, first: Any) -> None:
    kept = place.measured("--runs", 5)
    assert kept["up_to_date"] == ["cloud", "edge"]
    assert kept["profiles"] == first["profiles"]
    assert place.measured("--runs", 3, "--cut", "6", "--again")["up_to_date"] == []


def test_a_profile_within_a_time_limit_names_what_it_left_out(place: Place, first: Any) -> None:
    found = place.measured("--runs", 3, "--cut", "6", "--again", "--time-limit", "1ms")
    for tier, segment in (("edge", "..6"), ("cloud", "6..")):
        assert f"the time limit left 1 segments unmeasured: {segment}" in found["profiles"][tier]["warnings"]
        assert found["profiles"][tier]["segments"].keys() >= first["profiles"][tier]["segments"].keys(), "kept"


def test_a_slower_edge_has_a_profile_of_its_own_beside_that_at_full_speed(
    place: Place, first: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This process holds both functions and never waits.
    monkeypatch.setattr(slow_edge, "_MAX_WAITS", 0)
    registry = RegistrySettings(registry=str(place.photos.folder))
    functions = FunctionUrls(place.head, place.tail, TOKEN, SlowEdge(4.0, [os.getpid()]))
    slowed = use_case.profile(ProfileRequest(model="photos", registry=registry, functions=functions)).profiles
    stored = profiles.every(place.photos.registry, place.photos.bundle)
    full = profiles.newest(place.photos.registry, place.photos.bundle, ("edge", "cloud"))
    assert slowed["edge"].device.cpu == f"1/4 of a CPU: {full['edge'].device.cpu}"
    assert slowed["edge"] in stored
    # The cloud's own profile is not of a caller at a slower edge.
    assert slowed["cloud"] not in stored
    # All runs by one factor, the model's CPU time by its time.
    ratios = [
        slowed["edge"].segments[name].run.median / cost.run.median for name, cost in full["edge"].segments.items()
    ]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert sum(slowed["edge"].nodes) == pytest.approx(slowed["edge"].whole.run.median)
    assert {n: s.pack_s for n, s in slowed["edge"].codecs.items()} == {
        n: pytest.approx(4 * s.pack_s) for n, s in full["edge"].codecs.items()
    }


def test_a_cut_more_is_measured_beside_what_is_known(place: Place, first: Any) -> None:
    found = place.measured("--runs", 3, "--cut", "pooled=p6")
    assert found["cuts"] == ["pooled"]
    edge, cloud = found["profiles"]["edge"], found["profiles"]["cloud"]
    assert {"..pooled", *(f"..{cut}" for cut in first["cuts"])} <= set(edge["segments"])
    assert {"pooled..", *(f"{cut}.." for cut in first["cuts"])} <= set(cloud["segments"])
    # One version holds all of it.
    assert edge["segments"].keys() <= place.photos.registry.bundle(edge["bundle"]).segments.keys()


def test_a_photo_is_run_where_the_model_takes_photos(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(photo())
    found = place.measured("--runs", 3, "--cut", "6", "--input", path, "--again")
    assert found["profiles"]["cloud"]["inputs"] == "photo"


def test_tensors_are_run_as_they_are_given(place: Place, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 32), np.float32))
    np.save(tmp_path / "mask.npy", np.zeros((1, 32), np.float32))
    tensors = [part for name in ("x", "mask") for part in ("--tensor", f"{name}={tmp_path / name}.npy")]
    found = place.measured("--runs", 3, *tensors, model="pair")
    assert found["profiles"]["edge"]["inputs"] == "tensors"
    assert found["profiles"]["edge"]["shapes"] == {"x": [1, 32], "mask": [1, 32]}


def test_people_see_a_table_and_what_was_measured_on(place: Place, first: Any) -> None:
    result = place.profile("--head", place.head, "--tail", place.tail)
    assert result.exit_code == 0, result.output
    assert "edge up to date" in result.stdout
    assert "inputs" in result.stdout
    assert "onnxruntime" in result.stdout


def test_one_tier_alone_can_be_measured(place: Place, first: Any) -> None:
    result = place.profile("--tail", place.tail, "--json")
    assert set(json.loads(result.stdout)["profiles"]) == {"cloud"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name the functions"),
        (("--local", "--head", "HEAD"), "leave --head and --tail out"),
        (("--head", "http://127.0.0.1:9"), "cannot be reached"),
        (("--head", "ROUTER"), "no profiling route"),
        (("--head", "HEAD", "--cut", "999"), "no cut after node 999"),
        (("--head", "HEAD", "--input", "absent.jpg"), "absent.jpg cannot be read"),
        (("--head", "HEAD", "--tensor", "x"), "NAME=FILE.npy"),
        (("--head", "HEAD", "--tensor", "y=FILE"), "missing x"),
        (("--head", "HEAD", "--tensor", "x=FILE"), "float32[1, 3, 8, 8]"),
        (("--head", "HEAD", "--input", "a.png", "--tensor", "x=FILE"), "not both"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    place: Place, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    np.save(tmp_path / "file.npy", np.zeros((1, 2), np.float32))
    places = {"HEAD": place.head, "ROUTER": place.router}
    result = place.profile(*(places.get(a, a.replace("FILE", str(tmp_path / "file.npy"))) for a in arguments))
    assert result.exit_code == 1
    assert said in result.stderr.replace("\n", " ")


def test_an_unknown_model_is_named_beside_those_there_are(place: Place) -> None:
    result = place.profile("--head", place.head, model="phtos")
    assert result.exit_code == 1
    assert "pair, photos" in result.stderr


@pytest.mark.parametrize(
    ("token", "said"), [("other", "not this function's"), ("", "holds no token"), ("a b", "one word"), (None, "cannot")]
)
def test_a_token_that_opens_nothing_is_said(place: Place, tmp_path: Path, token: str | None, said: str) -> None:
    if token is not None:
        (tmp_path / "token").write_text(token)
    result = place.profile("--head", place.head, token=tmp_path / "token")
    assert result.exit_code == 1
    assert said in result.stderr.replace("\n", " ")


def test_the_processes_of_the_stack_are_measured_with_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = tmp_path / "registry"
    publish(tmp_path, efficientnet_lite0(), {}, registry=registry, partitions=[["65"]], **zoo_arguments())
    monkeypatch.chdir(ROOT)
    arguments = ["profile", MODEL, "--local", "--runs", "5", "--cut", "31", "--registry", str(registry), "--json"]

    result = CliRunner().invoke(app, [*arguments, "--again"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["profiles"]
    for tier, segment in (("edge", "..31"), ("cloud", "31..")):
        profile = from_json(json.dumps(found[tier]).encode())
        whole_s = profile.whole.run.median
        assert set(profile.segments) == {"..", segment}
        assert sum(profile.nodes) == pytest.approx(whole_s)
        # Convolutions, which onnxruntime ran under other names, have their times: most nodes are not next to nothing
        # beside the middle one of these, however long the machine paused in some.
        largest = sorted(profile.nodes, reverse=True)[:60]
        assert largest[-1] > 1e-2 * largest[30]


MODEL = "efficientnet-lite0-1"


def zoo_arguments() -> dict[str, Any]:
    entry = zoo.zoo_model("efficientnet-lite0")
    return {"preprocess": entry.preprocess, "postprocess": entry.postprocess}


def test_a_model_of_one_node_is_measured_whole(place: Place, tmp_path: Path) -> None:
    path = save(tmp_path / "one.onnx", [RELU], [value("x", 1, 4)], [value("y", 1, 4)], [])
    publish(tmp_path, path, {}, registry=place.photos.folder)
    found = place.measured("--runs", 3, model="one")
    assert (found["model"], found["cuts"]) == ("one:1", [])
    whole = found["profiles"]["edge"]["segments"][".."]["run"]["median"]
    assert found["profiles"]["edge"]["nodes"] == pytest.approx([whole])
