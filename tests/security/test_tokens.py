"""JSON web tokens: every algorithm that is taken, every field altered, and key sets that rotate, fail and grow."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, RSAKey

from isthmus.errors import CallerUnauthenticated, IssuerUnavailable, SettingsError
from isthmus.security.callers import Caller, Role
from isthmus.security.key_sets import MAX_SET_BYTES, IssuerKeys, key_set_source, parse_key_set
from isthmus.security.tokens import TokenVerifier, open_tokens
from isthmus.settings import AccessSettings
from support.ports import free_port
from support.token_keys import EC, ED, RSA, AnyAlgorithm

ISSUER, AUDIENCE = "https://id.example.com", "isthmus"
SIGNERS = {"RS256": RSA, "ES256": EC, "EdDSA": ED, "Ed25519": ED}
NOW = int(time.time())


def public(*keys: Any, **more: Any) -> bytes:
    return json.dumps({"keys": [{**key.as_dict(private=False), "kid": key.kid, **more} for key in keys]}).encode()


def claims(**changes: Any) -> dict[str, Any]:
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": NOW + 300, "roles": ["infer", "other"]}
    return {name: value for name, value in (good | changes).items() if value is not None}


def token(algorithm: str = "ES256", key: Any = None, header: Mapping[str, Any] | None = None, **changes: Any) -> str:
    signer = key or SIGNERS[algorithm]
    head = {"alg": algorithm, "kid": signer.kid, **(header or {})}
    return jwt.encode(head, claims(**changes), signer, registry=AnyAlgorithm())


def settings(**given: Any) -> AccessSettings:
    return AccessSettings(**{"jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "jwt_keys": "unused.json"} | given)


def verifier(document: bytes | None = None, **given: Any) -> TokenVerifier:
    document = public(RSA, EC, ED) if document is None else document
    return TokenVerifier(settings(**given), IssuerKeys(lambda: document, refresh_s=300, max_age_s=3600), lambda: NOW)


def verified(text: str, **given: Any) -> Caller:
    return verifier(**given).verify(text)


def refusal(text: str, **given: Any) -> str:
    with pytest.raises(CallerUnauthenticated) as caught:
        verified(text, **given)
    assert text[:30] not in str(caught.value.document())
    assert caught.value.__cause__ is None
    return str(caught.value.facts["reason"])


@pytest.mark.parametrize("algorithm", SIGNERS)
def test_a_token_of_each_algorithm_names_its_caller_and_roles(algorithm: str) -> None:
    caller = verified(token(algorithm))
    assert (caller.name, caller.label) == ("jwt:ann", "token")
    assert caller.may(Role.INFER, "any")
    assert not caller.has(Role.METRICS)


def unsigned(head: Mapping[str, Any], payload: Mapping[str, Any], signature: bytes = b"") -> str:
    parts = [json.dumps(head).encode(), json.dumps(payload).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def hmac_signed(secret: bytes, algorithm: str = "HS256", kid: str = "rsa") -> str:
    """What a library signs that takes the public key for a shared secret."""
    head = unsigned({"alg": algorithm, "kid": kid}, claims()).rpartition(".")[0]
    digest = hmac.new(secret, head.encode(), hashlib.sha256).digest()
    return f"{head}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


@pytest.mark.parametrize(
    "algorithm", ["none", "None", "NONE", "HS256", "HS512", "RS512", "PS256", "ES384", "", 5, None]
)
def test_other_algorithms_are_refused_whatever_their_signature(algorithm: Any) -> None:
    assert refusal(unsigned({"alg": algorithm, "kid": "rsa"}, claims(), b"x" * 32)) in ("algorithm", "malformed")


def test_a_public_key_is_no_shared_secret() -> None:
    for secret in (RSA.as_pem(private=False), RSA.as_der(private=False), public(RSA)):
        assert refusal(hmac_signed(secret)) == "algorithm"
        assert refusal(hmac_signed(secret, "RS256")) == "signature"


def test_a_key_is_for_its_own_algorithm() -> None:
    assert refusal(token("ES256", header={"kid": "rsa"})) == "signature"
    assert refusal(token("RS256", header={"kid": "ec"})) == "signature"
    assert refusal(token("ES256", key=ECKey.generate_key("P-256", {"kid": "ec"}))) == "signature"


@pytest.mark.parametrize("position", range(3))
def test_every_part_of_a_token_is_signed(position: int) -> None:
    for algorithm in SIGNERS:
        parts = token(algorithm).split(".")
        raw = bytearray(base64.urlsafe_b64decode(parts[position] + "=="))
        for index in range(0, len(raw), 7):
            altered = bytes([*raw[:index], raw[index] ^ 1, *raw[index + 1 :]])
            changed = [*parts]
            changed[position] = base64.urlsafe_b64encode(altered).rstrip(b"=").decode()
            assert refusal(".".join(changed)) in ("signature", "malformed", "algorithm")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iss": "https://id.example.com/"}, "issuer"),
        ({"iss": None}, "issuer"),
        ({"iss": ["https://id.example.com"]}, "issuer"),
        ({"aud": "another"}, "audience"),
        ({"aud": ["another", "isthmus2"]}, "audience"),
        ({"aud": None}, "audience"),
        ({"aud": {"isthmus": 1}}, "audience"),
        ({"exp": None}, "claims"),
        ({"exp": "tomorrow"}, "claims"),
        ({"exp": NOW - 120}, "expired"),
        ({"exp": -1}, "expired"),
        ({"nbf": NOW + 3600}, "not_yet"),
        ({"iat": NOW + 3600}, "not_yet"),
        ({"sub": None}, "claims"),
        ({"sub": ""}, "claims"),
        ({"sub": 7}, "claims"),
    ],
)
def test_claims_that_are_missing_or_another_are_refused(changes: dict[str, Any], reason: str) -> None:
    assert refusal(token(**changes)) == reason


def test_a_clock_that_is_off_is_told_by_how_much_and_a_bounded_skew_is_taken() -> None:
    assert verified(token(exp=NOW - 10)).name == "jwt:ann"
    assert verified(token(nbf=NOW + 10, aud=["x", AUDIENCE])).name == "jwt:ann"
    with pytest.raises(CallerUnauthenticated) as caught:
        verified(token(exp=NOW - 3600))
    assert "says 3600 s ago" in caught.value.hint
    with pytest.raises(SettingsError, match="jwt_clock_skew_s"):
        settings(jwt_clock_skew_s=3600.0).check()


def test_headers_that_ask_for_more_are_refused_and_keys_in_a_token_are_not_used() -> None:
    assert refusal(unsigned({"alg": "ES256", "kid": "ec", "crit": ["x"], "x": 1}, claims(), b"x" * 64)) == "malformed"
    assert refusal(unsigned({"alg": "ES256", "kid": ["ec"]}, claims(), b"x" * 64)) == "malformed"
    own = ECKey.generate_key("P-256", {"kid": "own"})
    head = {"jwk": own.as_dict(private=False), "kid": "own"}
    assert refusal(token("ES256", key=own, header=head)) in ("signature", "malformed")


@pytest.mark.parametrize(
    "text", ["..", "a.b.c", "e30.e30.e30", "eyJhbGciOiJFUzI1NiJ9..", "\u00e9.x.y", "x" * 9000 + ".x.x"]
)
def test_what_is_no_token_is_malformed(text: str) -> None:
    with pytest.raises(CallerUnauthenticated) as caught:
        verified(text)
    assert caught.value.facts["reason"] in ("malformed", "algorithm", "signature")


def test_roles_and_models_come_from_the_claims_that_settings_name() -> None:
    nested = token(realm_access={"roles": ["metrics"]}, grants="m n")
    caller = verified(nested, jwt_roles_claim="realm_access.roles", jwt_models_claim="grants")
    assert (caller.may(Role.METRICS, "m"), caller.may(Role.METRICS, "x"), caller.has(Role.INFER)) == (
        True,
        False,
        False,
    )
    url = token(**{"https://example.com/roles": "infer pin"})
    assert verified(url, jwt_roles_claim="https://example.com/roles").has(Role.PIN)
    assert refusal(token(), jwt_models_claim="grants") == "claims"
    assert not verified(token(roles=None)).has(Role.INFER)
    assert not verified(token(roles={"infer": True})).has(Role.INFER)
    assert verified(token(sub="a\nb\u00e9" + "c" * 500)).name.startswith("jwt:a?b?ccc")
    assert verified(token(email="e@x"), jwt_caller_claim="email").name == "jwt:e@x"


def test_a_key_set_keeps_public_keys_of_the_three_kinds_alone() -> None:
    weak = RSAKey.import_key(RSA.as_dict(private=True))
    document = json.loads(public(RSA, EC, ED))
    private = {**EC.as_dict(private=True), "kid": "private"}
    others = [
        {**OctKey.generate_key(256).as_dict(private=True), "kid": "oct", "alg": "RS256"},
        {**ECKey.generate_key("P-384").as_dict(private=False), "kid": "p384"},
        {**weak.as_dict(private=False), "kid": "enc", "use": "enc"},
        {**weak.as_dict(private=False), "kid": "ps", "alg": "PS256"},
        {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "tiny"},
        {"kty": "future"},
        "text",
    ]
    keys = parse_key_set(json.dumps({"keys": [*document["keys"], private, *others]}).encode())
    assert set(keys) == {("RS256", "rsa"), ("ES256", "ec"), ("EdDSA", "ed"), ("ES256", "private")}
    assert not keys["ES256", "private"].is_private
    for wrong in (b"", b"[]", b"{}", b'{"keys": {}}', b'{"keys": []}', json.dumps({"keys": others}).encode()):
        with pytest.raises(IssuerUnavailable):
            parse_key_set(wrong)


def test_a_token_without_a_key_id_takes_the_only_key_of_its_algorithm() -> None:
    text = jwt.encode({"alg": "ES256"}, claims(), EC, algorithms=["ES256"])
    assert verified(text).name == "jwt:ann"
    second = ECKey.generate_key("P-256", {"kid": "second"})
    assert refusal(text, document=public(EC, second)) == "signature"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Source:
    """A key set that a test changes; None is an outage."""

    def __init__(self, document: bytes | None) -> None:
        self.document, self.reads = document, 0

    def __call__(self) -> bytes:
        self.reads += 1
        if self.document is None:
            raise IssuerUnavailable("the issuer cannot be reached")
        return self.document


def test_a_rotated_key_is_found_and_unknown_ids_do_not_fetch_at_will() -> None:
    clock, source = Clock(), Source(public(EC))
    keys = IssuerKeys(source, refresh_s=300, max_age_s=3600, clock=clock)
    assert keys.find("ES256", "ec") is not None
    source.document = public(RSA)
    for number in range(50):
        assert keys.find("RS256", f"unknown-{number}") is None
    assert source.reads == 1
    clock.now += 11
    assert keys.find("RS256", "rsa") is not None
    assert keys.find("ES256", "ec") is None
    assert source.reads == 2


def test_a_set_outlives_an_outage_until_it_is_too_old_and_says_so() -> None:
    clock, source = Clock(), Source(public(EC))
    keys = IssuerKeys(source, refresh_s=300, max_age_s=3600, clock=clock)
    assert keys.find("ES256", "ec") is not None
    source.document = None
    clock.now += 3500
    assert keys.find("ES256", "ec") is not None
    reads = source.reads
    assert keys.find("ES256", "ec") is not None
    assert source.reads == reads
    clock.now += 200
    with pytest.raises(IssuerUnavailable, match=r"3700 s old, and the issuer cannot be reached"):
        keys.find("ES256", "ec")
    source.document = public(EC)
    clock.now += 11
    assert keys.find("ES256", "ec") is not None


def test_without_any_set_the_error_says_why() -> None:
    with pytest.raises(IssuerUnavailable, match="the issuer cannot be reached"):
        IssuerKeys(Source(None), refresh_s=300, max_age_s=3600).find("ES256", "ec")


@pytest.fixture
def issuer() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server of a key set: its URL, and what it answers."""
    answer: dict[str, Any] = {"status": 200, "body": public(EC), "wait": threading.Event()}
    answer["wait"].set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer["wait"].wait()
            self.send_response(answer["status"])
            self.send_header("Content-Length", str(len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/keys?tenant=1", answer
    answer["wait"].set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_key_set_comes_from_a_url_within_bounds(
    issuer: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answer = issuer
    assert open_tokens(settings(jwt_keys=url)).verify(token()).name == "jwt:ann"
    read = key_set_source(url)
    for change, said in (
        ({"status": 500}, "answered 500"),
        ({"body": b"x" * (MAX_SET_BYTES + 1)}, "more than"),
        ({"status": 302}, "answered 302"),
    ):
        answer.update({"status": 200, "body": public(EC)} | change)
        with pytest.raises(IssuerUnavailable, match=said):
            read()
    monkeypatch.setattr("isthmus.security.key_sets.FETCH_S", 0.1)
    answer["wait"].clear()
    with pytest.raises(IssuerUnavailable, match=r"within 0\.1 s"):
        read()


def test_a_key_set_comes_from_a_file_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(IssuerUnavailable, match="No such file"):
        key_set_source(str(path))()
    path.write_bytes(public(EC))
    assert open_tokens(settings(jwt_keys=str(path))).verify(token()).name == "jwt:ann"
    path.write_bytes(b" " * (MAX_SET_BYTES + 1))
    with pytest.raises(IssuerUnavailable, match="more than"):
        key_set_source(str(path))()
    with pytest.raises(IssuerUnavailable, match="cannot be reached"):
        key_set_source(f"http://127.0.0.1:{free_port()}/")()


@pytest.mark.parametrize(
    "url", ["http://id.example.com/keys", "http://10.0.0.1/keys", "ftp://x/keys", "https://u:p@x/keys", "http://a b/"]
)
def test_a_key_set_over_open_http_stops_the_start(url: str) -> None:
    with pytest.raises(SettingsError, match="jwt_keys"):
        key_set_source(url)


@pytest.mark.parametrize(
    "near", ["http://localhost:9/k", "http://[::1]:9/k", "http://dex.auth.svc.cluster.local/k", "http://dex/k"]
)
def test_a_key_set_within_the_cluster_may_come_by_http(near: str) -> None:
    assert callable(key_set_source(near))


@pytest.mark.parametrize("missing", ["jwt_issuer", "jwt_audience", "jwt_keys"])
def test_issuer_audience_and_keys_are_set_together(missing: str) -> None:
    with pytest.raises(SettingsError, match=f"{missing} is missing"):
        settings(**{missing: ""}).check()
