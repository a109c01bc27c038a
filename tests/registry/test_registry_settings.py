"""Where a registry is and with which keys it is asked: read alike by functions and commands; nothing goes elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from isthmus.errors import Denied, IsthmusError, RegistryError, SettingsError
from isthmus.registry import RetryPolicy, open_registry, parse_address
from isthmus.settings import RegistrySettings, SegmentSettings, read_secret
from isthmus_tools.cli.options import registry_settings, stack_variables
from isthmus_tools.engine.credentials import SecretFolder
from isthmus_tools.profiling.remote import ProfiledFunction
from support.cli import isthmus
from support.fake_bundles import make_bundle
from support.fake_s3 import FakeS3, Request, Response, error, serving

SECRET = "a-secret-that-no-message-may-hold"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings or keys of the machine that runs the tests."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().startswith("s3_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setattr("isthmus_tools.cli.options.ENGINE_SECRETS", str(tmp_path / "secrets"))
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "s3-access-key-id").write_text("KEYID\r\n")
    (tmp_path / "secrets" / "s3-secret-access-key").write_text(f"{SECRET}\n")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def s3() -> Iterator[FakeS3]:
    with serving(FakeS3()) as server:
        yield server


@pytest.mark.parametrize(
    "command",
    [
        ["models"],
        ["import", "m.onnx", "--if-absent"],
        ["cut", "m", "--cut", "1"],
        ["calibrate", "m", "--data", "."],
        ["codec", "m"],
        ["infer", "--tensor", "x=x.npy", "--model", "m", "--local"],
        ["package", "m"],
        ["plan", "m"],
        ["explain", "m"],
        ["profile", "m", "--head", "http://h", "--tail", "http://t", "--token-file", "token"],
        ["doctor"],
    ],
    ids=lambda command: command[0],
)
def test_commands_ask_the_s3_server_that_the_environment_names(
    command: list[str], s3: FakeS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.zeros(1))
    (tmp_path / "token").write_text("t")
    monkeypatch.setenv("S3_ENDPOINT", s3.url)
    s3.refuse = lambda request: error(403, "AccessDenied")
    result = isthmus(*command, "--registry", "s3://b/p")
    assert result.exit_code == 1, result.output
    assert {request.headers["authorization"].split("/")[0] for request in s3.requests} == {
        "AWS4-HMAC-SHA256 Credential=KEYID"
    }


@pytest.mark.parametrize("variable", ["s3_endpoint", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_every_name_of_the_endpoint_is_read_by_commands(
    variable: str, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, s3.url)
    assert isthmus("models", "--registry", "s3://b/p", "--json").stdout == "[]\n"
    assert s3.requests


def test_functions_read_the_same_variables_as_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    for env in (
        {"s3_endpoint": "http://a:1", "s3_region": "eu-central-1"},
        {"S3_ENDPOINT": "http://a:1", "S3_REGION": "eu-central-1"},
        {"AWS_ENDPOINT_URL_S3": "http://a:1", "AWS_ENDPOINT_URL": "http://b:2", "AWS_REGION": "eu-central-1"},
        {"AWS_ENDPOINT_URL": "http://a:1", "AWS_DEFAULT_REGION": "eu-central-1"},
        {"s3_endpoint": "http://a:1", "AWS_ENDPOINT_URL": "http://b:2", "s3_region": "eu-central-1", "AWS_REGION": "x"},
    ):
        with monkeypatch.context() as patched:
            for name, value in env.items():
                patched.setenv(name, value)
            here = registry_settings("s3://b/p")
            function = SegmentSettings.from_env({**env, "registry": "s3://b/p"})
            assert (here.s3_endpoint, here.s3_region) == ("http://a:1", "eu-central-1")
            assert (function.s3_endpoint, function.s3_region) == (here.s3_endpoint, here.s3_region)


def test_commands_read_the_other_settings_of_a_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = registry_settings("r")
    assert (settings.secrets_dir, settings.registry_attempts) == (str(tmp_path / "secrets"), 4)
    assert settings.cache_bytes == 8 * 2**30 > RegistrySettings.cache_bytes
    for name, value in {"secrets_dir": "/s", "registry_attempts": "2", "cache_bytes": "1MB", "cache_dir": "/c"}.items():
        monkeypatch.setenv(name, value)
    settings = registry_settings("r")
    assert (settings.secrets_dir, settings.registry_attempts, settings.cache_bytes, settings.cache_dir) == (
        "/s",
        2,
        10**6,
        "/c",
    )


def test_two_names_of_one_setting_with_different_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("s3_endpoint", "http://minio:9000")
    monkeypatch.setenv("S3_ENDPOINT", "http://other:9000")
    result = isthmus("models", "--registry", "s3://b/p")
    assert result.exit_code == 1
    assert "s3_endpoint and S3_ENDPOINT are one setting" in result.stderr


def test_functions_of_the_engine_get_the_s3_server_of_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("s3_endpoint", "http://minio:9000")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    found = stack_variables("s3://b/p")
    assert (found["ISTHMUS_REGISTRY"], found["S3_ENDPOINT"], found["S3_REGION"]) == (
        "s3://b/p",
        "http://minio:9000",
        "eu-central-1",
    )
    assert stack_variables("r")["ISTHMUS_REGISTRY"] == str(Path("r").absolute())
    with pytest.raises(SettingsError, match="s3:/b"):
        stack_variables("s3:/b")


@pytest.mark.parametrize(
    "text",
    [
        *("s3:/bucket", "s3:bucket", "s3:///bucket", "s3//bucket/p", "S3:/b", "s3:", "s3:\\\\b", "http://minio:9000/b"),
        *("s3://..", "s3://./p", "s3://.b", "s3://-b", "~nobody-of-that-name/r"),
        *("file:///srv", "gs://b", "s3://b cket", "s3://b/a b", "s3://b/../c", "", " ", "/srv\n/x", "s3://b\n"),
    ],
)
def test_a_text_that_is_no_address_is_never_taken_for_a_folder(text: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        open_registry(RegistrySettings(registry=text))
    assert caught.value.facts["variable"] == "registry"
    assert [p.name for p in tmp_path.iterdir()] == ["secrets"]


@pytest.mark.parametrize("text", ["models", "/srv/models", "./a:b", "a/b:c", "s3", "s3/b", "../r", "ä ö"])
def test_a_folder_is_any_path_without_a_scheme(text: str) -> None:
    assert parse_address(text).folder == text


def test_a_tilde_is_the_users_home_as_in_a_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for text, folder in (("~", "home"), ("~/r", "home/r")):
        assert parse_address(text).folder == str(tmp_path / folder)
        assert stack_variables(text)["ISTHMUS_REGISTRY"] == str(tmp_path / folder)
    assert parse_address("./~").folder == "./~"


def test_an_address_in_s3_has_a_bucket_and_a_prefix_without_slashes() -> None:
    for text in ("s3://b/p/q", "S3://b/p/q/", "s3://b//p/q"):
        address = parse_address(text)
        assert (address.folder, address.bucket, address.prefix) == ("", "b", "p/q")


@pytest.mark.parametrize(
    ("variable", "given"),
    [
        ("s3_endpoint", {"s3_endpoint": "minio:9000"}),
        ("s3_endpoint", {"s3_endpoint": "ftp://minio"}),
        ("s3_endpoint", {"s3_endpoint": "http://"}),
        ("s3_endpoint", {"s3_endpoint": "http://minio:port"}),
        ("s3_endpoint", {"s3_endpoint": "http://mi\nnio:9000"}),
        ("s3_endpoint", {"s3_endpoint": f"http://user:{SECRET}@minio:9000"}),
        ("s3_endpoint", {"s3_endpoint": f"http://minio:9000?secret={SECRET}"}),
        ("registry", {"registry": f"s3://key:{SECRET}@b/p"}),
        ("s3_region", {"s3_region": "eu central"}),
        ("s3_region", {"s3_region": "eu-central-1\n"}),
    ],
)
def test_settings_that_cannot_be_meant_stop_the_start_and_hide_passwords(variable: str, given: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as caught:
        open_registry(RegistrySettings(**{"registry": "s3://b/p", **given}))
    assert caught.value.facts["variable"] == variable
    assert SECRET not in f"{caught.value.message}{caught.value.facts}{caught.value.hint}"


def test_a_secret_that_is_a_pipe_does_not_hold_up_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s3-access-key-id")
    with pytest.raises(SettingsError, match="a pipe, not a file"):
        read_secret(str(tmp_path), "s3-access-key-id")


@pytest.mark.parametrize("name", ["s3-access-key-id", "s3-secret-access-key"])
@pytest.mark.parametrize("inside", ["\n", "\r\n", "\0", "\x1b[2J", " ", "\x7f", "\u00e4", "\ufeff"])
def test_a_secret_that_no_header_can_hold_is_refused_and_not_printed(name: str, inside: str, tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    (folder / name).write_text(f"{SECRET}{inside}{SECRET}\n")
    with pytest.raises(SettingsError, match=name) as caught:
        open_registry(RegistrySettings(registry="s3://b/p", secrets_dir=str(folder)))
    assert caught.value.facts == {"variable": "secrets_dir", "value": str(folder)}
    assert SECRET not in f"{caught.value.message}{caught.value.hint}"
    (folder / name).write_bytes(b"k" * 2**17)
    with pytest.raises(SettingsError, match=name):
        read_secret(str(folder), name)


@pytest.mark.parametrize("inside", ["\n", "\r\nX-Other: ", " ", "\0"])
def test_a_profile_token_that_no_header_can_hold_is_refused_and_not_printed(inside: str, tmp_path: Path) -> None:
    (tmp_path / "secrets" / "profile-token").write_text(f"{SECRET}{inside}{SECRET}\n")
    refusals = []
    with pytest.raises(IsthmusError) as caught:
        SecretFolder(tmp_path / "secrets").ensure("profile-token")
    refusals.append(caught.value)
    with pytest.raises(IsthmusError) as caught:
        ProfiledFunction("http://127.0.0.1:1", f"{SECRET}{inside}{SECRET}")
    refusals.append(caught.value)
    assert not any(SECRET in everything(refusal) for refusal in refusals)


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_a_line_break_in_botos_own_credentials_prints_no_header(
    variable: str, s3: FakeS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEYID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv(variable, f"{SECRET}\n{SECRET}")
    fresh_session()
    registry = open_registry(RegistrySettings(registry="s3://b/p", s3_endpoint=s3.url, secrets_dir=str(tmp_path)))
    with pytest.raises(Denied, match="line break") as caught:
        registry.models()
    assert SECRET not in everything(caught.value)
    assert not s3.requests


def test_a_header_that_the_http_library_refuses_is_not_repeated(s3: FakeS3) -> None:
    store = s3.store()
    client = store._client()  # what a session that refreshes its own keys might do later
    client._request_signer._credentials.access_key = f"{SECRET}\n"
    with pytest.raises(IsthmusError) as caught:
        store.get("blobs/x", max_bytes=1)
    assert SECRET not in everything(caught.value)


def test_a_profile_that_is_not_there_is_said_once(s3: FakeS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    fresh_session()
    tries = []
    monkeypatch.setattr("isthmus.registry.s3._session", counting(tries))
    registry = open_registry(RegistrySettings(registry="s3://b/p", s3_endpoint=s3.url, secrets_dir=str(tmp_path)))
    with pytest.raises(Denied, match="nobody") as caught:
        registry.models()
    assert "AWS_PROFILE" in caught.value.hint
    assert len(tries) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        error(301, "PermanentRedirect", x_amz_bucket_region="eu-central-1"),
        error(400, "AuthorizationHeaderMalformed", "<Region>eu-central-1</Region>"),
        error(400, "AuthorizationHeaderMalformed", x_amz_bucket_region="eu-central-1"),
    ],
    ids=["301 with a header", "400 with a body", "400 with a header"],
)
def test_a_bucket_of_another_region_is_named_by_its_region(refusal: Response, s3: FakeS3) -> None:
    """boto3 follows such a refusal where it can; a server that goes on refusing is told of in a sentence."""
    s3.refuse = lambda request: refusal
    store = s3.store()
    for ask in (
        lambda: store.size("blobs/x"),
        lambda: store.get("blobs/x", max_bytes=1),
        lambda: store.put("blobs/x", b""),
        lambda: store.list(""),
    ):
        with pytest.raises(
            RegistryError, match="is in the region eu-central-1; the request went to us-east-1"
        ) as caught:
            ask()
        assert caught.value.facts["region"] == "eu-central-1"
        assert "s3_region=eu-central-1" in caught.value.hint


def test_a_clock_that_differs_is_named_as_such(s3: FakeS3) -> None:
    s3.refuse = lambda request: error(403, "RequestTimeTooSkewed")
    with pytest.raises(Denied, match="refuses this machine's clock") as caught:
        s3.store().get("blobs/x", max_bytes=1)
    assert "NTP" in caught.value.hint


def test_a_bucket_of_another_region_is_asked_there_where_the_refusal_of_a_get_names_it(s3: FakeS3) -> None:
    """A HEAD's refusal has no body that could."""
    region = error(400, "AuthorizationHeaderMalformed", "<Region>eu-central-1</Region>")
    s3.refuse = lambda request: None if "/eu-central-1/" in request.headers["authorization"] else region
    s3.objects["p/blobs/x"] = b"12345"
    for key, size in (("blobs/none", None), ("blobs/x", 5)):
        assert s3.store().size(key) == size
    s3.objects["p/blobs/x"] = b""
    assert s3.store().size("blobs/x") == 0


