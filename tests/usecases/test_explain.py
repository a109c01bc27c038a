"""Explanations of plans: the runners-up by the plan's objective, and each refusal with its reason and figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from isthmus.artifacts.conditions import Constraints
from isthmus.artifacts.fidelity import Entry, Fidelity, Inputs, Measure
from isthmus.artifacts.plan import Coding, Error, Measured
from isthmus.settings import RegistrySettings
from isthmus_tools.planner.publishing import publish_plan
from isthmus_tools.usecases import explain as use_case
from isthmus_tools.usecases.explain import PlanExplanation, RunnerUp, explain
from support.bundles import publish_photos
from support.cli import isthmus
from support.plans import DIGEST, candidate, plan_for

JPEG = {"x": Coding("photo/1", 0.85)}
PLAIN = Entry("6", "int4/1", 1.0, 0.912, 0.8, 1, 0.1, 947, 1000, 4.0, 0.2, 0.2, 0.0, False, 0.912)


def seconds(name: str, kind: str, took: float, **facts: object) -> object:
    return replace(candidate(name, kind), measured=Measured(took, took, took, 5), **facts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A registry whose model has a plan: a split chosen, one behind, a predicted one, three refused."""
    published = publish_photos(tmp_path)
    chosen = seconds("split-6-int8", "split", 0.1, cuts=("6",), codecs={"p6": Coding("int8/1")})
    refused = [
        seconds(
            "edge-int8", "edge", 0.08, variant=DIGEST, refused="its error is 0.65, of 0.05", error=Error(0.65, 8, 0.25)
        ),
        replace(
            candidate("cloud-jpeg-85", "cloud"),
            input="photo",
            codecs=JPEG,
            refused="56.2% of 16 photos agree, of 99.0%",
        ),
        replace(candidate("split-1-raw", "split"), cuts=("1",), refused="it failed: no memory"),
    ]
    behind = [seconds("edge-float", "edge", 0.15), candidate("cloud-photo", "cloud", seconds=0.01, input="photo")]
    plan = plan_for(published.bundle, chosen, candidates=(chosen, *refused, *behind))  # type: ignore[arg-type]
    plan = replace(plan, constraints=Constraints(max_disagreement=0.05))
    publish_plan(published.registry, published.bundle, {}, plan, alias="prod")
    return published.folder


def explained(folder: Path) -> PlanExplanation:
    return explain("photos", RegistrySettings(registry=str(folder)))


def test_runners_up_are_those_that_competed_with_how_far_behind_they_are(folder: Path) -> None:
    # A prediction did not compete with measurements, however fast it is.
    (runner_up,) = explained(folder).runners_up
    assert runner_up == RunnerUp("edge-float", "the whole model at the edge", pytest.approx(0.5))


def test_each_refusal_has_its_reason_and_figure(folder: Path) -> None:
    refusals = {refusal.name: refusal for refusal in explained(folder).refusals}
    assert refusals.keys() == {"edge-int8", "cloud-jpeg-85", "split-1-raw"}
    int8 = refusals["edge-int8"]
    assert (int8.what, int8.reason) == ("int8 at the edge", "its error is 0.65, of 0.05")
    assert (int8.agreement, int8.inputs, int8.asked) == (0.75, 8, 0.95)
    assert refusals["cloud-jpeg-85"].what == "a JPEG of quality 85 to the cloud"
    assert (refusals["split-1-raw"].what, refusals["split-1-raw"].agreement) == ("a split at 1, raw", None)


def test_a_codec_that_calibration_never_offers_is_refused_with_its_best_agreement(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = replace(PLAIN, codec="int8/1", agreement=0.995, offered=True)
    poor = replace(PLAIN, codec="int8/1", agreement=0.5, quality=0.5)
    elsewhere = replace(PLAIN, cut="1", agreement=0.1)
    entries = (PLAIN, replace(PLAIN, quality=0.5, agreement=0.4), good, poor, elsewhere)
    fidelity = Fidelity("s", 0.99, Measure("top1", "logits"), Inputs("x", 1, 1, 200), entries)
    monkeypatch.setattr(use_case, "read_fidelity", lambda *_: fidelity)
    (refusal,) = (r for r in explained(folder).refusals if not r.is_candidate)
    assert refusal.what == "int4/1 at the cut 6"
    assert refusal.reason == "it keeps 91.2% of 200 predictions, 99.0% asked"


def test_the_command_prints_each_and_json_has_each(folder: Path) -> None:
    text = isthmus("explain", "photos", "--registry", folder).stdout
    for line in (
        "chosen: a split at 6, int8/1 (split-6-int8)",
        "  the whole model at the edge (edge-float): 50.0% worse",
        "  int8 at the edge (edge-int8): its error is 0.65, of 0.05; it keeps 75.0% of 8 predictions, 95.0% asked",
        "  a JPEG of quality 85 to the cloud (cloud-jpeg-85): 56.2% of 16 photos agree, of 99.0%",
    ):
        assert f"\n{line}\n" in text
    document = json.loads(isthmus("explain", "photos", "--registry", folder, "--json").stdout)["explanation"]
    assert (document["chosen"], document["what"]) == ("split-6-int8", "a split at 6, int8/1")
    assert [each["candidate"] for each in document["runners_up"]] == ["edge-float"]
    assert {each["name"]: each["agreement"] for each in document["refused"]}["edge-int8"] == 0.75
