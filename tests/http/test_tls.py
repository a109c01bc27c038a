"""TLS of hops against real servers: which certificates are trusted and shown, and what a refusal is called."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trustme

from isthmus.client import Client
from isthmus.errors import HopUnavailable, HopUntrusted, SettingsError, http_status
from isthmus.events.configuration import RouterTable
from isthmus.events.message import Message
from isthmus.events.route import Outcome, RouterRoute
from isthmus.http.tls import TlsFiles, TlsTrust, files_of, open_trust
from isthmus.pipeline import HttpHop
from isthmus.routing.fallback import is_hops_fault
from isthmus.settings import RegistrySettings
from isthmus.wire.frame import Frame
from support.hop_servers import FRAME, context, raw_server
from support.hop_servers import server as plain_server
from support.paths import ROOT
from support.patience import LONG_S
from support.tls_servers import server_context, tls_server, write_secrets

TODAY = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def stranger() -> trustme.CA:
    return trustme.CA()


def settings_at(folder: Path, **changes: str) -> RegistrySettings:
    return replace(RegistrySettings(secrets_dir=str(folder)), **changes)


def hop_at(url: str, trust: TlsTrust | None) -> HttpHop:
    return HttpHop(url, attempts=4, connect_timeout_s=LONG_S, max_reply_bytes=2**24, trust=trust)


def call(url: str, trust: TlsTrust | None, frame: Frame = FRAME) -> Frame:
    with closing(hop_at(url, trust)) as hop:
        return hop.call(frame, context()).frame


def refusal(url: str, trust: TlsTrust | None, frame: Frame = FRAME) -> HopUntrusted:
    with pytest.raises(HopUntrusted) as caught:
        call(url, trust, frame)
    assert (http_status(caught.value), bool(caught.value.hint)) == (502, True)
    assert url in caught.value.message
    return caught.value


@pytest.fixture(scope="module")
def guarded(ca: trustme.CA) -> Iterator[str]:
    """A server with a good certificate that demands one of its clients."""
    with tls_server(server_context(ca.issue_cert("localhost"), demanded_by=ca)) as url:
        yield url


@pytest.fixture(scope="module")
def server(ca: trustme.CA) -> Iterator[str]:
    with tls_server(server_context(ca.issue_cert("localhost"))) as url:
        yield url


def test_a_secret_names_the_ca_that_vouches_for_a_hop(server: str, ca: trustme.CA, tmp_path: Path) -> None:
    reply = call(server, open_trust(settings_at(write_secrets(tmp_path / "s", ca=ca))))
    assert np.array_equal(reply.tensors["x"], FRAME.tensors["x"])


def test_the_system_does_not_vouch_for_a_ca_of_ones_own(server: str) -> None:
    error = refusal(server, None)
    assert error.facts["reason"] == "unknown_ca"
    assert "hop-ca" in error.hint


def test_a_ca_of_ones_own_takes_the_place_of_the_systems(
    server: str, ca: trustme.CA, stranger: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca.cert_pem.write_to_path(tmp_path / "system.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "system.pem"))
    assert call(server, None).request == FRAME.request
    assert refusal(server, open_trust(settings_at(write_secrets(tmp_path / "s", ca=stranger)))).facts["reason"] == (
        "unknown_ca"
    )


@pytest.mark.parametrize("length", [16, 3_000_000])
def test_a_server_that_demands_a_certificate_is_named(
    guarded: str, ca: trustme.CA, tmp_path: Path, length: int
) -> None:
    """A large frame is still being sent when the alert comes."""
    frame = FRAME._replace(tensors={"x": np.zeros(length, "uint8")})
    error = refusal(guarded, open_trust(settings_at(write_secrets(tmp_path / "s", ca=ca))), frame)
    assert error.facts["reason"] == "certificate_demanded"
    assert "hop-client-cert" in error.hint


def test_a_server_gets_the_certificate_that_it_demands(guarded: str, ca: trustme.CA, tmp_path: Path) -> None:
    folder = write_secrets(tmp_path / "s", ca=ca, client=ca.issue_cert("router.example"))
    assert call(guarded, open_trust(settings_at(folder))).request == FRAME.request


def test_settings_name_files_in_place_of_secrets(guarded: str, ca: trustme.CA, tmp_path: Path) -> None:
    client = ca.issue_cert("router.example")
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    client.private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
    # The secrets of another client: its key does not belong to the named certificate.
    folder = write_secrets(tmp_path / "s", client=ca.issue_cert("other.example"))
    named = {"hop_ca": str(tmp_path / "ca.pem"), "hop_client_cert": str(tmp_path / "client.pem")}
    settings = settings_at(folder, **named)
    assert files_of(settings) == TlsFiles(named["hop_ca"], named["hop_client_cert"], "")
    assert call(guarded, open_trust(settings)).request == FRAME.request


@pytest.mark.parametrize("is_expired", [False, True])
def test_a_servers_refusal_of_the_certificate_is_named(
    guarded: str, ca: trustme.CA, stranger: trustme.CA, tmp_path: Path, is_expired: bool
) -> None:
    old = ca.issue_cert("router.example", not_after=TODAY - DAY)
    folder = write_secrets(tmp_path / "s", ca=ca, client=old if is_expired else stranger.issue_cert("router.example"))
    assert refusal(guarded, open_trust(settings_at(folder))).facts["reason"] == "certificate_refused"


@pytest.mark.parametrize(
    ("reason", "host", "validity"),
    [
        ("wrong_host", "127.0.0.1", {}),
        ("expired", "localhost", {"not_after": TODAY - DAY}),
        ("not_yet_valid", "localhost", {"not_before": TODAY + DAY}),
    ],
)
def test_a_certificate_that_does_not_hold_is_named(
    ca: trustme.CA, tmp_path: Path, reason: str, host: str, validity: dict[str, datetime.datetime]
) -> None:
    trust = open_trust(settings_at(write_secrets(tmp_path / "s", ca=ca)))
    with tls_server(server_context(ca.issue_cert("localhost", **validity)), host) as url:  # type: ignore[arg-type]
        assert refusal(url, trust).facts["reason"] == reason


def test_a_server_without_tls_is_named() -> None:
    with plain_server([(200, {}, b"")]) as (url, _):
        assert refusal(url.replace("http:", "https:"), None).facts["reason"] == "no_tls"


def test_a_proxy_that_demands_a_certificate_by_http_is_named() -> None:
    """nginx ends the handshake well, and answers 400."""

    def nginx(connection: socket.socket) -> None:
        connection.recv(2**16)
        page = b"<center>No required SSL certificate was sent</center>"
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page))

    with raw_server(nginx) as url:
        assert refusal(url, None).facts["reason"] == "certificate_demanded"


def test_a_server_that_speaks_old_tls_alone_is_refused(ca: trustme.CA, tmp_path: Path) -> None:
    trust = open_trust(settings_at(write_secrets(tmp_path / "s", ca=ca)))
    old = server_context(ca.issue_cert("localhost"))
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSVersion"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with tls_server(old) as url:
        assert refusal(url, trust).facts["reason"] == "protocol"


def test_another_route_takes_over_from_a_hop_that_is_not_trusted(server: str) -> None:
    assert is_hops_fault(refusal(server, None))


def test_replaced_files_are_used_without_a_restart(ca: trustme.CA, stranger: trustme.CA, tmp_path: Path) -> None:
    folder = write_secrets(tmp_path / "s", ca=stranger)
    trust = TlsTrust(files_of(settings_at(folder)), look_s=0)
    with tls_server(server_context(ca.issue_cert("localhost"))) as url, closing(hop_at(url, trust)) as hop:
        with pytest.raises(HopUntrusted):
            hop.call(FRAME, context())
        _replace(folder / "hop-ca", ca.cert_pem.bytes())
        assert hop.call(FRAME, context()).exchange.connect_s > 0
        assert hop.call(FRAME, context()).exchange.connect_s == 0
        # A CA that is trusted no more ends idle connections to its servers.
        _replace(folder / "hop-ca", stranger.cert_pem.bytes())
        with pytest.raises(HopUntrusted):
            hop.call(FRAME, context())


def test_old_files_serve_on_where_new_ones_are_unusable(
    guarded: str, ca: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = ca.issue_cert("a.example"), ca.issue_cert("b.example")
    folder = write_secrets(tmp_path / "s", ca=ca, client=first)
    trust = TlsTrust(files_of(settings_at(folder)), look_s=0)
    before = trust.context()
    with caplog.at_level(logging.INFO, "isthmus"):
        _replace(folder / "hop-client-cert", second.cert_chain_pems[0].bytes())
        assert trust.context() is before
        assert call(guarded, trust).request == FRAME.request
        _replace(folder / "hop-client-key", second.private_key_pem.bytes())
        assert trust.context() is not before
    own = [record.levelname for record in caplog.records if record.name == "isthmus.http.tls"]
    assert own == ["WARNING", "INFO"]
    assert "PRIVATE" not in caplog.text
    assert call(guarded, trust).request == FRAME.request


def _replace(path: Path, data: bytes) -> None:
    """As Kubernetes does: another file takes the name at once."""
    (path.parent / "new").write_bytes(data)
    os.replace(path.parent / "new", path)


@pytest.mark.parametrize("name", ["hop-ca", "hop-client-cert", "hop-client-key"])
@pytest.mark.parametrize("content", [b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n", None])
def test_a_file_that_is_none_of_its_kind_stops_the_start(
    ca: trustme.CA, tmp_path: Path, name: str, content: bytes | None
) -> None:
    folder = write_secrets(tmp_path / "s", ca=ca, client=ca.issue_cert("router.example"))
    (folder / name).unlink()
    if content is None:
        (folder / name).symlink_to(tmp_path / "gone")
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        open_trust(settings_at(folder))
    assert "hop_ca" in str(caught.value.facts["variable"])
    assert "PEM" not in str(content) or "no PEM" not in caught.value.message


def test_a_key_alone_and_a_pipe_are_refused(ca: trustme.CA, tmp_path: Path) -> None:
    folder = write_secrets(tmp_path / "s", client=ca.issue_cert("router.example"))
    (folder / "hop-client-cert").unlink()
    with pytest.raises(SettingsError, match="needs its certificate"):
        open_trust(settings_at(folder))
    with pytest.raises(SettingsError, match="is no file"):
        TlsFiles(ca="/dev/zero").open()


def test_an_encrypted_key_is_refused_without_asking_for_its_passphrase(ca: trustme.CA, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    client = ca.issue_cert("router.example")
    folder = write_secrets(tmp_path / "s", ca=ca, client=client)
    key = serialization.load_pem_private_key(client.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"passphrase"),
    )
    (folder / "hop-client-key").write_bytes(encrypted)
    with pytest.raises(SettingsError, match="without a passphrase"):
        open_trust(settings_at(folder))


def test_the_client_of_a_router_has_the_same_errors(server: str, ca: trustme.CA, tmp_path: Path) -> None:
    with pytest.raises(HopUntrusted) as caught:
        Client(server).get("/")
    assert caught.value.facts["reason"] == "unknown_ca"
    assert Client(server, trust=open_trust(settings_at(write_secrets(tmp_path / "s", ca=ca)))).get("/").status == 200


def test_a_trigger_calls_its_router_with_the_same_certificates(server: str, ca: trustme.CA, tmp_path: Path) -> None:
    table, message = RouterTable(url=server), Message(b"{}", "m1", "application/json")
    with closing(RouterRoute(table)) as route:
        away = route.call(message)
    assert (away.outcome, "signed by no CA" in away.reason) == (Outcome.AWAY, True)
    with closing(RouterRoute(table, open_trust(settings_at(write_secrets(tmp_path / "s", ca=ca))))) as route:
        assert route.call(message).outcome is Outcome.DONE


def test_a_connection_that_ends_without_an_alert_has_advice(ca: trustme.CA, tmp_path: Path) -> None:
    """Servers of asyncio end a connection so where a client shows no certificate."""
    trust = open_trust(settings_at(write_secrets(tmp_path / "s", ca=ca)))
    with (
        tls_server(server_context(ca.issue_cert("localhost")), ends=True) as url,
        closing(HttpHop(url, attempts=1, connect_timeout_s=LONG_S, max_reply_bytes=2**20, trust=trust)) as hop,
        pytest.raises(HopUnavailable, match="broke off") as caught,
    ):
        hop.call(FRAME, context())
    assert "client certificate" in caught.value.hint


def test_nothing_turns_verification_off() -> None:
    # Python's own, and those of requests, aiohttp, paho, obstore and opendal.
    off = (
        "allow_invalid_certificates",
        "danger_accept_invalid",
        "CERT_NONE",
        "check_hostname =",
        "check_hostname=False",
        "verify=False",
        "_create_unverified_context",
        "tls_insecure_set",
        "ssl=False",
    )
    for path in sorted((ROOT / "shared").rglob("*.py")):
        text = path.read_text()
        assert not [word for word in off if word in text], path