def test_a_refusal_of_a_head_is_explained_by_a_get(s3: FakeS3) -> None:
    s3.refuse = lambda request: error(400, "InvalidRequest")
    with pytest.raises(RegistryError, match="answered 400 InvalidRequest"):
        s3.store().size("blobs/x")
    s3.refuse = lambda request: error(403, "SignatureDoesNotMatch")
    with pytest.raises(Denied, match="SignatureDoesNotMatch"):
        s3.store().size("blobs/x")
    assert s3.requests[-1].method == "GET"


@pytest.mark.parametrize("status", [200, 204, 301, 400, 404, 500])
@pytest.mark.parametrize("body", [b"", b"<html><br></html>", b"<Error><Code/></Error>"])
def test_a_server_that_does_not_speak_s3_gets_a_typed_error_or_is_seen_through(
    status: int, body: bytes, s3: FakeS3
) -> None:
    s3.refuse = lambda request: (status, {"Content-Type": "text/html"}, body)
    store = s3.store(retry_policy=RetryPolicy(attempts=1, timeout_s=5.0))
    for ask in (
        lambda: store.size("blobs/x"),
        lambda: store.get("blobs/x", max_bytes=100),
        lambda: store.read("blobs/x", 0, 3),
        lambda: store.put("blobs/x", b"y"),
        lambda: store.put_if_absent("blobs/x", b"y"),
        lambda: store.list(""),
        lambda: store.delete("blobs/x"),
    ):
        with contextlib.suppress(RegistryError):
            ask()


