"""Two gateways with keys on: the cloud's runs nothing for a stranger, secrets stay in their files, doctor says so."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import trustme

from isthmus.context import Deadline
from isthmus.errors import HopRejected, HopUntrusted
from isthmus.http.tls import open_trust
from isthmus.pipeline import HttpHop
from isthmus.security.protected_call import SEALED_TYPE, open_protection
from isthmus.settings import SegmentSettings
from isthmus.wire import frame as frames
from isthmus_tools.cli.options import registry_settings, stack_variables
from isthmus_tools.engine import Engine
from isthmus_tools.usecases.security_check import SecurityRequest, SecurityResult, check_security
from support.bundles import Published, framed, photo
from support.bundles import photos as photos
from support.cli import document, isthmus, refusal
from support.hop_servers import context
from support.local_stack import http, system
from support.paths import ROOT
from support.patience import LONG_S
from support.tls_servers import server_context, tls_proxy
from support.tls_servers import write_secrets as tls_files

EDGE, CLOUD = ("router", "edge-head"), ("cloud-tail",)
PHOTO = {"Content-Type": "image/png"}


def random_text() -> str:
    return base64.b64encode(os.urandom(32)).decode()


@dataclass(frozen=True)
class Deployment:
    """The edge's and the cloud's gateways, whose functions share a folder of secrets.

    Proxies before them end TLS, at `edge_https` and `cloud_https`, and demand a client certificate.
    """

    edge: Engine
    cloud: Engine
    edge_https: str
    cloud_https: str
    secrets: Path
    values: tuple[str, ...]

    @property
    def tail(self) -> str:
        return f"{self.cloud.url}/function/cloud-tail"

    def runs(self) -> str:
        """The lines of the tail's metrics that count segments: a run or a load changes them."""
        lines = http("GET", f"{self.tail}/metrics").data.decode().splitlines()
        counted = ('isthmus_stage_seconds_count{stage="run"', "isthmus_loaded_segments", "isthmus_loaded_bytes")
        return "\n".join(line for line in lines if line.startswith(counted))


def write_secrets(folder: Path) -> tuple[str, ...]:
    """The secrets of both sites; the texts that must not be anywhere else."""
    folder.mkdir(mode=0o700)
    key, token, s3 = random_text(), f"token-{os.urandom(16).hex()}", random_text()
    texts = {"hop-keys": f"k1:{key}", "profile-token": token, "s3-access-key-id": "AKID", "s3-secret-access-key": s3}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    return key, token, s3


