"""stack.yml says nothing that faas-cli, the watchdog or the functions would silently ignore."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.errors import LocalError
from isthmus.events.configuration import read_configuration
from isthmus.events.loops import check_loops
from isthmus.settings import EnvSettings, RegistrySettings, RouterSettings, SegmentSettings, TriggerSettings
from isthmus.units import parse_size
from isthmus_tools.engine.stack import FunctionSpec, Stack, read_stack, stage, substitute
from support.local_stack import ROOT, STACK, write_stack

FILES = ["stack.yml", "stack.pro.yml"]
SETTINGS: Mapping[str, type[EnvSettings]] = {
    "router": RouterSettings,
    "edge-head": SegmentSettings,
    "cloud-tail": SegmentSettings,
    "trigger": TriggerSettings,
}
# Functions that load segments; the trigger's bounds differ.
SEGMENTED = [name for name in SETTINGS if name != "trigger"]
# Source: of-watchdog 0.11.6, config/config.go.
TRACES = {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SERVICE_NAME"}
"""Variables of OpenTelemetry's SDK."""
WATCHDOG = frozenset(
    {
        *("fprocess", "mode", "upstream_url", "port", "read_timeout", "write_timeout", "exec_timeout", "max_inflight"),
        *("healthcheck_interval", "ready_path", "prefix_logs", "log_buffer_size", "log_callid", "suppress_lock"),
    }
)
GRACE_S, MARGIN_S = 30.0, 2.0
"""terminationGracePeriodSeconds of Kubernetes, which CE leaves as it is; then the pod is killed."""
OWN_BYTES = 192 * 2**20
"""What a function takes beside what its settings bound."""
PRO_LABELS = re.compile(r"com\.openfaas\.scale\.(zero|zero-duration|type|target|target-proportion)")


def stack(file: str, **env: str) -> Stack:
    return read_stack(ROOT / file, env)


def seconds(duration: str) -> float:
    assert duration.endswith("s")
    return float(duration[:-1])


@pytest.mark.parametrize("file", FILES)
def test_a_stack_names_the_functions_and_their_folders(file: str) -> None:
    found = stack(file)
    assert list(found.functions) == ["router", "edge-head", "cloud-tail", "trigger"]
    assert found.gateway == "http://127.0.0.1:8080"
    assert found.copy == ("shared/isthmus",)
    for spec in found.functions.values():
        assert (ROOT / spec.handler / "handler.py").is_file()
        assert (ROOT / spec.handler / "requirements.txt").is_file()
        assert (ROOT / "template" / spec.lang / "template.yml").is_file()
        assert "/" in spec.image
        assert spec.readonly_root_filesystem


@pytest.mark.parametrize("file", FILES)
def test_every_variable_is_the_watchdogs_or_a_setting(file: str) -> None:
    for name, spec in stack(file).functions.items():
        fields = set(SETTINGS[name].__dataclass_fields__)
        read = variables_of_the_configuration() if name == "trigger" else set()
        assert set(spec.environment) <= WATCHDOG | TRACES | fields | read, name
        SETTINGS[name].from_env(spec.environment)


def variables_of_the_configuration() -> set[str]:
    """The variables that the trigger's example takes from its environment."""
    text = (ROOT / "functions" / "trigger" / "nats.toml").read_text()
    return set(re.findall(r"\$\{(\w+)", text))


@pytest.mark.parametrize("file", FILES)
def test_the_triggers_example_is_a_configuration_under_the_stacks_variables(file: str) -> None:
    spec = stack(file, NATS_URL="nats://n:4222", EDGE_GATEWAY="http://edge:8080").functions["trigger"]
    configuration = read_configuration(ROOT / spec.handler / "nats.toml", dict(spec.environment))
    check_loops(configuration)
    assert configuration.router.url == "http://edge:8080/function/router"
    assert configuration.records.url == "nats://n:4222/isthmus-calls"
    # The router's pod ends a request before the trigger gives it up.
    assert configuration.router.timeout <= seconds(spec.environment["exec_timeout"])


def test_a_trigger_with_records_of_its_own_has_one_replica() -> None:
    labels = stack("stack.yml").functions["trigger"].labels
    assert (labels["com.openfaas.scale.min"], labels["com.openfaas.scale.max"]) == ("1", "1")


@pytest.mark.parametrize("file", FILES)
def test_timeouts_lie_inside_one_another(file: str) -> None:
    for spec in stack(file).functions.values():
        env = spec.environment
        assert float(env["deadline_s"]) < seconds(env["exec_timeout"])
        assert seconds(env["exec_timeout"]) < seconds(env["write_timeout"])
        assert seconds(env["write_timeout"]) <= seconds(env["read_timeout"])


