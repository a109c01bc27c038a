"""Under steady load nothing is lost: functions rolled one after the other, aliases moved, plans published.

The functions are processes of the local engine, which rolls as OpenFaaS does: a new process, once it is ready SIGTERM
to the old one, which ends its requests. Each response is one version's, right to its tolerance: the head of a version
with the tail of another would be neither's.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import urllib3
from prometheus_client.parser import text_string_to_metric_families

from isthmus_tools.cli.options import stack_variables
from isthmus_tools.engine import Engine
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import Published, photo, publish_photos
from support.local_stack import http, system
from support.paths import ROOT
from support.patience import LONG_S, eventually
from support.plans import candidate, plan_for
from support.routers import expected_classes

PHOTO = photo(seed=3)
CALLERS, PAUSE_S = 3, 0.04
LOAD_SECONDS = "isthmus_stage_seconds_sum"
HEAD_AND_TAIL, WHOLE_AT_THE_EDGE = ["..6", "6.."], [".."]


@dataclass
class Site:
    """The functions, and two versions of one model of which the alias `live` is one."""

    engine: Engine
    versions: tuple[Published, Published]

    def move(self, version: int) -> None:
        published = self.versions[version]
        published.registry.move_alias("photos", "live", published.version)

    def roll(self, name: str) -> None:
        """Replace the processes of a function, and wait until the new one is ready."""
        before = system(self.engine, "GET", f"/system/function/{name}").json()
        environment = {**before["envVars"], "max_concurrency": "24"}
        doc = {"service": name, "image": before["image"], "envVars": environment, "limits": before["limits"]}
        doc |= {"labels": before["labels"], "annotations": before["annotations"]}
        assert system(self.engine, "PUT", "/system/functions", body=json.dumps(doc)).status == 202
        eventually(lambda: system(self.engine, "GET", f"/system/function/{name}").json()["availableReplicas"] == 1)

    def load_seconds(self, name: str) -> float:
        """Seconds that requests waited for a load of a segment, since the function's start."""
        text = http("GET", f"{self.engine.url}/function/{name}/metrics").data.decode()
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return sum(s.value for s in samples if (s.name, s.labels.get("stage")) == (LOAD_SECONDS, "load"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("photos")
    first = publish_photos(folder / "first", registry=folder / "registry")
    second = publish_photos(folder / "second", seed=1, registry=folder / "registry")
    first.registry.move_alias("photos", "live", first.version)
    environment = {
        "*": {"threads": "1", "cache_dir": str(folder / "cache"), "deadline_s": "15", "exec_timeout": "20s"},
        "router": {"model": "photos:live", "refresh_s": "0.2"},
        "edge-head": {"preload": "photos:live@head"},
        "cloud-tail": {"preload": "photos:live@tail"},
    }
    with Engine(
        ROOT / "stack.yml",
        environment=environment,
        variables=stack_variables(str(folder / "registry")),
        asynchronous=False,
        drain_s=LONG_S,
    ) as engine:
        engine.wait_ready(2 * LONG_S)
        yield Site(engine, (first, second))


@dataclass
class SteadyLoad:
    """Callers that send a photo again and again, and the responses, in the order of their end."""

    url: str
    replies: list[tuple[int, Any]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def call(self) -> None:
        with urllib3.PoolManager(retries=False) as pool:
            while not self.ended.wait(PAUSE_S):
                reply = pool.request("POST", self.url, body=PHOTO, timeout=LONG_S)
                self.replies.append((reply.status, json.loads(reply.data)))

    def segments(self) -> list[str]:
        """The segments of the latest response."""
        return [s["segment"] for s in self.replies[-1][1]["route"]["segments"]] if self.replies else []

    def version(self) -> str:
        """The version of the latest response."""
        return str(self.replies[-1][1].get("model_version", "")) if self.replies else ""

    def rest(self) -> None:
        """Wait for some more responses."""
        count = len(self.replies) + 10
        eventually(lambda: len(self.replies) >= count)


@contextmanager
def steady_load(site: Site) -> Iterator[SteadyLoad]:
    load = SteadyLoad(f"{site.engine.url}/function/router")
    callers = [threading.Thread(target=load.call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    try:
        load.rest()
        yield load
        load.rest()
    finally:
        load.ended.set()
        for caller in callers:
            caller.join()


def assert_all_right(site: Site, load: SteadyLoad) -> None:
    """Every response is 200, and the prediction of the version that it names; no request waited for a load."""
    lost = [(status, reply) for status, reply in load.replies if status != 200]
    assert not lost, lost[:3]
    expected = {p.version: expected_classes(p, PHOTO) for p in site.versions}
    for _, reply in load.replies:
        right = expected.get(reply["model_version"]) or expected[site.versions[0].version]
        assert [c["index"] for c in reply["classes"]] == [c["index"] for c in right]
        assert [c["probability"] for c in reply["classes"]] == pytest.approx(
            [c["probability"] for c in right], abs=1e-4
        )
    assert [site.load_seconds(name) for name in ("edge-head", "cloud-tail")] == [0, 0]


def test_functions_that_are_rolled_one_after_the_other_lose_no_request(site: Site) -> None:
    with steady_load(site) as load:
        for name in ("edge-head", "cloud-tail", "router"):
            site.roll(name)
            load.rest()
    assert_all_right(site, load)
    assert load.segments() == HEAD_AND_TAIL


def test_an_alias_that_moves_there_and_back_loses_and_mixes_nothing(site: Site) -> None:
    first, second = (p.version for p in site.versions)
    with steady_load(site) as load:
        for version in (1, 0, 1, 0):
            site.move(version)
            eventually(lambda moved=(first, second)[version]: load.version() == moved)  # type: ignore[misc]
            load.rest()
    assert_all_right(site, load)
    assert {reply["model_version"] for _, reply in load.replies} == {first, second}


def test_a_plan_that_is_published_with_another_choice_loses_no_request(site: Site) -> None:
    first = site.versions[0]
    split = candidate("split-6", "split", 0.01, cuts=("6",))
    edge = candidate("edge-float", "edge", 0.02)
    with steady_load(site) as load:
        for choice, segments in ((edge, WHOLE_AT_THE_EDGE), (split, HEAD_AND_TAIL), (edge, WHOLE_AT_THE_EDGE)):
            plan = plan_for(first.bundle, choice, candidates=(choice,))
            publish_plan(first.registry, first.bundle, {}, plan, alias="live")
            eventually(lambda want=segments: load.segments() == want)  # type: ignore[misc]
            load.rest()
        site.move(0)
        eventually(lambda: load.version() == first.version)
    assert_all_right(site, load)