@pytest.fixture(scope="module")
def deployment(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("sites")
    values = write_secrets(folder / "secrets")
    common = {"threads": "1", "log_level": "debug", "secrets_dir": str(folder / "secrets"), "expose_details": "false"}

    def site(stack: ExitStack, names: tuple[str, ...], **variables: str) -> Engine:
        return stack.enter_context(
            Engine(
                ROOT / "stack.yml",
                replicas=dict.fromkeys({*EDGE, *CLOUD, "trigger"} - {*names}, 0),
                environment={"*": common, **{name: {"cache_dir": str(folder / name)} for name in names}},
                variables={**stack_variables(str(photos.folder)), "MODEL": "photos", **variables},
                asynchronous=False,
            )
        )

    with ExitStack() as stack:
        cloud, ca = site(stack, CLOUD), trustme.CA()
        tls_files(folder / "secrets", ca=ca, client=ca.issue_cert("router.edge.example"))
        tls = server_context(ca.issue_cert("localhost"), demanded_by=ca)
        cloud_https = stack.enter_context(tls_proxy(tls, cloud.url))
        edge = site(stack, EDGE, TAIL_GATEWAY=cloud_https)
        edge_https = stack.enter_context(tls_proxy(tls, edge.url))
        cloud.wait_ready(2 * LONG_S)
        edge.wait_ready(2 * LONG_S)
        key = (folder / "secrets" / "hop-client-key").read_text().splitlines()[1]
        yield Deployment(edge, cloud, edge_https, cloud_https, folder / "secrets", (*values, key))


def test_a_photo_goes_through_both_gateways(deployment: Deployment) -> None:
    before = deployment.runs()
    response = http("POST", f"{deployment.edge.url}/function/router", body=photo(), headers=PHOTO)
    assert response.status == 200, response.data
    assert json.loads(response.data)["classes"]
    assert deployment.runs() != before


@pytest.mark.parametrize("content_type", [frames.CONTENT_TYPE, SEALED_TYPE, "application/json", "image/png"])
@pytest.mark.parametrize("path", ["", "/", "/load", "/sessions/end"])
def test_a_stranger_gets_401_from_the_clouds_gateway_and_nothing_runs(
    deployment: Deployment, photos: Published, path: str, content_type: str
) -> None:
    before = deployment.runs()
    assert before
    bodies = {
        "/load": json.dumps({"bundle": photos.digest, "segment": ".."}).encode(),
        "/sessions/end": b'{"session": "9f86d081884c7d65"}',
    }
    response = http(
        "POST", deployment.tail + path, body=bodies.get(path, framed(photos)), headers={"Content-Type": content_type}
    )
    assert (response.status, json.loads(response.data)["type"]) == (401, "CallerUnknown")
    assert deployment.runs() == before


def test_a_stranger_with_keys_of_his_own_gets_401(deployment: Deployment, photos: Published, tmp_path: Path) -> None:
    write_secrets(tmp_path / "own")
    protection = open_protection(SegmentSettings(secrets_dir=str(tmp_path / "own")))
    before = deployment.runs()
    hop = HttpHop(deployment.tail, attempts=1, connect_timeout_s=LONG_S, max_reply_bytes=2**20, protection=protection)
    with pytest.raises(HopRejected) as caught:
        hop.call(frames.decode(framed(photos), max_bytes=2**20), context())
    assert caught.value.facts["status"] == 401
    with pytest.raises(HopRejected):
        hop.load(photos.digest, "..", Deadline.after(LONG_S))
    hop.close()
    assert deployment.runs() == before


def test_a_stranger_without_a_certificate_does_not_get_past_the_clouds_proxy(
    deployment: Deployment, photos: Published, tmp_path: Path
) -> None:
    before = deployment.runs()
    settings = replace(registry_settings(""), secrets_dir=str(tmp_path), hop_ca=str(deployment.secrets / "hop-ca"))
    hop = HttpHop(
        f"{deployment.cloud_https}/function/cloud-tail",
        attempts=1,
        connect_timeout_s=LONG_S,
        max_reply_bytes=2**20,
        protection=open_protection(SegmentSettings(secrets_dir=str(deployment.secrets))),
        trust=open_trust(settings),
    )
    with pytest.raises(HopUntrusted) as caught:
        hop.load(photos.digest, "..", Deadline.after(LONG_S))
    hop.close()
    assert caught.value.facts["reason"] == "certificate_demanded"
    assert deployment.runs() == before


def test_commands_call_the_cloud_with_the_same_certificates(
    deployment: Deployment, photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo.png").write_bytes(photo())
    (tmp_path / "token").write_text("wrong")
    infer = ("infer", tmp_path / "photo.png", "--url", f"{deployment.edge_https}/function/router", "--json")
    tail = f"{deployment.cloud_https}/function/cloud-tail"
    profile = ("profile", "photos", "--tail", tail, "--token-file", tmp_path / "token", "--json")
    registry = ("--registry", photos.folder)
    monkeypatch.setenv("secrets_dir", str(deployment.secrets))
    assert document(isthmus(*infer))[0]["classes"]
    assert refusal(isthmus(*profile, *registry))["type"] == "ProfilingRefused"
    monkeypatch.setenv("secrets_dir", "/nowhere")
    for refused in (refusal(isthmus(*infer)), refusal(isthmus(*profile, *registry))):
        assert (refused["type"], refused["facts"]["reason"]) == ("HopUntrusted", "unknown_ca")


def test_a_stranger_measures_nothing_and_deploys_nothing(deployment: Deployment, photos: Published) -> None:
    before = deployment.runs()
    assert http("POST", f"{deployment.tail}/profile", body=framed(photos)).status in (401, 403)
    assert http("GET", f"{deployment.cloud.url}/system/functions").status == 401
    assert deployment.runs() == before


def test_secrets_are_in_no_log_no_environment_and_no_response(deployment: Deployment, photos: Published) -> None:
    router = f"{deployment.edge.url}/function/router"
    responses = [
        http("POST", router, body=photo(), headers=PHOTO),
        http("POST", router, body=b"no photo", headers=PHOTO),
        http("POST", f"{router}/v2/models/none/infer", body=b"{}"),
        http("GET", f"{router}/metrics"),
        http("GET", f"{router}/routes"),
        http("POST", deployment.tail, body=framed(photos), headers={"Authorization": f"Bearer {deployment.values[1]}"}),
        http("POST", f"{deployment.tail}/profile", headers={"Authorization": "Bearer wrong"}),
    ]
    texts = [response.data.decode("utf-8", "replace") + str(response.headers) for response in responses]
    for engine, names in ((deployment.edge, EDGE), (deployment.cloud, CLOUD)):
        logs = [system(engine, "GET", f"/system/logs?name={name}&follow=false").data.decode() for name in names]
        assert all("request" in log for log in logs)
        texts += logs
        texts += [system(engine, "GET", "/system/functions").data.decode()]
    processes = [p for p in psutil.Process().children(recursive=True) if "index.py" in " ".join(p.cmdline())]
    assert len(processes) == len(EDGE) + len(CLOUD)
    texts += [str(p.environ()) + " ".join(p.cmdline()) for p in processes]
    for value in deployment.values:
        assert not [text for text in texts if value in text]


def checked(secrets: Path, *gateways: str) -> SecurityResult:
    settings = replace(registry_settings(""), secrets_dir=str(secrets))
    variables = {"ISTHMUS_SECRETS": "[hop-keys, trusted-keys]"}
    return check_security(
        SecurityRequest(stack=ROOT / "stack.yml", settings=settings, variables=variables, gateways=gateways)
    )


def test_doctor_finds_the_tail_closed(deployment: Deployment) -> None:
    result = checked(deployment.secrets, deployment.edge.url, deployment.cloud_https)
    states = {(f.check, f.state) for f in result.findings}
    assert {("strangers", "ok"), ("one-key", "ok"), ("administration", "ok"), ("clock", "ok")} <= states
    # The profile token is set. The router serves this machine, from which nothing can be said of others.
    assert {(f.check, f.severity) for f in result.findings if f.state == "open"} == {("profiling", "low")}
    assert ("callers", "unknown") in states
    assert result.is_safe
    ranks = [("open", "unknown", "ok").index(f.state) for f in result.findings]
    assert ranks == sorted(ranks)


def test_doctor_sees_a_key_that_is_not_the_functions(deployment: Deployment, tmp_path: Path) -> None:
    write_secrets(tmp_path / "own")
    (tmp_path / "own" / "s3-access-key-id").chmod(0o644)
    findings = checked(tmp_path / "own", deployment.edge.url, deployment.cloud.url).findings
    assert {f.where for f in findings if (f.check, f.state) == ("one-key", "open")} == {"edge-head", "cloud-tail"}