@pytest.mark.parametrize("file", FILES)
def test_a_pod_that_ends_answers_what_it_took_within_its_grace(file: str) -> None:
    """The watchdog takes requests for healthcheck_interval after SIGTERM, and waits for the last of them."""
    for spec in stack(file).functions.values():
        image = dockerfile_variables(spec.lang)
        draining_s = seconds(spec.environment.get("healthcheck_interval", image["healthcheck_interval"]))
        for timeouts in (spec.environment, image):
            assert draining_s + seconds(timeouts["exec_timeout"]) <= GRACE_S - MARGIN_S
            assert seconds(timeouts["exec_timeout"]) < seconds(timeouts["write_timeout"])
        assert draining_s + SegmentSettings.deadline_s <= GRACE_S - MARGIN_S


@pytest.mark.parametrize("file", FILES)
def test_what_a_function_keeps_fits_its_memory(file: str) -> None:
    """The cache lies in /tmp: on the node's disk, which nothing else bounds, or in memory."""
    for spec in map(stack(file).functions.__getitem__, SEGMENTED):
        memory = parse_size(spec.limits["memory"])
        kept = [parse_size(spec.environment[n]) for n in ("cache_bytes", "max_loaded_bytes", "session_bytes")]
        # docs/how-to/deployment.md, "What bounds a request".
        working, body = SegmentSettings.max_working_bytes, SegmentSettings.max_request_bytes
        requests = working + max(working // 2, 2 * (body + 2**20))
        assert sum(kept) + requests <= memory - OWN_BYTES
        assert RegistrySettings.cache_bytes <= memory


@pytest.mark.parametrize("file", FILES)
def test_what_the_trigger_keeps_fits_its_memory(file: str) -> None:
    memory = parse_size(stack(file).functions["trigger"].limits["memory"])
    working, body = TriggerSettings.max_working_bytes, TriggerSettings.max_request_bytes
    requests = working + max(working // 2, 2 * (body + 2**20))
    messages = read_configuration(
        ROOT / "functions/trigger/nats.toml", {"nats_url": "nats://n", "router_url": "http://r"}
    )
    assert requests + messages.max_work_bytes <= memory - OWN_BYTES


@pytest.mark.parametrize("file", FILES)
def test_a_function_has_a_limit_of_cpus_that_its_runs_do_not_use_up(file: str) -> None:
    """A run takes the whole CPUs of the limit (threads: 0), so a fraction is left for the watchdog's probes."""
    for spec in stack(file).functions.values():
        assert "threads" not in spec.environment
        milli, requested = (int(kind["cpu"].removesuffix("m")) for kind in (spec.limits, spec.requests))
        assert milli >= 1000 + 250
        assert milli % 1000 >= 250
        assert requested <= milli


def test_the_pro_stack_is_probed_for_readiness_and_not_for_health() -> None:
    """CE has no such annotation: there the router's retries bridge a start. The trigger takes calls unready, too."""
    for spec in map(stack("stack.pro.yml").functions.__getitem__, SEGMENTED):
        assert spec.annotations["com.openfaas.ready.http.path"] == "/_/ready"
        assert dockerfile_variables(spec.lang)["ready_path"] == "/ready"


def dockerfile_variables(template: str) -> dict[str, str]:
    text = (ROOT / "template" / template / "Dockerfile").read_text().replace("\\\n", " ")
    pairs = shlex.split(" ".join(re.findall(r"^ENV (.*)", text, re.MULTILINE)))
    return dict(pair.split("=", 1) for pair in pairs)


def test_stack_yml_holds_nothing_that_ce_refuses() -> None:
    for spec in stack("stack.yml").functions.values():
        assert not spec.constraints
        assert not {k: v for k, v in spec.annotations.items() if k != "topic" or "," in v}
        assert not [k for k in spec.labels if PRO_LABELS.fullmatch(k)]
        assert int(spec.labels["com.openfaas.scale.max"]) <= 5
        assert not spec.secrets  # a secret that does not exist makes a deployment fail


def test_the_pro_stack_differs_only_where_it_says() -> None:
    ce, pro = stack("stack.yml"), stack("stack.pro.yml")
    for name, spec in pro.functions.items():
        base = ce.functions[name]
        topic = {k: v for k, v in spec.annotations.items() if k == "topic"}
        same = replace(spec, constraints=(), annotations=topic, labels=base.labels)
        if name == "cloud-tail":
            env = {k: v for k, v in spec.environment.items() if k != "providers"}
            same = replace(same, image=base.image, environment=env)
        assert same == base


def test_each_hop_has_a_gateway_of_its_own() -> None:
    found = stack("stack.yml", TAIL_GATEWAY="https://cloud.example.com")
    edge, cloud = found.functions["router"].environment["hops"].split(",")
    assert edge == "http://gateway.openfaas.svc.cluster.local:8080/function/edge-head"
    assert cloud == "https://cloud.example.com/function/cloud-tail"


def test_secrets_are_asked_for_by_a_variable() -> None:
    found = stack("stack.yml", ISTHMUS_SECRETS="[s3-access-key-id, s3-secret-access-key]")
    assert found.functions["cloud-tail"].secrets == ("s3-access-key-id", "s3-secret-access-key")


@pytest.mark.parametrize(
    ("text", "env", "result"),
    [
        ("${A}", {"A": "1"}, "1"),
        ("${A}", {}, ""),
        ("${A:-x:y/z}", {}, "x:y/z"),
        ("${A:-x}", {"A": ""}, "x"),
        ("${A:=x}${A=y}", {}, "xy"),
        ("${A:-[]}", {}, "[]"),
        ("# ${A}", {"A": "b"}, "# b"),
        ("$A {A}", {"A": "1"}, "$A {A}"),
    ],
)
def test_variables_are_replaced_as_faas_cli_does(text: str, env: dict[str, str], result: str) -> None:
    assert substitute(text, env) == result


@pytest.mark.parametrize("text", ["${A:?no}", "${A/x/y}", "${}", "${1A}"])
def test_other_forms_of_variables_are_refused(text: str) -> None:
    with pytest.raises(LocalError, match="write"):
        substitute(text, {})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    environment:", "    enviroment:", r"functions.echo has the key 'enviroment'.*'environment'"),
        ("    handler:", "    handlr:", "did you mean 'handler'"),
        ("configuration:", "konfiguration:", "did you mean 'configuration'"),
        ("name: openfaas", "name: other", r"provider\.name must be openfaas"),
        ("  echo:", "  Echo_1:", "DNS label"),
        ("flag: true", "flag: [a]", r"environment\.flag must be one value"),
        ("    - common", "    common: x", r"configuration\.copy must be a list"),
        ("image: example/other:latest", "limits: {nvidia.com/gpu: 1}", "other has no image"),
        ("image: example/other:latest", "image: a/b\n    limits: {nvidia.com/gpu: 1}", "silently ignore"),
        ("image: example/other:latest", "image: a/b\n    environment_file: [x.yml]", "environment_file"),
        ("version: 1.0", "version: [", "not YAML"),
    ],
)
def test_what_faas_cli_would_ignore_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in STACK
    (tmp_path / "stack.yml").write_text(STACK.replace(old, new, 1))
    with pytest.raises(LocalError, match=said):
        read_stack(tmp_path / "stack.yml", {})


