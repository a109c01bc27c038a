"""The router's guard and the setting `codec`: packed answers through real sockets, checked against raw ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from hypothesis import given
from msgspec import structs

from isthmus.artifacts.choice import RAW, Choice, Look
from isthmus.artifacts.fidelity import Entry, Fidelity, Inputs, Measure, measure_for, offered
from isthmus.codecs import Encoding
from isthmus.errors import CalibrationError, SettingsError
from isthmus.pipeline import Result, Route, SegmentRun
from isthmus.routing.guard import Guard, Sample, fallback_chain
from isthmus.serving import create_router_app, create_segment_app
from isthmus.serving.metrics import FunctionMetrics
from isthmus_tools.calibration.calibrate import CalibrationSpec, calibrate
from isthmus_tools.calibration.inputs import list_files, open_source
from support.bundles import (
    Published,
    metrics,
    photo,
    ready,
    router_settings,
    segment_settings,
    served,
    until,
)
from support.bundles import photos as photos
from support.closer_looks import FIDELITY, LOOKED, ONE, TWO, choices, entry, of
from support.executors import executor_of
from support.hops import Echo
from support.patience import LONG_S, eventually

GOOD, BAD = "int8/1", "sparse/2@0"
Routers = Callable[..., FlaskClient]


@pytest.fixture
def original(photos: Published) -> Iterator[Published]:
    """The same, and the alias is put back after the test."""
    yield photos
    photos.registry.move_alias("photos", "prod", "1")


@pytest.fixture(scope="module")
def hops(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    made = [create_segment_app(segment_settings(photos, tmp_path_factory.mktemp(n))) for n in ("head", "tail")]
    with served(made[0]) as head, served(made[1]) as tail:
        yield head, tail


@pytest.fixture
def router(photos: Published, hops: tuple[str, str], tmp_path: Path) -> Routers:
    def start(**given: Any) -> FlaskClient:
        return ready(create_router_app(router_settings(photos, tmp_path, hops, **given)).test_client())

    return start


def value(client: FlaskClient, name: str) -> float:
    return metrics(client)[name, ()]


def warnings_of_the_guard(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [r for r in caplog.records if "guard" in r.getMessage()]


def ask(client: FlaskClient, seed: int = 0) -> Any:
    answer = client.post("/", data=photo(seed=seed))
    assert answer.status_code == 200, answer.json
    return answer.json


# The setting


def test_the_setting_packs_what_crosses_the_cut_and_the_answer_says_so(router: Routers) -> None:
    raw, encoded = ask(router()), ask(router(codec=GOOD, guard_share=0.0))
    stages = encoded["route"]["segments"]
    assert "codecs" not in stages[0]
    assert stages[1]["codecs"] == {"p6": GOOD}
    assert stages[1]["sent_bytes"] < raw["route"]["segments"][1]["sent_bytes"]
    assert [c["label"] for c in encoded["classes"]] == [c["label"] for c in raw["classes"]]


@pytest.mark.parametrize("given", [{"codec": "int9/1"}, {"codec": "int8/1@0.5"}, {"codec": "transform/4@2"}])
def test_a_codec_that_is_none_stops_the_start(
    given: dict[str, Any], photos: Published, hops: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as e:
        create_router_app(router_settings(photos, tmp_path, hops, **given))
    assert e.value.facts["variable"] == "codec"


def test_a_share_above_one_stops_the_start(photos: Published, hops: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="guard_share"):
        create_router_app(router_settings(photos, tmp_path, hops, guard_share=1.5))


def test_a_calibrated_codec_without_calibration_is_refused_by_name(
    photos: Published, hops: tuple[str, str], tmp_path: Path
) -> None:
    client = create_router_app(router_settings(photos, tmp_path, hops, codec="transform/4@0.5")).test_client()
    assert until(lambda: "no calibration" in client.get("/ready").get_data(as_text=True))
    assert client.get("/ready").status_code == 503


# The guard


def test_a_codec_that_keeps_the_answers_is_checked_and_stays(router: Routers) -> None:
    client = router(codec=GOOD, guard_share=1.0)

    def checked() -> bool:
        ask(client)
        return value(client, "isthmus_guard_checks_total") >= 5

    assert until(checked)
    assert value(client, "isthmus_guard_disagreements_total") == 0
    assert value(client, "isthmus_guard_step") == 0
    assert "guard_step" not in ask(client)["route"]


def test_a_codec_that_loses_answers_steps_aside_and_the_router_says_so(
    router: Routers, caplog: pytest.LogCaptureFixture
) -> None:
    client = router(codec=BAD, guard_share=1.0, log_level="warning")
    seeds = iter(range(100_000))

    def stepped() -> bool:
        ask(client, next(seeds))
        return value(client, "isthmus_guard_step") >= 1

    with caplog.at_level(logging.WARNING, "isthmus"):
        assert until(stepped)
        eventually(lambda: bool(warnings_of_the_guard(caplog)))  # it steps, and then says so
    route = ask(client)["route"]
    assert route["guard_instead_of"] == BAD
    assert route["guard_step"] >= 1
    assert route["guard_codec"] != BAD
    said = warnings_of_the_guard(caplog)[0]
    assert said.facts["disagreement"] > said.facts["limit"]  # type: ignore[attr-defined]
    inputs = {"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": [0.5] * 192}
    assert client.post("/v2/models/photos/infer", json={"inputs": [inputs]}).json["parameters"]["guard_step"] >= 1


def test_no_share_means_no_checks(router: Routers) -> None:
    client = router(codec=BAD, guard_share=0.0)
    for seed in range(20):
        ask(client, seed)
    assert not until(lambda: value(client, "isthmus_guard_checks_total") > 0, 0.3)


def test_raw_and_exact_routes_are_not_checked(router: Routers) -> None:
    for codec in ("", "lossless/3", "sparse/2"):
        client = router(codec=codec, guard_share=1.0)
        ask(client)
        assert not until(lambda c=client: value(c, "isthmus_guard_checks_total") > 0, 0.2)  # type: ignore[misc]


def gradient(seed: int) -> Any:
    """A photo of one colour that fades a little: what the codec below is calibrated with."""
    rng = np.random.default_rng(seed)
    base, slope = rng.uniform(60, 200, 3), rng.uniform(-6, 6, (2, 3))
    y, x = np.mgrid[:8, :8][..., None]
    return tensor(base + slope[0] * y + slope[1] * x + rng.normal(0, 2, (8, 8, 3)))


def noise(seed: int) -> Any:
    """A photo of noise, which that calibration never saw."""
    return tensor(np.random.default_rng(seed).integers(0, 256, (8, 8, 3)))


def tensor(pixels: Any) -> Any:
    return ((np.clip(pixels, 0, 255) - 127) / 128).astype(np.float32).transpose(2, 0, 1)[None]


def test_inputs_that_drift_from_the_calibration_make_it_step_down(
    original: Published, router: Routers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "gradients"
    data.mkdir()
    for seed in range(60):
        np.save(data / f"{seed}.npy", gradient(seed))
    choices = [Choice("transform/4", 0.5), Choice("int8/1")]
    made = calibrate(
        executor_of(original, tmp_path / "cache"),
        open_source(original.bundle, list_files(data), "gradients", 60),
        CalibrationSpec(["1"], 60, 0.95, measure_for(original.bundle), choices),
        tmp_path,
    )
    assert offered(made.fidelity, "1")[0].codec == "transform/4"
    original.registry.publish(made.bundle, made.files, alias="prod")
    client = router(codec="transform/4@0.5", cuts="1", guard_share=1.0, log_level="warning")

    def ask_tensor(x: Any) -> Any:
        body = {"inputs": [{"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": x.ravel().tolist()}]}
        return client.post("/v2/models/photos/infer", json=body).json["parameters"]

    checks = client.application.extensions["isthmus"].metrics.guard_checks

    def count() -> float:
        return max(sample.value for metric in checks.collect() for sample in metric.samples if "total" in sample.name)

    def checked(many: int, make: Callable[[int], Any]) -> bool:
        """Ask until so many were checked or a step was taken."""
        for seed in range(1000, 1000 + many):
            before = count()
            # A tensor that no codec makes smaller is not checked, nor is what is asked beside a check.
            if "codecs" in ask_tensor(make(seed)):
                eventually(lambda before=before: count() > before)  # type: ignore[misc]
            if not seed % 5 and value(client, "isthmus_guard_step"):
                return True
        return False

    assert not checked(20, gradient)
    assert value(client, "isthmus_guard_step") == 0
    assert value(client, "isthmus_guard_disagreement") <= 0.1
    with caplog.at_level(logging.WARNING, "isthmus"):
        assert checked(1000, noise)
        eventually(lambda: bool(warnings_of_the_guard(caplog)))
    assert ask_tensor(noise(0))["guard_instead_of"] == "transform/4@0.5"
    first = warnings_of_the_guard(caplog)[0]
    assert first.facts["guard_codec"] == "transform/4@0.75"  # type: ignore[attr-defined]


# Its parts, without sockets


def sample(photos: Published, hop: Any, answer: Any, step: int = 0) -> Sample:
    whole = photos.bundle.segment("..")
    route = Route(photos.digest, photos.bundle, (whole,), (hop,), ({"x": Encoding("sparse/2", 0.2)},))
    return Sample(route, photos.inputs, {}, {"logits": answer}, step)


def guard(**given: Any) -> Guard:
    log = logging.getLogger("isthmus.guard-test")
    return Guard(1.0, lambda _: None, FunctionMetrics(), log, **({"deadline_s": LONG_S} | given))


def test_two_wrong_answers_are_a_step_and_two_in_a_hundred_are_none(photos: Published) -> None:
    one, other = np.eye(5, dtype=np.float32)[None, 0], np.eye(5, dtype=np.float32)[None, 1]
    hop = Echo({"logits": one})
    quick = guard()
    for _ in range(2):
        quick.check(sample(photos, hop, other))
    assert quick.apply_fallback(sample(photos, hop, one).route)[1].level == 1
    slow = guard()
    for i in range(100):
        slow.check(sample(photos, hop, other if i in (50, 90) else one))
    assert slow.apply_fallback(sample(photos, hop, one).route)[1].level == 0


def test_a_check_of_a_codec_that_has_stepped_aside_counts_no_more(photos: Published) -> None:
    one, other = np.eye(5, dtype=np.float32)[None, 0], np.eye(5, dtype=np.float32)[None, 1]
    hop = Echo({"logits": one})
    made = guard()
    for _ in range(20):
        made.check(sample(photos, hop, other, step=0))
    route = sample(photos, hop, one).route
    taken, fallback = made.apply_fallback(route)
    assert fallback.level == 1
    assert taken.encodings[0]["x"] == Encoding("sparse/2", 0.6)


def test_every_step_is_safer_and_the_last_is_raw(photos: Published) -> None:
    one, other = np.eye(5, dtype=np.float32)[None, 0], np.eye(5, dtype=np.float32)[None, 1]
    hop = Echo({"logits": one})
    made, seen = guard(), []
    for step in range(6):
        for _ in range(2):
            made.check(sample(photos, hop, other, step))
        seen.append(made.apply_fallback(sample(photos, hop, one).route)[0].encodings[0].get("x"))
    assert seen[-1] is None
    assert [p.codec for p in seen if p] == ["sparse/2", "sparse/2", "int8/1", "half/1"]


def test_a_hop_that_is_away_teaches_the_guard_nothing(photos: Published) -> None:
    hop = Echo({})
    hop.fails = True
    made = guard()
    route = sample(photos, hop, np.zeros((1, 5), np.float32)).route
    stage = SegmentRun("..", "echo", 0, 0, codecs={"x": "sparse/2"})
    result = Result({"logits": np.zeros((1, 5), np.float32)}, (stage,))
    made.watch(route, made.apply_fallback(route)[1], photos.inputs, {}, result)
    assert made.apply_fallback(route)[1].level == 0


def test_a_fidelity_that_cannot_be_read_is_warned_of_once_for_each_bundle(
    photos: Published, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(bundle: Any) -> Fidelity:
        raise CalibrationError("written by another version", hint="calibrate again")

    log = logging.getLogger("isthmus.guard-test")
    made = Guard(1.0, unreadable, FunctionMetrics(), log, deadline_s=LONG_S)
    answer = np.zeros((1, 5), np.float32)
    asked = sample(photos, Echo({"logits": answer}), answer)
    others = replace(asked, route=replace(asked.route, digest="sha256:" + "0" * 64))
    with caplog.at_level(logging.WARNING, "isthmus"):
        for each in (asked, asked, others, asked):
            with pytest.raises(CalibrationError):
                made.check(each)
    said = [r.facts for r in warnings_of_the_guard(caplog)]  # type: ignore[attr-defined]
    assert [facts["bundle"] for facts in said] == [photos.digest, others.route.digest]
    assert said[0] | {"bundle": ""} == {
        "bundle": "",
        "type": "CalibrationError",
        "error": "written by another version",
        "hint": "calibrate again",
    }


def measured_entry(codec: str, quality: float, agreement: float) -> Entry:
    return Entry("6", codec, quality, agreement, 0, 1, 0, 10, 10, 1, 0, 0, 0, agreement >= 0.99, agreement)


def test_the_fallback_chain_leaves_out_what_was_measured_to_be_no_safer() -> None:
    entries = (
        measured_entry("transform/4", 0.5, 0.99),
        measured_entry("int8/1", 1.0, 0.95),
        measured_entry("half/1", 1.0, 1.0),
    )
    measured = Fidelity("", 0.99, Measure("top1", "logits"), Inputs("", 1, 1, 1), entries)
    chosen = Choice("transform/4", 0.5)
    higher = [Choice("transform/4", 0.75), Choice("transform/4", 1.0)]
    assert fallback_chain(chosen, "6", measured) == (chosen, *higher, Choice("half/1"), RAW)
    assert fallback_chain(chosen, "6", None) == (chosen, *higher, Choice("int8/1"), Choice("half/1"), RAW)
    assert fallback_chain(Choice("half/1"), "6", None) == (Choice("half/1"), RAW)


def test_the_fallback_chain_goes_from_closer_looks_to_the_last_quality_for_every_answer() -> None:
    rest = (Choice("int8/1"), Choice("half/1"), RAW)
    higher = tuple(map(of, (0.6, 0.8, 1.0)))
    assert fallback_chain(ONE, "6", None) == (ONE, *higher, *rest)
    assert fallback_chain(TWO, "6", None) == (TWO, *higher, *rest)
    to_the_end = replace(ONE, looks=(Look(0.6, 0.2), Look(1.0, 0.2)))
    assert fallback_chain(to_the_end, "6", None) == (to_the_end, of(1.0), *rest)
    measured = structs.replace(FIDELITY, entries=(LOOKED, structs.replace(entry(1.0, 250, 0.98), codec="int8/1")))
    assert fallback_chain(ONE, "6", measured) == (ONE, *higher, Choice("half/1"), RAW)


@given(choices())
def test_every_fallback_chain_starts_with_what_is_sent_and_its_last_quality_and_ends_raw(choice: Choice) -> None:
    steps = fallback_chain(choice, "6", None)
    assert steps[0] == choice
    assert not choice.looks or steps[1] == choice.last
    assert steps[-1] == RAW
    assert len(set(steps)) == len(steps)
    qualities = [step.quality for step in steps[1:] if step.codec == choice.codec]
    assert qualities == sorted(qualities)
