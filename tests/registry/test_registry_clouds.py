"""What a registry in GCS, Azure or HDFS does where something is wrong: settings, keys, buckets, servers."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isthmus.errors import (
    Corrupt,
    Denied,
    Missing,
    RegistryError,
    RegistryMissing,
    RegistryUnavailable,
    SettingsError,
)
from isthmus.registry import BlobStore, RetryPolicy, open_blob_store, parse_address
from isthmus.registry.cloud_errors import CloudFacts, translated
from isthmus.registry.hdfs import HdfsStore
from isthmus.settings import RegistrySettings
from support.azurite_server import Azurite
from support.gcs_server import TOKEN, GcsServer
from support.hdfs_server import HdfsServer
from support.ports import free_port
from support.stores import azure_at, gcs_at, make_store

SECRET = "c2VjcmV0LXNlY3JldA=="
HASTE = RetryPolicy(attempts=2, timeout_s=2)
FACTS = CloudFacts("gs://b/p", "gcs-service-account", "gcs_endpoint")


@pytest.fixture
def gcs(gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", TOKEN)
    gcs_server.requests.clear()
    yield gcs_server
    gcs_server.fails, gcs_server.page = lambda request: False, 1000


def once(text: str) -> Callable[[str], bool]:
    """True for the first request that holds `text`."""
    counter = itertools.count()
    return lambda request: text in request and next(counter) == 0


def every_call(store: BlobStore) -> list[Callable[[], object]]:
    return [
        lambda: store.get("blobs/x", max_bytes=1),
        lambda: store.read("blobs/x", 0, 1),
        lambda: store.put("blobs/x", b""),
        lambda: store.put_if_absent("blobs/x", b""),
        lambda: store.list(""),
    ]


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [
        ("gs://bucket/p/q/", "bucket", "p/q"),
        ("GS://a_b.example.com", "a_b.example.com", ""),
        ("az://container", "container", ""),
        ("hdfs://name-node:8020/models/isthmus", "name-node:8020", "models/isthmus"),
        ("hdfs://name-service/models", "name-service", "models"),
    ],
)
def test_an_address_has_a_scheme_a_bucket_and_a_prefix(text: str, bucket: str, prefix: str) -> None:
    address = parse_address(text)
    assert (address.folder, address.scheme) == ("", text.partition(":")[0].lower())
    assert (address.bucket, address.prefix) == (bucket, prefix)


@pytest.mark.parametrize(
    "text",
    [
        *("gs:/bucket", "gs//bucket", "gs://", "gs://UPPER", "gs://ab", "gs://bucket/../x", "gs://bucket/a b"),
        *("az://a", "az://two--dashes", "az://-x-", "az:container", "az://user:pass@container"),
        *("hdfs://", "hdfs:///models", "hdfs://host:port/x", "hdfs://host:123456/x", "hdfs://host/.staging"),
    ],
)
def test_a_text_that_is_nearly_an_address_is_refused(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_address(text)
    assert caught.value.facts["variable"] == "registry"
    assert "pass@" not in caught.value.message


@pytest.mark.parametrize(
    ("variable", "registry", "given"),
    [
        ("azure_account", "az://container", {}),
        ("azure_account", "az://container", {"azure_account": "Not.An.Account"}),
        ("azure_endpoint", "az://container", {"azure_account": "account", "azure_endpoint": "blobs:80"}),
        ("azure_endpoint", "az://container", {"azure_account": "account", "azure_endpoint": f"https://a?sig={SECRET}"}),
        ("gcs_endpoint", "gs://bucket", {"gcs_endpoint": "ftp://server"}),
    ],
)
def test_settings_that_cannot_be_meant_stop_the_start(variable: str, registry: str, given: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as caught:
        open_blob_store(registry, RegistrySettings(**given))
    assert caught.value.facts["variable"] == variable
    assert SECRET not in f"{caught.value.message}{caught.value.facts}{caught.value.hint}"


@pytest.mark.parametrize(
    ("registry", "name", "text"),
    [
        ("gs://bucket", "gcs-service-account", f"{{{SECRET}"),
        ("gs://bucket", "gcs-service-account", json.dumps({"client_email": SECRET})),
        ("az://container", "azure-sas-token", SECRET.replace("=", "")),
        ("az://container", "azure-account-key", f"{SECRET}\n{SECRET}"),
    ],
)
def test_a_secret_without_usable_form_stops_the_start_and_is_not_printed(
    registry: str, name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=name) as caught:
        open_blob_store(registry, RegistrySettings(secrets_dir=str(tmp_path), azure_account="account"))
    assert caught.value.facts["variable"] == "secrets_dir"
    assert SECRET[:8] not in f"{caught.value.message}{caught.value.hint}{caught.value.__cause__}"


@pytest.mark.parametrize(
    ("registry", "package", "extra"),
    [("gs://bucket", "obstore", "gcs"), ("az://container", "obstore", "azure"), ("hdfs://h", "hdfs_native", "hdfs")],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    registry: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    for module in ("isthmus.registry.cloud", "isthmus.registry.hdfs"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingsError, match=f"{package}.* is not installed") as caught:
        open_blob_store(registry, RegistrySettings(azure_account="account"))
    assert f'pip install "isthmus[{extra}]"' in caught.value.hint


def test_a_wrong_token_is_denied_and_named_by_its_secret(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", SECRET)
    for ask in every_call(gcs_at(gcs.endpoint)):
        with pytest.raises(Denied, match="refused our credentials") as caught:
            ask()
        assert "gcs-service-account" in caught.value.hint
        assert SECRET not in f"{caught.value}{caught.value.__cause__}"


def test_a_wrong_account_key_is_denied_and_named_by_its_secret(azurite: Azurite) -> None:
    for ask in every_call(azure_at(azurite.endpoint, key=SECRET)):
        with pytest.raises(Denied, match="refused our credentials") as caught:
            ask()
        assert "azure-account-key" in caught.value.hint
        assert SECRET not in f"{caught.value}{caught.value.__cause__}"


def test_a_bucket_that_is_not_there_is_missing_as_a_whole(gcs: GcsServer) -> None:
    for ask in every_call(gcs_at(gcs.endpoint, "no-such-bucket")):
        with pytest.raises(RegistryMissing, match="there is no registry at gs://no-such-bucket"):
            ask()


def test_a_container_or_account_that_is_not_there_is_missing_as_a_whole(azurite: Azurite) -> None:
    elsewhere = azurite.endpoint.replace("devstoreaccount1", "otheraccount")
    for store in (azure_at(azurite.endpoint, "no-such-container"), azure_at(elsewhere)):
        for ask in every_call(store):
            with pytest.raises((RegistryMissing, Denied)):
                ask()


def test_a_throttled_request_is_tried_again_and_then_given_up(gcs: GcsServer) -> None:
    store = gcs_at(gcs.endpoint, retry_policy=HASTE)
    gcs.fails = once("PUT")
    assert store.put_if_absent("models/m/versions/1", b"1") is True
    gcs.fails = lambda request: True
    for ask in (lambda: store.put_if_absent("blobs/x", b""), lambda: store.list("")):
        gcs.requests.clear()
        with pytest.raises(RegistryUnavailable, match="answered 503 SlowDown"):
            ask()
        assert len(gcs.requests) == HASTE.attempts


def test_a_part_of_an_upload_that_fails_is_sent_again_alone(gcs: GcsServer, tmp_path: Path) -> None:
    store, content = gcs_at(gcs.endpoint), os.urandom(17 * 2**20)
    (tmp_path / "file").write_bytes(content)
    gcs.fails = once("partNumber=2")
    store.put_file("blobs/file", tmp_path / "file")
    sent = [request.partition("partNumber=")[2][:1] for request in gcs.requests if "partNumber" in request]
    assert sorted(sent) == ["1", "2", "2", "3"]
    assert store.get("blobs/file", max_bytes=len(content)) == content


def test_an_upload_that_is_given_up_leaves_no_object_and_no_parts(gcs: GcsServer, tmp_path: Path) -> None:
    store = gcs_at(gcs.endpoint, retry_policy=HASTE)
    (tmp_path / "file").write_bytes(bytes(9 * 2**20))
    gcs.fails = lambda request: "partNumber=2" in request
    with pytest.raises(RegistryUnavailable):
        store.put_file("blobs/file", tmp_path / "file")
    assert not store.exists("blobs/file")
    assert any(request.startswith("DELETE") and "uploadId" in request for request in gcs.requests)


def test_a_listing_goes_on_after_the_page_that_failed(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.registry.cloud._PAGE", 2)
    store, gcs.page = gcs_at(gcs.endpoint), 2
    keys = [f"models/m/versions/{number}" for number in range(1, 8)]
    for key in keys:
        store.put(key, b"x")
    gcs.requests.clear()
    gcs.fails = once("continuation-token")
    assert store.list("models/") == keys
    assert any("start-after" in request for request in gcs.requests)


@pytest.mark.parametrize("kind", ["gs", "az", "hdfs"])
def test_a_server_that_is_not_there_is_unavailable(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", TOKEN)
    url = f"http://127.0.0.1:{free_port()}"
    stores = {
        "gs": lambda: gcs_at(url, retry_policy=HASTE),
        "az": lambda: azure_at(f"{url}/account", retry_policy=HASTE),
        "hdfs": lambda: HdfsStore(url.removeprefix("http://"), "models", HASTE),
    }
    store: BlobStore = stores[kind]()
    with pytest.raises(RegistryUnavailable, match=r"did not answer for blobs/x") as caught:
        store.get("blobs/x", max_bytes=1)
    assert caught.value.facts == {"registry": store.url, "blob": "blobs/x"}


# Texts of obstore 0.12.1, shortened; the services' parts are of their references.
_TOKEN = "Generic GCS error: Error performing token request: Error performing "
_ANSWERED = "Server returned non-2xx status code: {0}: <Error><Code>{1}</Code></Error> inner: Status {{ status: {0},"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (
            _TOKEN + "GET http://169.254.169.254/computeMetadata/v1 - x",
            Denied,
            "there are no credentials",
        ),
        (_TOKEN + "POST https://oauth2.googleapis.com/token - x status: 400,", Denied, "token service refused"),
        (_TOKEN + "POST https://oauth2.googleapis.com/token - x kind: Timeout,", RegistryUnavailable, "timeout"),
        (_TOKEN + "POST https://t - in a reasonable timeframe status: 400,", Denied, "this machine's clock"),
        ("Request date header too old: status: 403,", Denied, "this machine's clock"),
        ("Invalid Access Key: Invalid symbol 32, offset 3.", Denied, "no usable form"),
        ("request must be valid: InvalidHeaderValue(InvalidHeaderValue)", Denied, "no usable form"),
        (_ANSWERED.format(404, "BlobNotFound"), Missing, "has no blobs/x"),
        (_ANSWERED.format(404, "ContainerNotFound"), RegistryMissing, "no registry"),
        (_ANSWERED.format(429, "TooManyRequests"), RegistryUnavailable, "429 TooManyRequests"),
        (_ANSWERED.format(503, "ServerBusy"), RegistryUnavailable, "503 ServerBusy"),
        (_ANSWERED.format(416, "InvalidRange"), Corrupt, "blobs/x"),
        (_ANSWERED.format(403, "AuthorizationPermissionMismatch"), Denied, "AuthorizationPermissionMismatch"),
        (_ANSWERED.format(400, "InvalidHeader"), RegistryError, "400 InvalidHeader"),
        ("Unable to extract metadata from headers: ETag", RegistryError, "not this kind of store's"),
        ("Received redirect without LOCATION", RegistryError, "redirects"),
        ('kind: Connect, "dns error"', RegistryUnavailable, r"connect \(dns error\)"),
        ("x" * 2**20, RegistryUnavailable, "the connection failed"),
    ],
)
def test_what_obstore_says_becomes_the_registrys_error(text: str, error: type[RegistryError], words: str) -> None:
    found = translated(RuntimeError(text), FACTS, "blobs/x")
    assert type(found) is error
    with pytest.raises(error, match=words):
        raise found
    assert len(found.message) < 200


def test_a_user_without_rights_is_denied(hdfs_server: HdfsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    HdfsStore(hdfs_server.authority, "others").put("blobs/x", b"1")
    monkeypatch.setenv("HADOOP_USER_NAME", "eve")
    store = HdfsStore(hdfs_server.authority, "others")
    assert store.get("blobs/x", max_bytes=1) == b"1"
    with pytest.raises(Denied, match="user=eve, access=WRITE") as caught:
        store.put("blobs/y", b"1")
    assert "HADOOP_USER_NAME" in caught.value.hint


def test_a_folder_of_hdfs_that_is_not_there_is_missing_as_a_whole(hdfs_server: HdfsServer) -> None:
    store = HdfsStore(hdfs_server.authority, "no/such/folder")
    for ask in (lambda: store.list(""), lambda: store.get("blobs/x", max_bytes=1)):
        with pytest.raises(RegistryMissing, match="there is no registry at hdfs://"):
            ask()


def test_replacements_in_hdfs_are_one_key_in_listings(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store = make_store("hdfs", request, tmp_path)
    store.put_if_absent("models/m/aliases/prod", b"1")
    for content in (b"22", b"333"):
        _, tag = store.get_tagged("models/m/aliases/prod", max_bytes=9)
        assert store.put_if_match("models/m/aliases/prod", content, tag)
    assert [(entry.key, entry.size) for entry in store.entries("")] == [("models/m/aliases/prod", 3)]
    assert store.size("models/m/aliases/prod") == 3
    assert store.put_if_absent("models/m/aliases/prod", b"1") is False
    store.put("models/m/aliases/prod", b"4444")
    assert store.get("models/m/aliases/prod", max_bytes=9) == b"4444"
    store.delete("models/m/aliases/prod")
    assert store.list("") == []
    assert store.put_if_absent("models/m/aliases/prod", b"1") is True
