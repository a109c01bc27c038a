"""What `isthmus doctor --security` calls open in a stack file, in secrets, and in the rights of the functions' keys."""

from __future__ import annotations

import base64
import datetime
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trustme
import yaml

from isthmus.security.ed25519 import new_signing_key
from isthmus.settings import RegistrySettings
from isthmus_tools.cli.options import registry_settings
from isthmus_tools.engine.stack import Stack, read_stack
from isthmus_tools.usecases.secret_checks import registry_findings, secret_findings
from isthmus_tools.usecases.security_check import SecurityRequest, check_security
from isthmus_tools.usecases.security_findings import SecurityFinding
from isthmus_tools.usecases.stack_security import stack_findings
from support.cli import isthmus
from support.fake_s3 import FakeS3, error, serving
from support.paths import ROOT

KEYED = {"ISTHMUS_SECRETS": "[hop-keys, trusted-keys]"}


def opened(findings: list[SecurityFinding]) -> dict[str, str]:
    return {f.check: f.severity for f in findings if f.state == "open"}


def changed(change: Callable[[dict[str, dict[str, object]]], object], folder: Path) -> Stack:
    """The repository's stack with keys, after a change of its functions."""
    text = (ROOT / "stack.yml").read_text().replace("${ISTHMUS_SECRETS:-[]}", "[hop-keys, trusted-keys]")
    document = yaml.safe_load(text)
    change(document["functions"])
    (folder / "stack.yml").write_text(yaml.safe_dump(document))
    return replace(read_stack(folder / "stack.yml", {}), root=ROOT)


def test_the_stack_with_keys_leaves_nothing_open() -> None:
    for name in ("stack.yml", "stack.pro.yml"):
        findings = list(stack_findings(read_stack(ROOT / name, KEYED)))
        assert {f.state for f in findings} == {"ok"}


def test_the_stack_without_keys_is_open_and_says_what_to_do() -> None:
    findings = list(stack_findings(read_stack(ROOT / "stack.yml", {})))
    assert opened(findings) == {"hop-keys": "high", "trusted-keys": "medium"}
    (finding,) = (f for f in findings if f.check == "hop-keys")
    assert finding.where == "router, edge-head, cloud-tail"
    assert "ISTHMUS_SECRETS" in finding.advice


@pytest.mark.parametrize(
    ("function", "change", "check", "severity"),
    [
        ("cloud-tail", {"secrets": ["trusted-keys"]}, "hop-keys", "high"),
        ("cloud-tail", {"secrets": ["hop-keys"]}, "trusted-keys", "medium"),
        ("cloud-tail", {"environment": {"trusted_keys": "none"}}, "trusted-keys", "medium"),
        ("cloud-tail", {"readonly_root_filesystem": False}, "read-only-root", "medium"),
        ("router", {"secrets": ["hop-keys", "profile-token", "trusted-keys"]}, "profiling", "low"),
        ("router", {"environment": {"expose_details": "true"}}, "expose-details", "medium"),
        ("router", {"environment": {"access": "anyone"}}, "access", "critical"),
        ("router", {"environment": {"hops": "local,http://cloud.example.com/function/cloud-tail"}}, "tls", "low"),
        ("router", {"environment": {"hops": "local,http://10.0.0.7:8080/function/cloud-tail"}}, "tls", "low"),
        (
            "router",
            {"environment": {"hops": "local,http://c.example/function/cloud-tail", "hop_security": "signed"}},
            "tls",
            "high",
        ),
        ("edge-head", {"environment": {"AWS_SECRET_ACCESS_KEY": "abc"}}, "secrets-in-environment", "high"),
        ("trigger", {"environment": {"nats_url": "nats://me:word@nats:4222"}}, "secrets-in-environment", "high"),
        ("edge-head", {"lang": "rootful"}, "image-user", "high"),
    ],
)
def test_each_weakness_of_a_stack_is_open_alone(
    function: str, change: dict[str, object], check: str, severity: str, tmp_path: Path
) -> None:
    def apply(functions: dict[str, dict[str, object]]) -> None:
        environment = {**functions[function]["environment"], **change.get("environment", {})}  # type: ignore[dict-item]
        functions[function] |= {**change, "environment": environment}

    stack = changed(apply, tmp_path)
    if check == "image-user":
        (tmp_path / "template" / "rootful").mkdir(parents=True)
        (tmp_path / "template" / "rootful" / "Dockerfile").write_text("FROM python\nUSER 12000\nUSER root\n")
        (tmp_path / "template" / "python3-isthmus").symlink_to(ROOT / "template" / "python3-isthmus")
        stack = replace(stack, root=tmp_path)
    assert opened(list(stack_findings(stack))) == {check: severity}


@pytest.mark.parametrize(
    "hops",
    [
        "local",
        "https://cloud.example.com/function/cloud-tail",
        "http://127.0.0.1:8080/function/a|http://gateway:8080/function/b",
        "http://gateway.openfaas.svc.cluster.local:8080/function/a",
    ],
)
def test_hops_within_a_machine_or_a_cluster_need_no_tls(hops: str, tmp_path: Path) -> None:
    stack = changed(lambda functions: functions["router"]["environment"].update(hops=hops), tmp_path)  # type: ignore[attr-defined]
    assert opened(list(stack_findings(stack))) == {}


def test_a_variable_may_hold_the_name_of_a_secret(tmp_path: Path) -> None:
    def name_one(functions: dict[str, dict[str, object]]) -> None:
        functions["trigger"]["secrets"] = ["nats-password"]
        functions["trigger"]["environment"]["nats_secret"] = "nats-password"  # type: ignore[index]

    assert opened(list(stack_findings(changed(name_one, tmp_path)))) == {}


