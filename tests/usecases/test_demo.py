"""The demo: every figure of its verdict follows from the requests that it sent, and its model is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.fidelity import from_json, offered
from isthmus.artifacts.plan import Candidate, Measured, Terms
from isthmus.errors import CalibrationError, HopUnavailable
from isthmus.registry import open_registry
from isthmus.serving import create_segment_app
from isthmus.settings import RegistrySettings
from isthmus_tools.planner.costs import HEADERS_DOWN, HEADERS_UP
from isthmus_tools.profiling.slow_edge import SlowEdge
from isthmus_tools.usecases import demo, demo_model
from isthmus_tools.usecases.calibrate import CalibrateRequest, calibrate
from isthmus_tools.usecases.demo import DemoRequest
from isthmus_tools.usecases.demo_verdict import Way, judge, lower_envelope
from isthmus_tools.usecases.demo_ways import JPEG_QUALITY
from isthmus_tools.usecases.function_urls import FunctionUrls
from isthmus_tools.zoo.calibration import FOLDER, copy_calibration, shipped_calibration
from support.bundles import Published, photo, publish_photos, segment_settings, served
from support.cli import isthmus
from support.paths import ROOT

CUT, SLOWDOWN = "6", 4.0
LINK = Conditions(5e6, 10e6, 0.002)


def settings(published: Published, cache: Path) -> RegistrySettings:
    return RegistrySettings(registry=str(published.folder), cache_dir=str(cache))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Published, RegistrySettings]:
    folder = tmp_path_factory.mktemp("demo")
    published = publish_photos(folder)
    files = [folder / f"{i}.png" for i in range(24)]
    for i, file in enumerate(files):
        file.write_bytes(photo((24, 24), seed=i))
    registry = settings(published, folder / "cache")
    calibrate(
        CalibrateRequest(model="photos", files=files, data="noise", registry=registry, cuts=[CUT], inputs=24, limit=0.5)
    )
    return published, registry


@pytest.fixture(scope="module")
def document(calibrated: tuple[Published, RegistrySettings], tmp_path_factory: pytest.TempPathFactory) -> Any:
    published, registry = calibrated
    folder = tmp_path_factory.mktemp("functions")
    photos = {f"{i}.png": photo((24, 24), seed=100 + i) for i in range(3)}
    request = DemoRequest(
        registry=registry, photos=photos, conditions=LINK, edge_slowdown=SLOWDOWN, repeat=2, model="photos", cut=CUT
    )
    apps = [create_segment_app(segment_settings(published, folder / name)) for name in ("head", "tail")]
    with served(apps[0]) as head, served(apps[1]) as tail:
        functions = FunctionUrls(head, tail, edge=SlowEdge(SLOWDOWN))
        result = demo.compare(request, open_registry(registry).resolve("photos"), functions)
    assert result.split_is_exact
    return result.document()


def test_each_way_sends_every_photo_as_often_as_asked_and_its_times_add_up(document: Any) -> None:
    names = ["edge-float", "cloud-photo", f"cloud-jpeg-{JPEG_QUALITY}", f"split-{CUT}-raw"]
    assert [way["name"] for way in document["ways"]][:4] == names
    for way in document["ways"]:
        measured, parts = way["measured"], way["measured"]["parts"]
        assert measured["runs"] == len(document["uncut"]) * 2
        assert way["total_ms"] == pytest.approx(1000 * measured["median"])
        assert way["cloud_ms"] == pytest.approx(1000 * parts.get("cloud_run", 0.0))
        edge_s = sum(parts.get(part, 0.0) for part in ("preprocess", "pack", "edge"))
        expected = 1000 * edge_s if way["kind"] != "edge" else way["total_ms"]
        assert way["edge_ms"] == pytest.approx(min(expected, way["total_ms"] - way["cloud_ms"]))
        assert way["edge_ms"] + way["link_ms"] + way["cloud_ms"] == pytest.approx(way["total_ms"])
        agree = sum(way["classes"][name] == said for name, said in document["uncut"].items())
        assert way["photos_agree"] == agree
    edge, whole_photo, jpeg, raw, encoded = document["ways"]
    assert [way["exact"] for way in (edge, whole_photo, jpeg, raw, encoded)] == [True, True, False, True, False]
    assert (edge["up_bytes"], edge["link_ms"]) == (0, 0)
    assert raw["up_bytes"] > 16 * 4 * 4 * 4 > encoded["up_bytes"]
    for way in (edge, whole_photo, raw):
        assert way["photos_agree"] == len(document["uncut"])
        assert way["difference"] < 1e-4
    assert edge["edge_weight_bytes"] > raw["edge_weight_bytes"] == encoded["edge_weight_bytes"] > 0
    assert whole_photo["edge_weight_bytes"] == 0
    # The link's round trip and its rate are in the time that is neither the edge's nor the cloud's.
    assert raw["link_ms"] >= 2 + raw["up_bytes"] * 8 / 5e3


@pytest.mark.parametrize("private", [False, True])
def test_the_verdict_is_the_fastest_way_that_may_serve_with_its_own_figures(document: Any, private: bool) -> None:
    ways = {way["name"]: way for way in document["ways"] if not (private and way["kind"] == "cloud")}
    able = sorted((w for w in ways.values() if not w["refused"]), key=lambda w: w["total_ms"])
    verdict, best = document["verdict_private" if private else "verdict"], able[0]
    assert verdict["best"] == best["name"]
    reasons = " / ".join(verdict["reasons"])
    assert f"the best of {len(able)} for latency, measured" in reasons
    times = able[1]["total_ms"] / best["total_ms"]
    behind = f"{times - 1:.1%} worse" if times < 2 else f"{times:.1f} times as much"
    assert f"{able[1]['name']}, {behind}" in reasons
    assert f"{best['edge_ms']:.0f} ms at the edge, {best['link_ms']:.0f} ms on the link" in reasons
    for way in ways.values():
        assert (f"{way['name']} may not serve" in reasons) == bool(way["refused"])
        assert (f"{way['name']} would be faster" in reasons) == (
            bool(way["refused"]) and way["total_ms"] < best["total_ms"]
        )


def way_of(kind: str, name: str, seconds: float, up_bytes: int, cloud_s: float, weights: int) -> Way:
    parts = {"preprocess": 0.0, "pack": 0.0, "edge": 0.01, "cloud_run": cloud_s}
    measured = Measured(seconds, seconds, seconds, 3, parts)
    candidate = Candidate(name, kind, Terms(), up_bytes=up_bytes, measured=measured)
    return Way(name, candidate, {}, 1, 0.0, weights)


def test_a_split_that_is_best_without_photos_over_the_link_says_what_it_gains() -> None:
    ways = [
        way_of("edge", "edge-float", 0.5, 0, 0.0, 18_500_000),
        way_of("cloud", "cloud-photo", 0.1, 197_000, 0.0096, 0),
        way_of("split", "split-31-int8", 0.4, 13_600, 0.0036, 334_200),
    ]
    verdict = judge(ways, LINK, 32.0, private=True)
    assert (judge(ways, LINK, 32.0).best, verdict.best) == ("cloud-photo", "split-31-int8")
    assert verdict.reasons[-2:] == (
        "beside cloud-photo: no photo leaves the edge, 13.6 kB over the link instead of 197.0 kB, 3.6 ms of the cloud"
        " instead of 9.6 ms",
        "beside edge-float: 334.2 kB of weights at the edge instead of 18.5 MB",
    )
    slow_split = [*ways[:2], way_of("split", "split-31-int8", 0.6, 13_600, 0.0036, 334_200)]
    assert "beside" not in " ".join(judge(slow_split, LINK, 32.0, private=True).reasons)


def test_a_way_that_failed_over_the_link_has_no_verdict() -> None:
    failed = Way("x", Candidate("split-6-raw", "split", Terms(), refused="it failed: reset"), {}, 1, 0.0)
    with pytest.raises(HopUnavailable, match="split-6-raw was not measured: it failed: reset"):
        failed.document()


def ms_at(way: Any, rate: float, slowdown: float) -> float:
    bits = 8 * (way["up_bytes"] + HEADERS_UP), 8 * (way["down_bytes"] + HEADERS_DOWN) / 2
    moved = 1000 * sum(bits) * (1 / rate - 1 / 5e6) if way["up_bytes"] else 0.0
    return float(way["total_ms"] + moved + way["edge_ms"] * (slowdown / SLOWDOWN - 1))


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("axis", ["by_bandwidth", "by_slowdown"])
def test_the_verdict_changes_where_another_way_becomes_the_fastest(document: Any, axis: str, private: bool) -> None:
    able = [way for way in document["ways"] if not (way["refused"] or (private and way["kind"] == "cloud"))]
    ranges = document["verdict_private" if private else "verdict"][axis]
    low, high = (0.05e6, 1e9) if axis == "by_bandwidth" else (1.0, 64.0)
    assert ranges[0]["start"] == pytest.approx(low)
    for i in range(200):
        x = low * (high / low) ** ((i + 0.5) / 200)
        said = [r["best"] for r in ranges if r["start"] <= x][-1]
        at = {w["name"]: ms_at(w, *((x, SLOWDOWN) if axis == "by_bandwidth" else (5e6, x))) for w in able}
        assert at[said] <= min(at.values()) + 1e-6, (x, said, at)


def test_the_lowest_line_changes_where_lines_cross() -> None:
    lines = {"flat": (3.0, 0.0), "steep": (0.0, 2.0), "never": (9.0, 1.0)}
    assert lower_envelope(lines, 0.0, 10.0) == [("steep", 0.0), ("flat", 1.5)]
    assert lower_envelope(lines, 2.0, 10.0) == [("flat", 2.0)]


def test_a_calibration_that_is_copied_comes_with_its_own_model_only(
    calibrated: tuple[Published, RegistrySettings], tmp_path: Path
) -> None:
    published, registry = calibrated
    assert shipped_calibration(published.bundle, tmp_path) is None
    copy_calibration("photos", registry, tmp_path)
    shipped = shipped_calibration(published.bundle, tmp_path)
    assert shipped is not None
    bundle, files = shipped
    there = open_registry(registry).resolve("photos").bundle
    assert (bundle.tables, bundle.fidelity) == (there.tables, there.fidelity)
    assert files.keys() == {blob.digest for blob in (*bundle.tables.values(), bundle.fidelity) if blob}
    assert shipped_calibration(publish_photos(tmp_path / "other", seed=1).bundle, tmp_path) is None
    (tmp_path / "photos" / "elsewhere.table").write_bytes(b"")
    assert shipped_calibration(published.bundle, tmp_path) is None


def test_a_model_without_calibration_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    published = publish_photos(tmp_path)
    registry = settings(published, tmp_path / "cache")
    request = DemoRequest(registry=registry, photos={}, model="photos", cut=CUT)
    with pytest.raises(CalibrationError, match="not calibrated at the cut 6"):
        demo.compare(request, open_registry(registry).resolve("photos"), FunctionUrls("http://none", "http://none"))


def test_preparing_twice_publishes_once_and_takes_the_calibration_that_comes_along(
    calibrated: tuple[Published, RegistrySettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_calibration("photos", calibrated[1], tmp_path / "shipped")
    monkeypatch.setattr(
        demo_model, "shipped_calibration", lambda bundle: shipped_calibration(bundle, tmp_path / "shipped")
    )
    registry = settings(publish_photos(tmp_path), tmp_path / "cache")
    first = demo_model.prepare(registry, "photos", CUT)
    there = open_registry(calibrated[1]).resolve("photos").bundle
    assert (first.version, first.bundle.fidelity) == ("2", there.fidelity)
    assert demo_model.prepare(registry, "photos", CUT) == first


def test_the_calibration_in_the_package_offers_the_demos_cut_a_codec_and_knows_the_jpeg() -> None:
    folder = FOLDER / demo.MODEL
    fidelity = from_json((folder / "fidelity.json").read_bytes())
    assert demo.CUT in fidelity.cuts()
    assert any(entry.codec.startswith("transform/") for entry in offered(fidelity, demo.CUT))
    assert JPEG_QUALITY in {r.quality for r in fidelity.references if r.codec == "jpeg"}
    assert [file.suffix for file in folder.iterdir() if file.name != "fidelity.json"] == [".table"]


def test_the_demo_leaves_the_registry_of_the_environment_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[RegistrySettings] = []

    def prepared(registry: RegistrySettings, *more: object) -> None:
        seen.append(registry)
        raise CalibrationError("far enough")

    monkeypatch.setattr(demo_model, "prepare", prepared)
    monkeypatch.setenv("ISTHMUS_REGISTRY", str(tmp_path / "mine"))
    (tmp_path / "cat.png").write_bytes(photo())
    ran = isthmus("demo", tmp_path / "cat.png", "--stack", ROOT / "stack.yml", "--uplink", "1mbit")
    assert (ran.exit_code, [each.registry for each in seen]) == (1, [".isthmus/demo"])
