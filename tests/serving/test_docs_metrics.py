"""docs/reference/metrics.md lists the metrics, endpoints and stages that the functions have, and no others."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from isthmus.events.processing import MessageCounts
from isthmus.serving import create_router_app, create_segment_app
from isthmus.serving.metrics import FunctionMetrics
from support.bundles import Published, framed, photo, ready, router_settings, segment_settings, served
from support.bundles import photos as photos
from support.nats_server import NatsServer, unique_subject
from support.paths import ROOT
from support.patience import eventually
from support.trigger_apps import configuration_text, held_router, running_trigger

TEXT = (ROOT / "docs" / "reference" / "metrics.md").read_text()
COMMON, _, REST = TEXT.partition("## Routing")
ROUTING, _, TRIGGER = REST.partition("## The trigger")


def rows(text: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Type and labels of each metric in a table."""
    return {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", text, re.MULTILINE)
    }


ROWS = rows(COMMON)


@pytest.fixture
def segment(photos: Published, tmp_path: Path) -> FlaskClient:
    return ready(create_segment_app(segment_settings(photos, tmp_path / "segment")).test_client())


@pytest.fixture
def router(photos: Published, tmp_path: Path) -> FlaskClient:
    return ready(create_router_app(router_settings(photos, tmp_path / "router", ("local",), page=True)).test_client())


def families(client: FlaskClient) -> dict[str, Any]:
    return {f.name: f for f in text_string_to_metric_families(client.get("/metrics").get_data(as_text=True))}


def test_every_metric_is_documented_with_its_type(segment: FlaskClient, router: FlaskClient) -> None:
    documented = {name.removesuffix("_total"): kind for name, (kind, _) in ROWS.items()}
    routing = {name.removesuffix("_total"): kind for name, (kind, _) in rows(ROUTING).items()}
    assert routing
    router.post("/", data=photo())
    for client, expected in ((segment, documented), (router, documented | routing)):
        exposed = families(client)
        assert {name: f.type for name, f in exposed.items() if not name.endswith("_created")} == expected
    for name, (_, labels) in rows(ROUTING).items():
        for sample in exposed[name.removesuffix("_total")].samples:
            assert set(sample.labels) - {"le"} == set(labels)


def test_every_metric_of_the_trigger_is_documented(nats_server: NatsServer, tmp_path: Path) -> None:
    own = rows(TRIGGER)
    assert own
    with held_router() as (_, url):
        text = configuration_text(nats_server.url, unique_subject(), url, tmp_path)
        text += f'[spool]\nfolder = "{tmp_path / "spool"}"\n'
        with running_trigger(text, tmp_path) as client:
            client.get(f"/calls/{client.post('/', data=b'x').json['id']}?wait=60s")
            # The backlog is known once it was looked at.
            eventually(lambda: bool(families(client)["isthmus_trigger_backlog_oldest_seconds"].samples))
            exposed = families(client)
            assert exposed["isthmus_trigger_spool_entries"].samples[0].value == 0
            assert {name: f.type for name, f in exposed.items() if name.startswith("isthmus_trigger_")} == {
                name.removesuffix("_total"): kind for name, (kind, _) in own.items()
            }
            for name, (_, labels) in own.items():
                for sample in exposed[name.removesuffix("_total")].samples:
                    assert tuple(sample.labels) == labels
            named = set(re.findall(r"`(\w+)`", TRIGGER.partition("Endpoints of the trigger:")[2].partition("```")[0]))
            assert {rule.endpoint for rule in client.application.url_map.iter_rules()} == named
    (meaning,) = re.findall(r"^\| `isthmus_trigger_messages_total` .* \| (.*) \|$", TRIGGER, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", meaning)) == {f.name for f in fields(MessageCounts)}


def test_every_label_is_documented() -> None:
    collectors = [value for value in vars(FunctionMetrics()).values() if hasattr(value, "_labelnames")]
    assert len(collectors) == 22
    for collector in collectors:
        suffix = "_total" if collector._type == "counter" else ""
        assert ROWS[collector._name + suffix] == (collector._type, tuple(collector._labelnames))


def test_every_endpoint_and_stage_is_documented(
    photos: Published, segment: FlaskClient, router: FlaskClient, tmp_path: Path
) -> None:
    endpoints = COMMON.partition("Endpoints of a segment function:")[2].partition("Stages of")[0]
    named = [set(re.findall(r"`(\w+)`", part)) for part in endpoints.split("Of the router:")]
    for client, expected in zip((segment, router), named, strict=True):
        assert {rule.endpoint for rule in client.application.url_map.iter_rules()} == expected
    segment.post("/", data=framed(photos))
    router.post("/", data=photo())
    router.post("/explain", data=photo())
    router.post("/", json={"inputs": [{"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": [0] * 192}]})
    with served(segment.application) as url:
        packs = router_settings(photos, tmp_path / "packs", ("local", url), codec="int8/1")
        packing = ready(create_router_app(packs).test_client())
        assert packing.post("/", data=photo()).status_code == 200
    stages = set(re.findall(r"`([a-z0-9-]+)`", TEXT.partition("Stages of")[2].partition("What to watch")[0]))
    used = {
        sample.labels["stage"].replace("hop1", "hop0")
        for client in (segment, router, packing)
        for sample in families(client)["isthmus_stage_seconds"].samples
    }
    # A closer look's segments are again0, … and have the stages that their first call had.
    assert {re.sub("hop1|again0", "hop0", stage) for stage in stages} == used