def keyed_folder(folder: Path, *ids: str) -> RegistrySettings:
    key = base64.b64encode(os.urandom(32)).decode()
    (folder / "hop-keys").write_text(",".join(f"{name}:{key}" for name in ids))
    (folder / "hop-keys").chmod(0o600)
    return replace(registry_settings(""), secrets_dir=str(folder), registry="")


def test_keys_of_a_rotation_that_are_old_and_readable_are_open(tmp_path: Path) -> None:
    settings = keyed_folder(tmp_path, "new", "old")
    assert opened(list(secret_findings(settings))) == {"key-rotation": "low"}
    keyed_folder(tmp_path, "new")
    assert opened(list(secret_findings(settings))) == {}
    (tmp_path / "hop-keys").chmod(0o640)
    os.utime(tmp_path / "hop-keys", (0, 0))
    assert opened(list(secret_findings(settings))) == {"secret-files": "high", "key-age": "low"}


@pytest.mark.parametrize("name", ["azure-account-key", "azure-sas-token", "gcs-service-account"])
def test_a_key_of_a_store_that_others_may_read_is_open(tmp_path: Path, name: str) -> None:
    settings = keyed_folder(tmp_path, "new")
    (tmp_path / name).write_text("key")
    (tmp_path / name).chmod(0o640)
    assert opened(list(secret_findings(settings))) == {"secret-files": "high"}


def test_a_key_that_is_none_is_open_and_never_quoted(tmp_path: Path) -> None:
    settings = keyed_folder(tmp_path, "new")
    (tmp_path / "hop-keys").write_text("k1:c2hvcnQ=")
    (finding,) = secret_findings(settings)
    assert (finding.check, finding.state) == ("key-form", "open")
    assert "c2hvcnQ" not in str(finding)


def test_a_keyring_whose_keys_soon_count_no_longer_is_open(tmp_path: Path) -> None:
    settings = keyed_folder(tmp_path, "new")
    pem = new_signing_key(tmp_path / "key.pem").public.pem()
    for days, state in ((29, {"keyring": "medium"}), (31, {})):
        end = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")
        keys = [{"name": "release", "public_key": pem, "not_after": end}]
        (tmp_path / "trusted-keys").write_text(json.dumps({"format": "isthmus.keyring/1", "keys": keys}))
        assert opened(list(secret_findings(settings))) == state
    (tmp_path / "trusted-keys").write_text("no keyring")
    assert opened(list(secret_findings(settings))) == {"keyring": "high"}


def test_a_ca_of_hops_that_soon_expires_is_open(tmp_path: Path) -> None:
    settings = keyed_folder(tmp_path, "new")
    trustme.CA().cert_pem.write_to_path(tmp_path / "hop-ca")
    assert opened(list(secret_findings(settings))) == {}
    (tmp_path / "hop-ca").write_text("no certificate")
    assert opened(list(secret_findings(settings))) == {"tls-files": "high"}


@pytest.mark.parametrize("may_write", [True, False])
def test_keys_that_may_write_to_the_registry_are_open(may_write: bool, tmp_path: Path) -> None:
    (tmp_path / "s3-access-key-id").write_text("k")
    (tmp_path / "s3-secret-access-key").write_text("s")
    with serving(FakeS3()) as server:
        if not may_write:
            server.refuse = lambda request: error(403, "AccessDenied") if request.method == "PUT" else None
        settings = replace(
            registry_settings("s3://b/p"), secrets_dir=str(tmp_path), s3_endpoint=server.url, s3_region="us-east-1"
        )
        (finding,) = registry_findings(settings)
        assert (finding.check, finding.state) == ("registry-rights", "open" if may_write else "ok")
        assert _left(server) == []


def _left(server: FakeS3) -> list[str]:
    return [key for key in server.objects if "security-check" in key]


def test_what_is_open_comes_first_and_the_worst_of_it(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    settings = keyed_folder(tmp_path / "secrets", "new", "old")
    result = check_security(SecurityRequest(stack=ROOT / "stack.yml", settings=settings, variables={}))
    assert [(f.check, f.state) for f in result.findings[:4]] == [
        ("hop-keys", "open"),
        ("trusted-keys", "open"),
        ("key-rotation", "open"),
        ("strangers", "unknown"),
    ]
    assert not result.is_safe
    assert check_security(SecurityRequest(stack=ROOT / "stack.yml", settings=settings, variables=KEYED)).is_safe


def test_the_command_exits_by_what_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("ISTHMUS_SECRETS", raising=False)
    options = ("doctor", "--security", "--registry", tmp_path / "none", "--secrets", tmp_path)
    refused = isthmus(*options, "--json")
    assert refused.exit_code == 1
    document = json.loads(refused.stdout)
    assert document["ok"] is False
    assert document["findings"][0].keys() == {"check", "state", "severity", "where", "observed", "advice"}
    monkeypatch.setenv("ISTHMUS_SECRETS", KEYED["ISTHMUS_SECRETS"])
    safe = isthmus(*options)
    assert (safe.exit_code, "nothing critical or high is open" in safe.stdout) == (0, True)
    assert isthmus(*options, "--gateway", "nowhere").exit_code == 1
    away = isthmus(*options, "--gateway", "http://127.0.0.1:9", "--json")
    assert next(f["check"] for f in json.loads(away.stdout)["findings"] if f["state"] == "unknown") == "reachable"