def test_a_missing_stack_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"absent\.yml"):
        read_stack(tmp_path / "absent.yml", {})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("- common", "- ../elsewhere", "not inside"),
        ("- common", "- absent", "does not exist"),
        ("./functions/echo", "./functions/absent", "the handler of echo"),
        ("python3-isthmus", "python3-http", "the template of echo"),
    ],
)
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    found = read_stack(write_stack(tmp_path, STACK.replace(old, new, 1)), {})
    with pytest.raises(LocalError, match=said):
        stage(found, found.functions["echo"], tmp_path / "build")


def tree(folder: Path) -> dict[str, bytes]:
    left_out = re.compile(r"__pycache__|\.egg-info|\.pyc")
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not left_out.search(str(p))
    }


@pytest.mark.skipif(shutil.which("faas-cli") is None, reason="faas-cli is not installed")
def test_a_function_is_laid_out_as_faas_cli_does(tmp_path: Path) -> None:
    found = read_stack(write_stack(tmp_path), {})
    subprocess.run(["faas-cli", "build", "--shrinkwrap"], cwd=tmp_path, check=True, capture_output=True)
    for name, spec in found.functions.items():
        ours = stage(found, spec, tmp_path / "ours")
        assert tree(ours) == tree(tmp_path / "build" / name)


def test_a_handler_replaces_the_templates_own(tmp_path: Path) -> None:
    found = read_stack(write_stack(tmp_path), {})
    spec: FunctionSpec = found.functions["echo"]
    folder = stage(found, spec, tmp_path / "build")
    assert (folder / "function" / "handler.py").read_text() == (tmp_path / "functions/echo/handler.py").read_text()
    assert (folder / "function" / "common" / "words.py").is_file()
    assert (folder / "index.py").is_file()
