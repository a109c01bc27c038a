"""`isthmus plan` and `isthmus explain`, end to end: real functions, a real link, and a router that serves the plan."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from isthmus.artifacts.plan import from_json, read_plan
from isthmus.errors import LocalError, ModelError
from isthmus.serving import create_router_app
from isthmus_tools.netem.process import link_to
from isthmus_tools.planner.choice import MAP_RATES
from isthmus_tools.planner.publishing import publish_plan
from isthmus_tools.planner.regions import SLOWDOWNS
from isthmus_tools.profiling import profiles
from support.bundles import (
    Published,
    free_model,
    photo,
    publish,
    publish_photos,
    ready,
    router_settings,
    segment_settings,
)
from support.cli import isthmus
from support.plans import candidate, plan_for, profile_of
from support.routers import served_functions

LINK = ["--uplink", "20mbit", "--rtt", "30ms"]


@dataclass(frozen=True)
class Place:
    """A published model with made-up profiles, and two functions that run it."""

    published: Published
    head: str
    tail: str
    folder: Path

    @property
    def registry(self) -> list[str]:
        return ["--registry", str(self.published.folder)]

    @property
    def functions(self) -> list[str]:
        return ["--head", self.head, "--tail", self.tail]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("plan")
    published = publish_photos(folder)
    for tier, seconds in (("edge", 0.004), ("cloud", 0.001)):
        profiles.put(published.registry, profile_of(published, tier, seconds))
    (folder / "photos").mkdir()
    for n in range(2):
        (folder / "photos" / f"{n}.png").write_bytes(photo(seed=n))
    with served_functions(*(segment_settings(published, folder / name) for name in ("head", "tail"))) as (head, tail):
        yield Place(published, head, tail, folder)


def planned(place: Place, *arguments: object) -> Any:
    photos = ["--input", place.folder / "photos"]
    result = isthmus("plan", "photos", *LINK, *photos, "--no-int8", *arguments, *place.registry, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def measured(place: Place) -> Any:
    return planned(place, *place.functions, "--sweep")


def test_the_candidates_run_over_the_link_and_the_plan_is_published(place: Place, measured: Any) -> None:
    plan = from_json(json.dumps(measured["plan"]).encode())
    assert plan.measured
    assert plan.inputs == "photo"
    seen = {c.name: c for c in plan.candidates if c.measured is not None}
    assert {"edge-float", "cloud-photo", "cloud-raw"} <= seen.keys()
    assert any(c.kind == "split" for c in seen.values())
    for c in seen.values():
        assert c.measured is not None
        assert c.measured.low <= c.measured.median <= c.measured.high
        # The link lets nothing through faster than it is.
        if c.kind != "edge":
            assert c.measured.median >= 0.03 + 8 * c.up_bytes / 20e6
    # A link of 30 ms leaves a model of microseconds at the edge, on a busy machine too.
    assert plan.choice.kind == "edge"
    assert plan.choice.measured is not None
    assert plan.choice.measured.runs >= 5
    assert plan.typical_gap is not None
    assert math.isclose(plan.typical_gap, measured["typical_gap"])
    bundle = place.published.registry.resolve("photos").bundle
    assert bundle.plan is not None
    assert measured["version"] == f"photos:{place.published.registry.resolve('photos').version}"


def test_the_router_serves_what_was_planned(place: Place, measured: Any) -> None:
    # A router that adapts would find out that there is no such link here.
    settings = router_settings(place.published, place.folder / "router", (place.head, place.tail), adapt=False)
    answer = json.loads(ready(create_router_app(settings).test_client()).post("/", data=photo()).data)
    assert answer["route"]["name"] == measured["plan"]["chosen"]
    assert [s["segment"] for s in answer["route"]["segments"]] == [".."]


def test_the_sweep_has_the_best_of_every_link(measured: Any) -> None:
    cells = measured["sweep"]
    names = {c["name"] for c in measured["plan"]["candidates"]}
    assert len(cells) == 11 * 8
    assert {cell["best"] for cell in cells} <= names
    assert all(cell["seconds"] > 0 for cell in cells)


def test_the_map_names_the_region_of_every_edge_and_link(place: Place, measured: Any) -> None:
    found = measured["map"]
    names = {c["name"]: c["kind"] for c in measured["plan"]["candidates"]}
    assert len(found["cells"]) == len(SLOWDOWNS) * len(MAP_RATES)
    assert all(names[cell["best"]] == cell["region"] for cell in found["cells"])
    assert found["rtt_s"] == 0.03
    assert found["requested"] == {"edge_slowdown": pytest.approx(4.0), "bandwidth_bps": 20e6}
    shown = isthmus("explain", "photos", "--sweep", *place.registry).stdout
    assert "where splitting pays" in shown
    # By predictions, so another candidate than the chosen one, which is the fastest measured, may be the best.
    nearest = min(
        (cell for cell in found["cells"] if cell["edge_slowdown"] == 4),
        key=lambda cell: abs(math.log(cell["bandwidth_bps"] / 20e6)),
    )
    assert f"nearest to 4× and the link: {nearest['best']}" in shown


def test_explain_says_why_and_draws_it_for_both_schemes(place: Place, measured: Any) -> None:
    for name in ("plan.png", "plan.svg"):
        result = isthmus("explain", "photos", "--picture", place.folder / name, *place.registry)
        assert result.exit_code == 0, result.output
    assert measured["plan"]["chosen"] in result.stdout
    assert "edge run" in result.stdout
    assert "the next is" in result.stdout
    assert b"time over bandwidth" in (place.folder / "plan.svg").read_bytes()
    isthmus("explain", "photos", "--sweep", "--picture", place.folder / "map.svg", *place.registry)
    assert b"where splitting pays" in (place.folder / "map.svg").read_bytes()
    with Image.open(place.folder / "plan.png") as image:
        pixels = np.asarray(image.convert("RGBA"), np.float64)
    drawn = pixels[pixels[..., 3] > 250]
    assert (pixels[..., 3] == 0).mean() > 0.3
    light = (drawn[:, :3] @ [0.2126, 0.7152, 0.0722]) / 255
    # What is drawn is in the middle, but for the names on the map's opaque cells.
    assert 0.2 < np.median(light) < 0.7


def test_explain_tells_of_every_refused_candidate(place: Place, tmp_path: Path) -> None:
    published = publish_photos(tmp_path)
    slow = [replace(candidate(f"edge-{n}", seconds=n + 1.0), refused=f"reason {n}") for n in range(20)]
    plan = plan_for(published.bundle, candidate())
    plan = replace(plan, candidates=(*plan.candidates, *slow))
    publish_plan(published.registry, published.bundle, {}, plan, alias="prod")
    result = isthmus("explain", "photos", "--registry", published.folder)
    assert result.exit_code == 0, result.output
    for n in range(20):
        assert f"  the whole model at the edge (edge-{n}): reason {n}\n" in result.stdout


def test_an_svg_holds_text_and_explain_wants_a_known_ending(place: Place, measured: Any) -> None:
    result = isthmus("explain", "photos", "--picture", place.folder / "plan.bmp", *place.registry)
    assert result.exit_code == 1
    assert ".png or .svg" in result.stderr


def test_a_plan_that_is_predicted_only_says_so_and_need_not_be_published(place: Place) -> None:
    before = place.published.registry.versions("photos")
    found = planned(place, "--predict-only", "--no-publish")
    assert found["version"] == ""
    assert found["typical_gap"] is None
    assert any(sentence.startswith("predicted only") for sentence in found["plan"]["why"])
    assert place.published.registry.versions("photos") == before


def test_a_failed_or_interrupted_plan_changes_no_version(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    before = place.published.registry.versions("photos")
    aliases = place.published.registry.aliases("photos")
    common = ["plan", "photos", *LINK, "--input", place.folder / "photos" / "0.png", "--no-int8", *place.registry]
    # Two more cuts than were published, which functions need while candidates are measured.
    for failing, error in (
        ("isthmus_tools.planner.measurement.successive_elimination", KeyboardInterrupt),
        ("draw", ModelError),
    ):
        with monkeypatch.context() as patched:

            def fail(*_: object, error: type[BaseException] = error, **__: object) -> None:
                raise error("stopped here")

            target = failing if "." in failing else "isthmus_tools.figures.plan.draw"
            patched.setattr(target, fail)
            result = isthmus(*common, *place.functions, "--picture", place.folder / "never.png")
        assert result.exit_code != 0
        assert place.published.registry.versions("photos") == before
        assert place.published.registry.aliases("photos") == aliases
    predicted = isthmus(*common)
    assert predicted.exit_code == 0, predicted.output
    assert "not published, since nothing was measured" in predicted.stdout
    assert place.published.registry.versions("photos") == before


def test_a_plan_within_a_time_limit_names_what_it_left_out(place: Place) -> None:
    common = ["--input", place.folder / "photos" / "0.png", *place.functions, *place.registry]
    result = isthmus("plan", "photos", *LINK, "--no-publish", "--time-limit", "1ms", *common, "--json")
    assert result.exit_code == 0, result.output
    plan = from_json(json.dumps(json.loads(result.stdout)["plan"]).encode())
    why = "\n".join(plan.why)
    assert "cuts untried: " in why
    assert "edge-int8 was left out: the time limit" in why
    assert "candidates unmeasured: " in why
    assert "no cut is a candidate" not in why
    assert sum(c.measured is not None for c in plan.candidates) == 1
    assert plan.measured


def test_a_new_cut_keeps_the_plan_and_says_so(place: Place, measured: Any) -> None:
    registry = place.published.registry
    result = isthmus("cut", "photos", "--cut", "1/7", *place.registry)
    assert result.exit_code == 0, result.output
    assert "the plan stays in force: edge-float" in result.stdout
    kept = registry.resolve("photos")
    assert kept.version == registry.versions("photos")[-1].version
    assert f"prod means photos:{kept.version} now" in result.stdout
    plan = read_plan(kept.bundle, registry.blob)
    assert plan is not None
    assert plan.chosen == "edge-float"
    assert "1..7" in kept.bundle.segments
    again = json.loads(isthmus("cut", "photos", "--cut", "1/7", *place.registry, "--json").stdout)
    assert (again["version"], again["alias_was"], again["plan"]) == (kept.version, kept.version, "edge-float")
    default = isthmus("cut", "photos", "--cut", "1", "--default", *place.registry)
    assert "--drop-plan lets the default cuts decide" in default.stdout


def test_a_version_without_the_plan_does_not_serve_unless_asked(place: Place, measured: Any, tmp_path: Path) -> None:
    registry = place.published.registry
    before = registry.resolve("photos").version
    other = publish_photos(tmp_path, seed=1)
    common = ["import", other.onnx, "--name", "photos", *place.registry]
    stays = isthmus(*common)
    assert stays.exit_code == 0, stays.output
    newest = registry.versions("photos")[-1].version
    assert f"prod stays at photos:{before}" in stays.stdout
    assert f"isthmus plan photos:{newest} --uplink 20Mbit/s --rtt 30ms" in stays.stdout
    assert registry.resolve("photos").version == before
    moved = json.loads(isthmus(*common, "--drop-plan", "--json").stdout)
    assert (moved["alias"], moved["alias_was"], moved["alias_moved"], moved["plan_dropped"]) == (
        "prod",
        before,
        True,
        True,
    )
    assert registry.resolve("photos").version == newest
    registry.move_alias("photos", "prod", before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--uplink", "fast"], "--uplink"),
        (["--uplink", "0mbit"], "above 0"),
        (["--rtt", "-1ms"], "--rtt"),
        (["--objective", "joy"], "latency, throughput, cost, energy"),
        (["--objective", "cost"], "needs prices"),
        (["--latency", "50ms"], "needs prices"),
        (["--latency", "soon"], "--latency"),
        (["--time-limit", "later"], "--time-limit"),
        (["--edge-memory", "lots"], "--edge-memory"),
        (["--edge-memory", "0"], "edge_memory_bytes is 0"),
        (["--private-depth", "-2"], "private_depth is -2"),
        (["--private-depth", "10"], "the model has 9 nodes"),
        (["--max-error", "-0.1"], "max_error"),
        (["--prices", "{tmp}/none.toml"], "cannot be read"),
        (["--predict-only", "--head", "http://h", "--tail", "http://t"], "--predict-only"),
        (["--head", "http://127.0.0.1:1/h"], "--tail URL"),
        (["--local", "--head", "http://127.0.0.1:1/h"], "--local"),
        (["--edge-slowdown", "8"], "--local"),
        (["--sweep", "--check", "3"], "--sweep --local --edge-slowdown N"),
        (["--local", "--edge-slowdown", "1"], "above 1 and at most 64"),
        (["--local", "--edge-cpus", "1.5"], "--edge-cpus is 1.5"),
        (["--local", "--edge-cpus", "0.25", "--edge-slowdown", "4"], "give one"),
        (["--input", "{tmp}/none.jpg"], "none.jpg"),
        (["--tensor", "x"], "NAME=FILE.npy"),
        (["--edge-memory", "1kB", "--private-depth", "3"], "no candidate meets edge-memory; the nearest is"),
        (["--objective", "latency", "--latency", "1us"], "no candidate meets latency; the nearest is"),
        (["--picture", "{tmp}/plan.gif"], ".png or .svg"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_input_gets_a_sentence_and_publishes_nothing(
    place: Place, tmp_path: Path, arguments: list[str], said: str
) -> None:
    before = place.published.registry.versions("photos")
    filled = [a.format(tmp=tmp_path) for a in arguments]
    photos = [] if "--tensor" in arguments or "--input" in arguments else ["--input", place.folder / "photos" / "0.png"]
    result = isthmus("plan", "photos", "--no-int8", *filled, *photos, *place.registry)
    assert result.exit_code == 1, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert place.published.registry.versions("photos") == before


def test_functions_that_cannot_be_reached_are_named(place: Place) -> None:
    dead = ["--head", "http://127.0.0.1:1/head", "--tail", "http://127.0.0.1:1/tail"]
    result = isthmus(
        "plan", "photos", "--no-int8", "--input", place.folder / "photos" / "0.png", *dead, *place.registry
    )
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.stderr
    assert "cannot be reached" in result.stderr


def test_a_model_without_profiles_says_how_to_make_them(place: Place, tmp_path: Path) -> None:
    inputs = {"a": np.ones((1, 32), np.float32), "b": np.ones((1, 32), np.float32)}
    other = publish(tmp_path, free_model(tmp_path / "free.onnx"), inputs, bind={"a": (1, 32), "b": (1, 32)})
    result = isthmus("plan", "free", "--registry", other.folder)
    assert result.exit_code == 1
    assert "no profile of free for the tier edge or cloud" in result.stderr
    assert "isthmus profile free" in result.stderr
    none = isthmus("explain", "free", "--registry", other.folder)
    assert none.exit_code == 1
    assert "isthmus plan free" in none.stderr


def test_a_link_is_a_process_that_ends_with_its_block(place: Place) -> None:
    import urllib.request

    with link_to(place.tail, uplink_bps=10e6, rtt_s=0.002) as url, urllib.request.urlopen(f"{url}/ready") as answer:
        assert answer.status == 200
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{url}/ready")
    with pytest.raises(LocalError, match="http"), link_to("https://example.com/function/tail"):
        pass