def test_an_endpoint_that_redirects_is_said_to(s3: FakeS3) -> None:
    s3.refuse = lambda request: (301, {"Location": "https://elsewhere/"}, b"")
    with pytest.raises(RegistryError, match="redirects") as caught:
        s3.store().list("")
    assert "https" in caught.value.hint


def test_a_server_of_botos_own_configuration_is_asked_path_style(
    s3: FakeS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(f"[profile minio]\nendpoint_url = {s3.url.replace('127.0.0.1', 'localhost')}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "minio")
    fresh_session()
    assert s3.store(endpoint="").list("") == []
    assert len(s3.requests) == 1


def test_publishing_to_a_bucket_of_a_wrong_region_ends_with_its_name(s3: FakeS3, tmp_path: Path) -> None:
    fake = make_bundle(tmp_path / "fake")
    s3.refuse = elsewhere
    registry = open_registry(
        RegistrySettings(registry="s3://b/p", s3_endpoint=s3.url, secrets_dir=str(tmp_path / "secrets"))
    )
    with pytest.raises(RegistryError, match="eu-central-1"):
        registry.publish(fake.bundle, fake.files)


def test_a_clock_that_is_an_hour_off_is_named_as_such(s3: FakeS3) -> None:
    s3.refuse = lambda _: error(403, "RequestTimeTooSkewed", "<ServerTime>2026-11-29T12:00:00Z</ServerTime>")
    with pytest.raises(
        Denied, match=r"refuses this machine's clock: it is .* here, and 2026-11-29T12:00:00Z there"
    ) as e:
        s3.store().get("blobs/x", max_bytes=1)
    assert "NTP" in e.value.hint
    assert len(s3.requests) == 1


def elsewhere(request: Request) -> Response | None:
    # A HEAD's refusal has neither a body nor, on some servers, a header that names the region.
    return error(400, "AuthorizationHeaderMalformed", "<Region>eu-central-1</Region>")


def counting(tries: list[int]) -> object:
    from isthmus.registry.s3 import _session

    def made(*keys: str) -> object:
        tries.append(1)
        return _session.__wrapped__(*keys)

    return made


def fresh_session() -> None:
    from isthmus.registry.s3 import _session

    _session.cache_clear()


def everything(error: BaseException) -> str:
    """What a log with a traceback would hold."""
    import traceback

    return (
        "".join(traceback.format_exception(error)) + str(getattr(error, "facts", "")) + str(getattr(error, "hint", ""))
    )
